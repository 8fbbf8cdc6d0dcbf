"""Groups of runs that differ in their seed alone, and their common figures."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedfrom.pages import intervals
from fedfrom.pages.look import MISSING, clean
from fedfrom.pages.runs import Run, entries, mapping, number
from fedfrom.pages.strategies import strategy

# The seed, and options that no score depends on. A strategy does not depend on the other strategies of its run.
NO_SETTING = ("seed", "out", "verbose", "processes", "gpus_per_client", "glue_dir", "strategies")
UNSHOWN = ("out", "verbose", "processes", "gpus_per_client")
LONGEST_LABEL = 48


def run_data(run: Run) -> dict[str, Any]:
    """Return all data of one run on a page, as plain JSON."""
    found = run.found
    options = mapping(found.get("options"))
    return {
        "name": run.name,
        "seed": number(options.get("seed")),
        "clients": number(options.get("clients")),
        "metric": clean(found.get("metric", "score")),
        "constant-answer": number(found.get("constant-answer")),
        "target": number(found.get("target")),
        "tasks": [
            {
                "name": clean(task.get("name", "")),
                "metric": clean(task.get("metric", "")),
                "training-examples": number(task.get("training-examples")),
                "held-out-examples": number(task.get("held-out-examples")),
            }
            for task in map(mapping, entries(found.get("tasks")))
        ],
        "partition": [
            {"client": clean(share.get("client")), "examples": number(share.get("examples"))}
            for share in map(mapping, entries(found.get("partition")))
        ],
        "settings": _settings(found),
        "strategies": [strategy(run, label) for label in mapping(found["strategies"])],
    }


def _settings(found: Mapping[str, Any]) -> dict[str, str]:
    options = {name: value for name, value in mapping(found.get("options")).items() if name not in UNSHOWN}
    versions = {f"version of {name}": value for name, value in mapping(found.get("versions")).items()}
    sources = {
        f"source of {t['name']}": t.get("source") for t in map(mapping, entries(found.get("tasks"))) if "name" in t
    }
    return {clean(name): _setting(value) for name, value in {**options, **sources, **versions}.items()}


def _setting(value: Any) -> str:
    if value is None or value == "" or value == []:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return clean(", ".join(map(str, value)) if isinstance(value, list) else value)


def differing(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the settings that differ between the runs, with each run's value."""
    names = dict.fromkeys(name for run in runs for name in run["settings"])
    values = {name: [run["settings"].get(name, MISSING) for run in runs] for name in names}
    return {name: row for name, row in values.items() if len(set(row)) > 1}


@dataclass(frozen=True)
class Group:
    """Runs of the same settings, each with another seed.

    Attributes
    ----------
    label : str
        The settings or names that differ from the other groups'; empty where there is one group.
    runs : list[dict[str, Any]]
        From `run_data`, in the order given.
    """

    label: str
    runs: list[dict[str, Any]]

    def labels(self) -> list[str]:
        """Return the labels of all strategies of its runs."""
        return list(dict.fromkeys(entry["label"] for run in self.runs for entry in run["strategies"]))

    def of(self, label: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Return (run, strategy) for each run that has a strategy of this label."""
        return [(run, entry) for run in self.runs for entry in run["strategies"] if entry["label"] == label]


def group(runs: Sequence[Run], data: Sequence[dict[str, Any]]) -> list[Group]:
    """Return the runs in groups whose members differ in the seed alone. A repeated seed opens a further group.

    Two runs of one seed are not independent: an interval over both would be too narrow.
    """
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    seen: dict[tuple[str, float | None], int] = {}
    for run, about in zip(runs, data, strict=True):
        options = mapping(run.found.get("options"))
        settings = {name: value for name, value in options.items() if name not in NO_SETTING}
        key = json.dumps([settings, about["metric"], about["tasks"]], sort_keys=True)
        again = seen[key, about["seed"]] = seen.get((key, about["seed"]), -1) + 1
        found.setdefault((key, again), []).append(about)
    members = list(found.values())
    return [Group(label, runs) for label, runs in zip(_labels(members), members, strict=True)]


def _labels(members: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    if len(members) == 1:
        return [""]
    differ = {name: row for name, row in differing([runs[0] for runs in members]).items() if name not in NO_SETTING}
    settings = [", ".join(f"{name} {row[i]}" for name, row in differ.items()) for i in range(len(members))]
    names = [runs[0]["name"] + (f" and {len(runs) - 1} more" if len(runs) > 1 else "") for runs in members]
    told_apart = len(set(settings)) == len(settings) and max(map(len, settings)) <= LONGEST_LABEL
    return settings if told_apart else names


@dataclass(frozen=True)
class Line:
    """One strategy in one group: a line of a picture, a row of a table."""

    group: Group
    label: str
    name: str

    @property
    def strategy(self) -> str:
        """The strategy's name without the group's."""
        return self.entries[0]["name"]

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The strategy in each run."""
        return [entry for _, entry in self.group.of(self.label)]

    def values(self, pick: Callable[[dict[str, Any]], float | None]) -> list[float]:
        """Return the values of a quantity in the runs that have it."""
        return [value for entry in self.entries if (value := pick(entry)) is not None]

    def mean(self, pick: Callable[[dict[str, Any]], float | None]) -> intervals.Interval | None:
        """Return a quantity's mean over the runs that have it, with its interval; None where no run has it."""
        values = self.values(pick)
        return intervals.mean(values) if values else None

    def seconds(self, name: str) -> float | None:
        """Return the mean over the runs of one of the numbers under "seconds" of a strategy."""
        found = self.mean(lambda entry: entry["seconds"][name])
        return found.mean if found else None

    def curve(self, table: str, quantity: str) -> dict[str, list[Any]]:
        """Return a quantity by round: "x" the rounds that all runs have, "y" the means, "half-width" of the intervals.

        Parameters
        ----------
        table, quantity : str
            "by-round" or "merges" of a strategy, and one of its lists.

        Notes
        -----
        The half-width of a single run is None.
        """
        each = [
            {
                at: value
                for at, value in zip(_rounds(entry, table), entry[table][quantity], strict=True)
                if value is not None
            }
            for entry in self.entries
        ]
        each = [curve for curve in each if curve]
        shared = [at for at in each[0] if all(at in curve for curve in each)] if each else []
        means = [intervals.mean([curve[at] for curve in each]) for at in shared]
        return {
            "x": shared,
            "y": [found.mean for found in means],
            "half-width": [None if math.isnan(found.half_width) else found.half_width for found in means],
        }


def _rounds(entry: Mapping[str, Any], table: str) -> list[int]:
    return entry["merges"]["rounds"] if table == "merges" else entry["rounds"]


def lines(groups: Sequence[Group]) -> Iterator[Line]:
    """Yield every strategy of every group, under a name that no other has."""
    taken: dict[str, int] = {}
    for found in groups:
        for label in found.labels():
            name = found.of(label)[0][1]["name"] + (f": {found.label}" if found.label else "")
            name = clean(name, 2 * LONGEST_LABEL)
            taken[name] = taken.get(name, 0) + 1
            yield Line(found, label, name if taken[name] == 1 else f"{name} ({taken[name]})")


def against(line: Line, other: Line) -> intervals.Interval | None:
    """Return a line's final scores less another's of its group, paired by run; None without a pair."""
    finals = {run["name"]: entry["final"] for run, entry in other.group.of(other.label)}
    pairs = [
        (entry["final"], finals[run["name"]])
        for run, entry in line.group.of(line.label)
        if entry["final"] is not None and finals.get(run["name"]) is not None
    ]
    return intervals.paired(*zip(*pairs, strict=True)) if pairs else None
