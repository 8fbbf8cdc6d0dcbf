"""The sections of a page, in order, with their sentences, charts and tables."""

from collections.abc import Sequence
from typing import Any

from fedfrom.pages import charts
from fedfrom.pages.groups import Group, Line, against, differing
from fedfrom.pages.look import MISSING, shown
from fedfrom.pages.merges import agreement, truncation, weights
from fedfrom.pages.parts import OLD, Section, Table, reference, with_interval


def sections(runs: Sequence[dict[str, Any]], groups: Sequence[Group], lines: Sequence[Line]) -> list[Section]:
    """Return all sections of the page on these runs."""
    found = [
        comparison(groups, lines),
        scores(groups, lines),
        weights(groups),
        agreement(groups, lines),
        truncation(groups, lines),
        traffic(lines),
        seconds(lines),
        replies(runs),
        settings(runs),
    ]
    return [part if part.notes or part.charts or part.tables else _empty(part) for part in found]


def _empty(section: Section) -> Section:
    return Section(section.name, section.title, ["These results say nothing of this."])


def comparison(groups: Sequence[Group], lines: Sequence[Line]) -> Section:
    """Return the section that compares all strategies of all runs in one table."""
    rows = []
    for line in lines:
        unit = charts.unit_of(line.group.runs[0])
        other = next(it for it in lines if it.group is line.group and it.label == reference(line.group))
        reached = [
            "never" if entry["rounds-to-target"] is None else str(entry["rounds-to-target"]) for entry in line.entries
        ]
        rows.append(
            [
                line.name,
                str(len(line.entries)),
                with_interval(line.mean(lambda entry: entry["final"]), unit),
                MISSING if other is line else with_interval(against(line, other), unit, sign=True),
                with_interval(line.mean(lambda entry: entry["best"]), unit),
                reached[0] if len(set(reached)) == 1 else ", ".join(reached),
                _mean(line, "bytes-up", "bytes"),
                _mean(line, "bytes-down", "bytes"),
                shown(line.seconds("server-seconds"), "seconds"),
                shown(line.seconds("wall-seconds"), "seconds"),
                shown(line.seconds("overhead"), "percent"),
            ]
        )
    others = list(dict.fromkeys(line.name for line in lines if line.label == reference(line.group)))
    header = ["strategy", "runs", "final score", f"against {others[0] if len(others) == 1 else 'the reference'}"]
    header += ["best score", "rounds to the target", "bytes up", "bytes down", "merging", "wall time", "overhead"]
    targets = {shown(run["target"], charts.unit_of(run)) for group in groups for run in group.runs if run["target"]}
    notes = ["Scores are of the global model on held-out examples."]
    if len(targets) == 1:
        notes[0] += f" The target is {targets.pop()}."
    if any(len(group.runs) > 1 for group in groups):
        notes.append("± is half of a 95 % interval over seeds (Student's t); differences are paired by seed.")
    if len(others) > 1:
        notes.append("The reference is FedAvg of the same settings where it ran, else their first strategy.")
    notes.append(
        "Overhead is the share of the wall time in which neither the busiest client trained nor the server evaluated."
    )
    return Section("comparison", "All strategies", notes, [], [Table("Every strategy of every run", header, rows)])


def _mean(line: Line, name: str, unit: str) -> str:
    found = line.mean(lambda entry: entry[name])
    return shown(found.mean if found else None, unit)


def scores(groups: Sequence[Group], lines: Sequence[Line]) -> Section:
    """Return the section on the score by round."""
    drawn = charts.scores(lines)
    notes = []
    several = [group for group in groups if len(group.runs) > 1]
    if several:
        notes.append("Lines are means over seeds, bands their 95 % intervals (Student's t).")
    elif drawn:
        notes.append(
            "Every line is one run with one seed: another seed moves it, and there is no interval to say how far."
        )
    if len({id(line.group) for line in lines}) > charts.MOST_GROUPS and len(lines) > charts.MOST_LINES:
        notes.append(f"The first {charts.MOST_GROUPS} of {len(groups)} settings are drawn; the table above has all.")
    return Section("scores", "Score by round", notes, drawn)


def traffic(lines: Sequence[Line]) -> Section:
    """Return the section on the bytes of each round."""
    note = "Arrays with their headers, of all clients together, as the server's grid counted them."
    drawn = charts.traffic(lines)
    return Section("traffic", "Bytes", [note] if drawn else [], drawn)


def seconds(lines: Sequence[Line]) -> Section:
    """Return the section on the parts of the wall time."""
    drawn = charts.seconds(lines)
    notes = ["Training is that of the client process that trained longest; the rest is starting, sending and waiting."]
    left = [line.name for line in lines if not drawn or line.name not in drawn[0]["rows"]]
    if left:
        notes = [*(notes if drawn else []), f"What the seconds of {', '.join(left)} went into {OLD}."]
    header = ["strategy", "training", "evaluation", "merging", "the rest", "wall time"]
    names = ("training-seconds", "evaluation-seconds", "server-seconds", "rest-seconds", "wall-seconds")
    rows = [[line.name, *(shown(line.seconds(name), "seconds") for name in names)] for line in lines]
    return Section(
        "seconds", "Seconds", notes, drawn, [Table("Seconds of each strategy, mean over its runs", header, rows)]
    )


def replies(runs: Sequence[dict[str, Any]]) -> Section:
    """Return the section on the replies that were not merged, with the reasons."""
    rows, merged, silent, capped = [], 0, [], 0
    for run in runs:
        for entry in run["strategies"]:
            merged += sum(reply["merged"] for reply in entry["replies"])
            capped += sum(reply["examples-capped"] or 0 for reply in entry["replies"])
            rows += [row for reply in entry["replies"] for row in _lost(run, entry, reply)]
            if entry["replies"] or not entry["replied"]:
                continue
            silent.append(entry["name"])
            for at, count in entry["replied"].items():
                if run["clients"] is not None and count < run["clients"]:
                    left = f"{run['clients'] - count:.0f} of {run['clients']:.0f} clients"
                    rows.append([run["name"], entry["name"], at, "no reply", left, MISSING])
    lost = "the table has what was lost" if rows else "none was rejected, failed or missing"
    notes = [f"{merged:,} replies were merged; {lost}."]
    if not merged and not rows:
        notes = ["No strategy here reports what became of the replies."]
    if silent:
        names = ", ".join(dict.fromkeys(silent))
        notes.append(f"{names} reports no reasons: only how many clients were heard in each round is known.")
    if capped:
        notes.append(f"{capped:,.0f} replies counted for fewer examples than they said.")
    header = ["run", "strategy", "round", "what happened", "whose", "reason"]
    return Section(
        "replies", "Lost replies", notes, [], [Table("Replies that were not merged", header, rows)] if rows else []
    )


def _lost(run: dict[str, Any], entry: dict[str, Any], reply: dict[str, Any]) -> list[list[str]]:
    start = [run["name"], entry["name"], str(reply["round"])]
    rows = [[*start, kind, who, why] for kind in ("rejected", "failed") for who, why in reply[kind].items()]
    rows += [[*start, "missing", who, "no answer in time"] for who in reply["missing"]]
    if reply["skipped"]:
        rows.append([*start, "round skipped", "all", "the global model stayed as it was"])
    return rows


def settings(runs: Sequence[dict[str, Any]]) -> Section:
    """Return the section on the settings: those that differ between the runs, and all."""
    names = [run["name"] for run in runs]
    every = {name: [run["settings"].get(name, MISSING) for run in runs] for run in runs for name in run["settings"]}
    tables = []
    notes = []
    if not every:
        return Section("settings", "Settings", ["These results do not say with which settings they were made."])
    if len(runs) > 1:
        rows = [[name, *row] for name, row in differing(runs).items()]
        if rows:
            tables.append(Table("Settings that differ between the runs", ["setting", *names], rows))
        else:
            notes.append("All runs have the same settings, the seed too.")
    rows = [[name, *row] for name, row in every.items()]
    tables.append(Table("All settings", ["setting", *names], rows, folded=True))
    return Section("settings", "Settings", notes, [], tables)
