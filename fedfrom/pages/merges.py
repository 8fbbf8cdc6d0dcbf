"""The sections on the merges: weights, agreement of the updates, ranks and spectra."""

from collections.abc import Sequence
from typing import Any

from fedfrom.pages import charts
from fedfrom.pages.groups import Group, Line
from fedfrom.pages.look import MISSING, shown
from fedfrom.pages.parts import OLD, Section, Table
from fedfrom.pages.spectra import rank_holding, stable_rank


def weights(groups: Sequence[Group]) -> Section:
    """Return the section on each client's weight by round."""
    drawn = charts.weights(groups)
    if not drawn:
        return Section(
            "weights",
            "Weights of the clients",
            ["No strategy here reports its weights (FedAvg's are the shares of the examples)."],
        )
    note = (
        "A client's weight in the merge, mean over layers. FedAvg's would be the shares of the examples, in brackets. "
        "An empty cell is a round in which the client was not merged."
    )
    return Section("weights", "Weights of the clients", [note, *_first_runs(groups)], drawn)


def _first_runs(groups: Sequence[Group]) -> list[str]:
    if len(groups) > charts.MOST_FIRST_RUNS:
        which = f"the first {charts.MOST_FIRST_RUNS} of {len(groups)} settings"
    elif any(len(group.runs) > 1 for group in groups):
        which = "each settings" if len(groups) > 1 else f"{len(groups[0].runs)}"
    else:
        return []
    return [f"Shown of the first run of {which}; the data block at the end of the page has every run."]


def agreement(groups: Sequence[Group], lines: Sequence[Line]) -> Section:
    """Return the section on the cosines of the updates, and the share of their energy that merging loses."""
    interference = charts.by_round(
        lines,
        "interference",
        "Energy of the updates that the merge loses, by round",
        "merges",
        "interference",
        **{"unit": "percent", "y-label": "interference", "from-zero": True},
    )
    pairs = charts.by_round(
        lines,
        "cosine",
        "Mean cosine of the clients' updates, by round",
        "merges",
        "cosine-mean",
        **{"y-label": "mean pairwise cosine"},
    )
    matrices = charts.cosines(groups)
    title = "Do the clients pull the same way?"
    merged = any(line.entries and entry["merges"]["rounds"] for line in lines for entry in line.entries)
    if not merged:
        return Section("agreement", title, ["No strategy here reports its merges, so nothing is known of this."])
    notes = []
    if interference:
        notes.append("Interference is Σ w‖θ* − θ‖² / Σ w‖θ‖²: 0 where all updates are alike.")
    else:
        notes.append(f"The interference of the whole updates {OLD}.")
    if pairs:
        notes.append("A cosine of 1 is the same direction, 0 none in common, −1 the opposite.")
    else:
        notes.append(f"What the cosines between clients' whole updates were {OLD}, or there were too many clients.")
    return Section(
        "agreement", title, [*notes, *(_first_runs(groups) if matrices else [])], [*interference, *pairs, *matrices]
    )


def truncation(groups: Sequence[Group], lines: Sequence[Line]) -> Section:
    """Return the section on ranks, the energy that truncation drops, and the spectra of the final adapters."""
    dropped = charts.by_round(
        lines,
        "energy-dropped",
        "Energy that the truncation drops, by round",
        "merges",
        "energy-dropped",
        **{"unit": "percent", "y-label": "mean over modules", "from-zero": True},
    )
    notes, tables = [], []
    if dropped:
        notes.append("Truncating the merged product to the adapter's rank drops this share of its squared norm.")
    else:
        notes.append("No merge of adapters was reported, so nothing is known of what truncation dropped.")
    drawn = charts.spectra(groups)
    for _, title, _, entry in charts.chosen(groups):
        if entry["spectra"]:
            rows = [
                [
                    name,
                    str(len(values)),
                    shown(values[0]),
                    shown(values[-1]),
                    str(rank_holding(values, 0.9)),
                    str(rank_holding(values, 0.99)),
                    f"{stable_rank(values):.2f}",
                ]
                for name, values in entry["spectra"].items()
                if values
            ]
            header = ["module", "rank", "largest", "smallest", "rank for 90 %", "rank for 99 %", "stable rank"]
            tables.append(Table(f"Final adapter of {title}: singular values", header, rows, folded=True))
        if entry["last-merge"]:
            tables.append(_layers(title, entry["last-merge"]))
    missing: dict[str, list[str]] = {}
    for _, title, _, entry in charts.chosen(groups):
        if entry["no-spectra"]:
            missing.setdefault(entry["no-spectra"], []).append(title)
    notes += [f"No spectrum of {', '.join(titles)}: {why}" for why, titles in missing.items()]
    if any(len(chart["series"]) > charts.MOST_LINES for chart in drawn):
        notes.append("Each line is a module of the final adapter, from the first (blue) to the last (yellow).")
    return Section("truncation", "Ranks and spectra", [*notes, *_first_runs(groups)], [*dropped, *drawn], tables)


def _layers(title: str, last: dict[str, Any]) -> Table:
    rows = [
        [
            layer["name"],
            layer["kind"],
            ", ".join(shown(rank, "count") for rank in dict.fromkeys(layer["ranks-in"])) or MISSING,
            shown(layer["rank-out"] or None, "count"),
            shown(layer["energy-dropped"], "percent"),
            shown(layer["interference"], "percent"),
            shown(layer["lambda-max"]),
            shown(layer["clients-effective"]),
        ]
        for layer in last["layers"]
    ]
    header = ["layer", "kind", "ranks in", "rank out", "energy dropped", "interference", "λ max", "effective clients"]
    return Table(f"Layers of the last merge (round {last['round']}) of {title}", header, rows, folded=True)
