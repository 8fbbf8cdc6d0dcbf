"""Tables and pictures of what was measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.attacks.attacks import MALFORMED, UNTARGETED
from benchmarks.attacks.bench import Outcome
from benchmarks.attacks.contenders import CONTENDERS, FEDFROM
from benchmarks.attacks.rounds import SKEWED
from simulations import intervals
from simulations.figures import COLOURS, MARKERS, STYLE
from simulations.tables import write_table

BAR = 0.95
HONEST = (
    "The honest merge is the same strategy's, of the honest clients' replies alone (told that there are no attackers)."
)
UNUSABLE = "0: no usable model (the run ends with an exception, or NaN, infinity or other shapes in the arrays)."


def counts_for_bar(outcome: Outcome) -> bool:
    """Return whether the bar holds for it: one untargeted attacker of 10, a pairwise cosine >= 0.5 or trained.

    Not in the round of skewed labels, whose updates are all but orthogonal: below 0.1 one sign-flip alone is too much.
    """
    untargeted = outcome.attack in MALFORMED or outcome.attack in UNTARGETED
    return outcome.attackers == 1 and untargeted and outcome.round not in ("cosine 0.1", SKEWED)


def write_outcomes(outcomes: Sequence[Outcome], cosines: Mapping[str, float], folder: Path) -> None:
    """Write every outcome, the table by attack, and the means over all of it."""
    rows = [list(outcome.to_dict().values()) for outcome in outcomes]
    header = list(outcomes[0].to_dict())
    write_table(folder, "outcomes", header, rows, "Every outcome: see `benchmarks/attacks/bench.py`.")
    (folder / "outcomes.md").unlink()  # thousands of rows: for programs
    strategies = [name for name in CONTENDERS if any(o.strategy == name for o in outcomes)]
    said = ", ".join(f"{name}: {value:.2f}" for name, value in cosines.items())
    for attackers in sorted({o.attackers for o in outcomes}):
        table = []
        for attack in dict.fromkeys(o.attack for o in outcomes):
            cells: list[object] = [attack]
            for name in strategies:
                cells.append(
                    _cell([o for o in outcomes if (o.attackers, o.attack, o.strategy) == (attackers, attack, name)])
                )
            own = [o for o in outcomes if (o.attackers, o.attack, o.strategy) == (attackers, attack, FEDFROM)]
            weights = [o.weight for o in own if o.weight is not None]
            cells += [max(weights) if weights else "", float(np.mean([o.distance for o in own]))]
            table.append(cells)
        about = (
            f"Cosine of the global update to the honest merge with {attackers} of 10 clients attacking: mean over the "
            f"rounds, and in brackets the lowest. {HONEST} {UNUSABLE} Mean pairwise cosine of the honest updates: "
            f"{said}. The last two columns are {FEDFROM}'s: the most that the attackers weigh together in a layer, and "
            "the mean distance to the honest merge, relative to its norm."
        )
        write_table(folder, f"attackers-{attackers}", ["attack", *strategies, "weight", "distance"], table, about)
    _write_means(outcomes, strategies, folder)


def _cell(found: Sequence[Outcome]) -> str:
    if not found:
        return "n/a"
    values = [o.cosine for o in found]
    mean, least = float(np.mean(values)), min(values)
    return f"{mean:.2f}" if f"{mean:.2f}" == f"{least:.2f}" else f"{mean:.2f} ({least:.2f})"


def _write_means(outcomes: Sequence[Outcome], strategies: Sequence[str], folder: Path) -> None:
    table = []
    for name in strategies:
        own = [o for o in outcomes if o.strategy == name]
        sound = [o for o in own if o.attack not in MALFORMED]
        of_each = [[o.cosine for o in own if o.attackers == count] for count in (1, 2, 3)]
        table.append(
            [
                name,
                *(f"{np.mean(values):.3f}" if values else "n/a" for values in of_each),
                f"{np.mean([o.cosine for o in own]):.3f}",
                f"{np.mean([o.cosine for o in sound]):.3f}",
                f"{np.mean([o.common for o in own]):.3f}",
                f"{np.mean([o.common for o in sound]):.3f}",
                f"{min(o.cosine for o in own if counts_for_bar(o)):.3f}",
            ]
        )
    about = (
        f"Mean cosine over the tables of 1, 2 and 3 attackers. {HONEST} Well-formed: without the attacks whose replies "
        "are malformed (NaN, keys, shapes, num-examples). Common target: the cosine to the example-weighted mean of "
        "the honest clients' products, the same for all strategies. Bar: the lowest of one untargeted attacker at a "
        "pairwise cosine of 0.5 and 0.9 and in the trained round. Krum, MultiKrum, Bulyan and FedTrimmedAvg are told "
        "the number of attackers, and so is FedFroM's select; Bulyan is run where n >= 4f + 3."
    )
    header = ["strategy", "1", "2", "3", "all", "well-formed", "common, all", "common, well-formed", "bar"]
    write_table(folder, "means", header, table, about)


def draw_scales(curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], path: Path) -> None:
    """Draw the cosine against the scale of a sign-flip, a panel for each title, a line for each strategy."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(curves), figsize=(5.8 * len(curves), 4.8), dpi=150, layout="constrained")
        for plot, (title, lines) in zip(np.atleast_1d(axes), curves.items(), strict=True):
            _draw_lines(plot, title, lines)
        np.atleast_1d(axes)[0].set_ylabel("cosine to the honest merge")
        handles, labels = np.atleast_1d(axes)[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        figure.savefig(path)
        plt.close(figure)


def _draw_lines(plot: Axes, title: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    for position, (name, points) in enumerate(lines.items()):
        own = name.startswith(FEDFROM)
        plot.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=COLOURS[position % len(COLOURS)],
            marker=MARKERS[position % len(MARKERS)],
            linestyle="-" if own else "--",
            linewidth=2.2 if own else 1.4,
            markersize=4.5,
            label=name,
        )
    plot.axhline(BAR, color="#555555", linewidth=1, linestyle=":")
    plot.set_xscale("log")
    plot.set_ylim(-1.05, 1.05)
    plot.set_xlabel("scale of the attackers' sign-flip")
    plot.set_title(title)


def write_tradeoff(
    accuracies: Mapping[tuple[str, float | None], Sequence[float]],
    held: Mapping[tuple[str, float | None], Mapping[str, float]],
    chosen: tuple[float | None, float | None],
    folder: Path,
) -> None:
    """Write and draw what each clip and each cap holds and what it costs; `chosen` are FedFroM's (clip, cap)."""
    baseline = accuracies["clip", None]
    table: list[list[Any]] = []
    for (kind, value), found in accuracies.items():
        cosine = held[kind, value]
        table.append(
            [
                kind,
                "None" if value is None else f"{value:g}",
                intervals.mean(found),
                intervals.paired(found, baseline),
                cosine["cosine"],
                cosine["at the bound"],
                cosine["with 1e12 examples"],
            ]
        )
    about = (
        "Clip: FedFroM's `clip` with `examples_cap=None`; cap: `examples_cap` with `clip=None`. Accuracy of six "
        f"honest, unequal clients (mean of the last rounds, {len(baseline)} paired seeds, ± half a 95 % interval), and "
        "its difference to neither clip nor cap. Cosines: the lowest to the honest merge with one untargeted attacker "
        "of 10, at a pairwise cosine of 0.5 and in the trained round, the other setting at its default; at the bound: "
        "of a sign-flip that is as large as still counts in full."
    )
    header = [
        "setting",
        "value",
        "accuracy",
        "difference",
        "lowest cosine",
        "flip at the bound",
        "flip with 1e12 examples",
    ]
    write_table(folder, "tradeoff", header, table, about)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.2), dpi=150, layout="constrained")
        for plot, kind in zip(axes, ("clip", "cap"), strict=True):
            _draw_tradeoff(plot, kind, [row for row in table if row[0] == kind], chosen)
        axes[0].set_ylabel("lowest cosine, one attacker of 10")
        axes[0].legend(loc="lower left")
        figure.savefig(folder / "tradeoff.png")
        plt.close(figure)


def _draw_tradeoff(
    plot: Axes, kind: str, rows: Sequence[Sequence[Any]], chosen: tuple[float | None, float | None]
) -> None:
    for column, label in (
        (4, "any untargeted attack"),
        (5, "sign-flip as large as counts"),
        (6, "sign-flip that claims 1e12 examples"),
    ):
        colour = COLOURS[column - 4]
        points = [(100 * row[3].mean, row[column], row[1]) for row in rows]
        plot.plot([x for x, _, _ in points], [y for _, y, _ in points], color=colour, linewidth=1, alpha=0.5)
        plot.scatter([x for x, _, _ in points], [y for _, y, _ in points], color=colour, label=label, zorder=3)
        for x, y, text in points:
            plot.annotate(text, (x, y), xytext=(4, 5), textcoords="offset points", fontsize=8.5)
    name = {"clip": "clip", "cap": "examples_cap"}[kind]
    plot.axhline(BAR, color="#555555", linewidth=1, linestyle=":")
    plot.axvline(0, color="#BBBBBB", linewidth=1)
    plot.set_title(f"{name} (default {chosen[0 if kind == 'clip' else 1]:g})")
    plot.set_xlabel("accuracy of honest, unequal clients: points above no bound")


def write_accuracies(found: Mapping[tuple[int, str, str], float], folder: Path) -> None:
    """Write the accuracy of whole federations under attack."""
    strategies = [name for name in CONTENDERS if any(key[2] == name for key in found)]
    table = []
    for attackers, attack in dict.fromkeys(key[:2] for key in found):
        values = [found.get((attackers, attack, name)) for name in strategies]
        table.append([attackers, attack, *("n/a" if value is None else f"{value:.3f}" for value in values)])
    about = (
        "Accuracy of the global model on SST-2's 872 held-out sentences: 10 clients with Dirichlet 1 shares train a "
        "LoRA module and a head on frozen sentence vectors, and the attackers attack in every round. Mean of the last "
        "three rounds. A constant answer has 0.509."
    )
    write_table(folder, "accuracy", ["attackers", "attack", *strategies], table, about)
