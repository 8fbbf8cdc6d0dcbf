"""The data of each picture as plain JSON: fedfrom.pages.figures draws it, and the page's data block holds it.

Every chart has a "name" (of its file), a "kind", a "title", "x-label", "y-label", and the "unit" of its values (see
`look.shown`). Further keys by kind:
- "lines" and "columns": "series", each with "label", "x", "y", and optionally "half-width" and "place" (index of its
  colour, the same in all pictures); optionally "levels", each with "label" and "y".
- "heat": "rows" and "columns" (labels), "values" (rows × columns, None where unknown), "low" and "high".
- "stack": "rows" (labels) and "parts", each with "label" and "values" by row.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from fedfrom.pages.groups import Group, Line
from fedfrom.pages.look import percent, shown

Chart = dict[str, Any]
MOST_LINES = 8  # in one picture; with more lines each group has a picture
MOST_GROUPS = 6  # with pictures; the tables have all groups
MOST_FIRST_RUNS = 3  # groups whose strategies have pictures of their own
MOST_STRATEGIES = 6  # of a group with pictures of their own
CORRELATIONS = ("matthews", "pearson", "spearman", "correlation")


def unit_of(run: dict[str, Any]) -> str:
    """Return the unit of a run's scores: "percent" for shares, "number" for correlations."""
    said = " ".join([run["metric"], *(task["metric"] for task in run["tasks"])]).lower()
    return "number" if any(name in said for name in CORRELATIONS) else "percent"


def scores(lines: Sequence[Line]) -> list[Chart]:
    """Return the score by round with a line for each strategy; runs with different metrics have different pictures."""
    alike = len({(line.group.runs[0]["metric"], unit_of(line.group.runs[0])) for line in lines}) == 1
    charts = []
    for suffix, label, members in _panels(lines, alike):
        run = members[0].group.runs[0]
        metric = run["metric"] if len(run["metric"]) < 40 else "mean of the tasks' metrics"
        levels = {
            f"a constant answer: {shown(at['constant-answer'], unit_of(at))}": at["constant-answer"]
            for at in [line.group.runs[0] for line in members]
            if at["constant-answer"] is not None
        }
        chart = _by_round(
            f"score{suffix}", f"{metric[:1].upper()}{metric[1:]} by round{label}", members, "by-round", "score"
        )
        if chart:
            chart |= {"y-label": metric, "unit": unit_of(run)}
            chart["levels"] = [{"label": name, "y": y} for name, y in levels.items()] if len(levels) == 1 else []
            charts.append(chart)
    return charts


def by_round(lines: Sequence[Line], name: str, title: str, table: str, quantity: str, **more: Any) -> list[Chart]:
    """Return a quantity by round with a line for each strategy that has it; an empty list where no strategy has it."""
    charts = [
        _by_round(f"{name}{suffix}", f"{title}{label}", members, table, quantity)
        for suffix, label, members in _panels(lines, True)
    ]
    return [{**chart, **more} for chart in charts if chart]


def _by_round(name: str, title: str, lines: Sequence[Line], table: str, quantity: str) -> Chart | None:
    alone = len({id(line.group) for line in lines}) == 1  # the title names the group
    series = [
        {"label": line.strategy if alone else line.name, "place": i, **line.curve(table, quantity)}
        for i, line in enumerate(lines)
    ]
    series = [found for found in series if found["x"]]
    if not series:
        return None
    return {"name": name, "kind": "lines", "title": title, "x-label": "round", "unit": "number", "series": series}


def _panels(lines: Sequence[Line], alike: bool) -> Iterator[tuple[str, str, Sequence[Line]]]:
    """Yield the lines that share a picture, with the ends of the picture's file name and title."""
    if alike and len(lines) <= MOST_LINES:
        yield "", "", lines
        return
    groups: dict[int, list[Line]] = {}
    for line in lines:
        groups.setdefault(id(line.group), []).append(line)
    for position, members in enumerate(list(groups.values())[:MOST_GROUPS], 1):
        label = members[0].group.label
        yield f"-{position}", f" ({label})" if label else "", members


def traffic(lines: Sequence[Line]) -> list[Chart]:
    """Return the bytes that all clients of a round sent, and the bytes that were sent to them."""
    charts = []
    for way, words in (("up", "Bytes sent by all clients"), ("down", "Bytes sent to all clients")):
        for chart in by_round(lines, f"bytes-{way}", f"{words}, by round", "by-round", f"bytes-{way}", unit="bytes"):
            for series in chart["series"]:  # nothing is sent before the first round
                kept = [i for i, at in enumerate(series["x"]) if at]
                series |= {key: [series[key][i] for i in kept] for key in ("x", "y", "half-width")}
            charts.append({**chart, "kind": "columns", "y-label": f"bytes {way}"})
    return charts


def seconds(lines: Sequence[Line]) -> list[Chart]:
    """Return the parts of each strategy's wall time, mean over its runs."""
    parts = {
        "training": "training-seconds",
        "evaluation": "evaluation-seconds",
        "merging": "server-seconds",
        "the rest": "rest-seconds",
    }
    means = {line.name: [line.seconds(part) for part in parts.values()] for line in lines}
    whole = {name: row for name, row in means.items() if None not in row}
    if not whole:
        return []
    return [
        {
            "name": "seconds",
            "kind": "stack",
            "title": "Where the seconds went",
            "x-label": "seconds",
            "unit": "seconds",
            "rows": list(whole),
            "parts": [{"label": part, "values": [row[i] for row in whole.values()]} for i, part in enumerate(parts)],
        }
    ]


def chosen(groups: Sequence[Group]) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """Yield the strategies that have pictures of their own, from each group's first run.

    Each is (end of its file names, end of its titles, run, strategy).
    """
    for position, group in enumerate(groups[:MOST_FIRST_RUNS], 1):
        run = group.runs[0]
        several = len(groups) > 1 or len(group.runs) > 1
        for i, entry in enumerate(run["strategies"][:MOST_STRATEGIES], 1):
            suffix = f"-{position}-{i}" if several else f"-{i}"
            yield suffix, f"{entry['name']}, run {run['name']}" if several else entry["name"], run, entry


def weights(groups: Sequence[Group]) -> list[Chart]:
    """Return each client's weight by round, mean over layers."""
    charts = []
    for suffix, title, run, entry in chosen(groups):
        found = entry["weights"]
        known = [value for row in found["values"] for value in row if value is not None]
        if not known:
            continue
        examples = {share["client"]: share["examples"] for share in run["partition"] if share["examples"] is not None}
        total = sum(examples.values())
        charts.append(
            {
                "name": f"weights{suffix}",
                "kind": "heat",
                "title": f"Weight of each client: {title}",
                "x-label": "round",
                "y-label": "client (its share of the examples)" if total else "client",
                "unit": "percent",
                "rows": [
                    f"{client} ({percent(examples[client] / total)})" if total and client in examples else client
                    for client in found["clients"]
                ],
                "columns": list(map(str, found["rounds"])),
                "values": found["values"],
                "low": 0.0,
                "high": max(known),
            }
        )
    return charts


def cosines(groups: Sequence[Group]) -> list[Chart]:
    """Return the cosines of the clients' whole updates in the last round that was merged."""
    charts = []
    for suffix, title, _, entry in chosen(groups):
        last = entry["last-merge"]
        if last is None or not last["cosines"]:
            continue
        charts.append(
            {
                "name": f"cosines{suffix}",
                "kind": "heat",
                "title": f"Do clients pull the same way? {title}, round {last['round']}",
                "x-label": "client",
                "y-label": "client",
                "unit": "number",
                "rows": last["clients"],
                "columns": last["clients"],
                "values": last["cosines"],
                "low": -1.0,
                "high": 1.0,
            }
        )
    return charts


def spectra(groups: Sequence[Group]) -> list[Chart]:
    """Return the singular values of each module of the final adapters."""
    return [
        {
            "name": f"spectrum{suffix}",
            "kind": "lines",
            "title": f"Singular values of the final adapter: {title}",
            "x-label": "place, largest first",
            "y-label": "singular value",
            "unit": "number",
            "log": True,
            "series": [
                {"label": name, "x": list(range(1, len(values) + 1)), "y": values}
                for name, values in zip(_short(list(entry["spectra"])), entry["spectra"].values(), strict=True)
            ],
        }
        for suffix, title, _, entry in chosen(groups)
        if entry["spectra"]
    ]


def _short(names: Sequence[str]) -> list[str]:
    """Return names of modules without their common first parts."""
    parts = [name.split(".") for name in names]
    shared = next((i for i, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1), 0)
    return [".".join(part[shared:]) for part in parts]


def alternative(chart: Chart) -> str:
    """Return a picture's content in words: the alternative text of the image."""
    unit = chart["unit"]
    if chart["kind"] == "heat":
        known = [value for row in chart["values"] for value in row if value is not None]
        size = f"{len(chart['rows'])} rows ({chart['y-label']}) by {len(chart['columns'])} columns ({chart['x-label']})"
        bounds = f", from {shown(min(known), unit)} to {shown(max(known), unit)}" if known else ""
        return f"Heat map, {size}{bounds}. {chart['title']}. The table below has every value."
    if chart["kind"] == "stack":
        rows = [
            f"{row}: " + ", ".join(f"{part['label']} {shown(part['values'][i], unit)}" for part in chart["parts"])
            for i, row in enumerate(chart["rows"][:MOST_LINES])
        ]
        return f"Stacked bars. {chart['title']}. {'; '.join(rows)}."
    first = [
        f"{line['label']} from {shown(line['y'][0], unit)} to {shown(line['y'][-1], unit)}"
        for line in chart["series"][:MOST_LINES]
        if line["y"]
    ]
    more = len(chart["series"]) - MOST_LINES
    kind = "Columns" if chart["kind"] == "columns" else "Lines"
    return f"{kind}. {chart['title']}. {'; '.join(first)}{f'; and {more} more' if more > 0 else ''}."
