"""The HTML of a page: one file without scripts and without links to other files; all texts are escaped."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedfrom.pages.charts import Chart, alternative
from fedfrom.pages.look import MISSING, clean, shown
from fedfrom.pages.parts import Section, Table
from fedfrom.pages.template import STYLE, TEMPLATE


def render(
    title: str,
    summary: str,
    sections: Sequence[Section],
    pictures: Mapping[str, tuple[str, str]],
    data: Mapping[str, Any],
    made_by: str,
) -> str:
    """Return the page.

    Parameters
    ----------
    title, summary : str
        Plain text.
    sections : Sequence[Section]
        The page's sections. Each of their charts has a picture.
    pictures : Mapping[str, tuple[str, str]]
        Name of a chart -> its SVG for light and for dark pages.
    data : Mapping[str, Any]
        Content of the data block, as plain JSON.
    made_by : str
        Name of the program, for the end of the page.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {
        "line": lambda text, longest=400: clean(text, longest),
        "uri": _uri,
        "alternative": alternative,
        "chart_table": chart_table,
    }
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment.from_string(TEMPLATE).render(
        title=title,
        summary=summary,
        sections=sections,
        pictures=pictures,
        data=data,
        made_by=made_by,
        style=STYLE,
    )


def _uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii")


def chart_table(chart: Chart) -> Table:
    """Return a chart's numbers as a table."""
    unit = chart["unit"]
    if chart["kind"] == "heat":
        rows = [
            [row, *(shown(value, unit) for value in values)]
            for row, values in zip(chart["rows"], chart["values"], strict=True)
        ]
        return Table(
            chart["title"], [f"{chart['y-label']} \\ {chart['x-label']}", *chart["columns"]], rows, folded=True
        )
    if chart["kind"] == "stack":
        names = [part["label"] for part in chart["parts"]]
        rows = [[row, *(shown(p["values"][i], unit) for p in chart["parts"])] for i, row in enumerate(chart["rows"])]
        return Table(chart["title"], ["", *names], rows, folded=True)
    at = sorted({x for line in chart["series"] for x in line["x"]})
    rows = [[line["label"], *_points(line, at, unit)] for line in chart["series"]]
    return Table(chart["title"], [chart["x-label"], *map(str, at)], rows, folded=True)


def _points(line: Mapping[str, Any], at: Iterable[int], unit: str) -> list[str]:
    halves = line.get("half-width") or [None] * len(line["x"])
    points = {
        x: shown(y, unit) if half is None else f"{shown(y, unit)} ± {shown(half, unit)}"
        for x, y, half in zip(line["x"], line["y"], halves, strict=True)
    }
    return [points.get(x, MISSING) for x in at]
