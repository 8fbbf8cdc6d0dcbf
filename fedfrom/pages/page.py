"""The HTML of a page: one file that loads nothing, runs no script, and escapes whatever comes from a results file."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from fedfrom.pages.charts import Chart, alternative
from fedfrom.pages.look import MISSING, clean, shown
from fedfrom.pages.parts import Section, Table

# Even if something were to slip through the escaping, the browser would neither run nor fetch it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --paper: #ffffff; --card: #f6f8fa; --line: #d5dae0;
  --link: #0058a3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #a3acb6; --paper: #14171b; --card: #1d2126;
  --line: #3a4048; --link: #7cbcf5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main, header, footer { max-width: 76rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; padding-top: .8rem; border-top: 1px solid var(--line); }
p { margin: .4rem 0; max-width: 52rem; overflow-wrap: anywhere; }
.summary { font-size: 1.12rem; padding: .8rem 1rem; background: var(--card); border-left: 4px solid var(--link);
  max-width: none; }
a { color: var(--link); }
nav ul { list-style: none; margin: .8rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; }
.soft, caption { color: var(--soft); font-size: .92rem; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .4rem; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 32rem), 1fr)); gap: 1rem;
  margin: 1rem 0; align-items: start; }
figure { margin: 0; padding: .6rem; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  min-width: 0; }
figure img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; margin: .6rem 0; }
details .scroll { max-height: 32rem; overflow-y: auto; }
.scroll:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; }
td { white-space: nowrap; }
thead th { vertical-align: bottom; }
th:first-child, .words td, .words th { text-align: left; }
tbody th { font-weight: 600; min-width: 9rem; max-width: 24rem; overflow-wrap: anywhere; }
.words td { max-width: 26rem; overflow-wrap: anywhere; white-space: normal; }
summary { cursor: pointer; color: var(--link); margin: .3rem 0; }
footer { padding: 1.5rem 1rem 2.5rem; }
@media print { details { display: none; } figure { break-inside: avoid; } }
"""


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
        Whose charts all have a picture.
    pictures : Mapping[str, tuple[str, str]]
        Name of a chart -> its SVG for light and for dark pages.
    data : Mapping[str, Any]
        What the data block holds, as plain JSON.
    made_by : str
        What made the page, for its end.
    """
    links = "".join(f'<li><a href="#{_id(part)}">{_text(part.title)}</a></li>' for part in sections)
    body = "\n".join(_section(part, pictures) for part in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{_text(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{_text(title)}</h1>
<p class="summary" id="summary">{_text(summary, 2000)}</p>
<nav aria-label="Contents"><ul>{links}</ul></nav>
</header>
<main>
{body}
</main>
<footer class="soft"><p>{_text(made_by)} The page's data block has every number drawn, as JSON.</p></footer>
<script type="application/json" id="data">{embedded(data)}</script>
</body>
</html>
"""


def embedded(data: Mapping[str, Any]) -> str:
    """Return JSON that can stand in a script element: no "<", so that nothing in it ends the element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _text(value: Any, longest: int = 400) -> str:
    return escape(clean(value, longest))


def _id(section: Section) -> str:
    return escape(section.name)


def _section(section: Section, pictures: Mapping[str, tuple[str, str]]) -> str:
    parts = [f'<section id="{_id(section)}" aria-labelledby="{_id(section)}-title">']
    parts.append(f'<h2 id="{_id(section)}-title">{_text(section.title)}</h2>')
    parts += [f"<p>{_text(note, 1000)}</p>" for note in section.notes]
    if section.charts:
        parts.append('<div class="charts">')
        parts += [_figure(chart, *pictures[chart["name"]]) for chart in section.charts]
        parts.append("</div>")
    parts += [_table(table) for table in section.tables]
    return "\n".join([*parts, "</section>"])


def _figure(chart: Chart, light: str, dark: str) -> str:
    numbers = _table(chart_table(chart), "The numbers as a table")
    return (
        f'<figure id="chart-{escape(chart["name"])}"><figcaption>{_text(chart["title"])}</figcaption><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{_uri(dark)}">'
        f'<img src="{_uri(light)}" alt="{_text(alternative(chart), 1500)}"></picture>\n'
        f"{numbers}</figure>"
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


def _table(table: Table, opener: str = "") -> str:
    numeric = all(cell[:1] in "0123456789+-−–" or cell == "never" for row in table.rows for cell in row[1:])
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in table.header)
    rows = "\n".join(
        f'<tr><th scope="row">{_text(row[0])}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in row[1:])}</tr>'
        for row in table.rows
    )
    caption = _text(table.caption)
    found = (
        # focusable, so that a keyboard can scroll it
        f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0">'
        f"<table{'' if numeric else ' class=words'}><caption>{caption}</caption>"
        f"<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
    )
    return f"<details><summary>{opener or caption}</summary>{found}</details>" if table.folded else found
