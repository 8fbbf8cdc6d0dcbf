"""Draws the charts of fedfrom.pages.charts."""

import io
import textwrap
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from fedfrom.pages.canvas import write_values
from fedfrom.pages.look import COLOURS, MARKERS, STYLE, clean, percent, shown

# Colours of text and grid. No other part has them: replacing them in the light picture gives the dark one.
INK, GRID = "#1b1f24", "#e2e5e9"
DARK = {INK: "#e6e9ed", GRID: "#3a4048", "#0072b2": "#4aa8e8", "#000000": "#f4f4f4"}
LINE_STYLES = ("-", "--", ":", "-.")
MOST_IN_LEGEND = 8
MOST_CELLS = 144  # of a heat map with a number in each cell
MOST_COLUMNS = 48
LONGEST_TICK = 32
LONGEST_ENTRY = 64  # characters of a legend's entry
WIDTH = 5.2  # inches: small, so that text stays readable on a telephone


def draw(chart: dict[str, Any]) -> tuple[bytes, str, str]:
    """Return a chart as PNG with title and white background, and as SVG without both, for light and for dark pages."""
    kinds = {"lines": _lines, "columns": _columns, "heat": _heat, "stack": _stack}
    style = {
        **STYLE,
        **{f"{name}color": INK for name in ("text.", "axes.edge", "axes.label", "xtick.", "ytick.")},
        "grid.color": GRID,
        "text.parse_math": False,  # a "$" in a label is a dollar
        "svg.fonttype": "none",
        "svg.hashsalt": chart["name"],  # the same chart gives the same bytes
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(WIDTH, 3.3), dpi=130, layout="constrained")
        try:
            kinds[chart["kind"]](figure, axes, chart)
            png, svg = io.BytesIO(), io.StringIO()
            figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
            # The page has the title as text. The layout is kept: computing it takes half of the time.
            figure.set_layout_engine("none")
            axes.set_title("\n".join(textwrap.wrap(clean(chart["title"], 160), 66)), fontsize=11, pad=10)
            figure.savefig(png, format="png", bbox_inches="tight", metadata={"Software": None})
        finally:
            plt.close(figure)
    light = dark = svg.getvalue()
    for colour, replacement in DARK.items():
        dark = dark.replace(colour, replacement)
    return png.getvalue(), light, dark


def _lines(figure: Figure, axes: Axes, chart: dict[str, Any]) -> None:
    many = len(chart["series"]) > MOST_IN_LEGEND
    for position, line in enumerate(chart["series"]):
        place = line.get("place", position)
        colour: Any = COLOURS[place % len(COLOURS)]
        if many:  # colours show the order of the lines alone
            colour = plt.get_cmap("viridis")(0.3 + 0.6 * position / max(len(chart["series"]) - 1, 1))
        axes.plot(
            line["x"],
            line["y"],
            color=colour,
            marker=MARKERS[place % len(MARKERS)] if len(line["x"]) <= 30 else None,
            markersize=4 if many else 6,
            linestyle=LINE_STYLES[place // len(COLOURS) % len(LINE_STYLES)] if not many else "-",
            linewidth=1.2 if many else 2,
            alpha=0.8 if many else 1,
            label=_label(line["label"]),
            clip_on=False,
        )
        half = line.get("half-width")
        if half and all(width is not None for width in half):
            low, high = np.array(line["y"]) - half, np.array(line["y"]) + half
            axes.fill_between(line["x"], low, high, color=colour, alpha=0.15, linewidth=0)
    for level in chart.get("levels", []):
        axes.axhline(level["y"], color=INK, linestyle=(0, (4, 3)), linewidth=1, label=_label(level["label"]))
    if chart.get("log") and any(value > 0 for line in chart["series"] for value in line["y"]):
        axes.set_yscale("log", nonpositive="mask")
        # LogFormatter writes mathematics, which is switched off for all labels
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif not chart.get("log"):
        _format(axes.yaxis, chart)
    if chart.get("from-zero"):
        axes.set_ylim(0, max(axes.get_ylim()[1], 1e-3))
    _round_axis(axes, chart)
    _legend(figure, axes, many)


def _columns(figure: Figure, axes: Axes, chart: dict[str, Any]) -> None:
    if sum(len(line["x"]) for line in chart["series"]) > MOST_COLUMNS:
        _lines(figure, axes, {**chart, "from-zero": True})
        return
    width = 0.8 / len(chart["series"])
    for position, line in enumerate(chart["series"]):
        at = [x - 0.4 + width * (position + 0.5) for x in line["x"]]
        colour = COLOURS[line["place"] % len(COLOURS)]
        axes.bar(at, line["y"], 0.92 * width, color=colour, label=_label(line["label"]))
    axes.grid(axis="x", visible=False)
    _format(axes.yaxis, chart)
    _round_axis(axes, chart)
    _legend(figure, axes, False)


def _stack(figure: Figure, axes: Axes, chart: dict[str, Any]) -> None:
    figure.set_size_inches(WIDTH, 1.8 + 0.42 * len(chart["rows"]))
    start = np.zeros(len(chart["rows"]))
    for part, colour in zip(chart["parts"], (COLOURS[0], COLOURS[5], COLOURS[2], COLOURS[7]), strict=False):
        axes.barh(range(len(start)), part["values"], left=start, color=colour, height=0.66, label=_label(part["label"]))
        start += np.array(part["values"])
    rows = ["\n".join(textwrap.wrap(clean(row, 2 * LONGEST_TICK), 24)[:3]) for row in chart["rows"]]
    axes.set_yticks(range(len(start)), rows, fontsize=9)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(chart["x-label"])
    _legend(figure, axes, False, columns=4)


def _heat(figure: Figure, axes: Axes, chart: dict[str, Any]) -> None:
    rows = len(chart["rows"])
    diverging = chart["low"] < 0
    figure.set_size_inches(WIDTH, min(4.6, max(3.0, 1.4 + 0.36 * rows)))
    values = np.array([[np.nan if value is None else value for value in row] for row in chart["values"]], dtype=float)
    image = axes.imshow(
        np.ma.masked_invalid(values),
        aspect="equal" if diverging else "auto",
        cmap="RdBu" if diverging else "viridis",
        vmin=chart["low"],
        vmax=max(chart["high"], chart["low"] + 1e-12),
        interpolation="nearest",
    )
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if values.size <= MOST_CELLS:
        write_values(axes, image, percent if chart["unit"] == "percent" else "{:.2f}".format)
    form = PercentFormatter(1.0) if chart["unit"] == "percent" else None
    figure.colorbar(image, ax=axes, format=form, shrink=0.9).outline.set_visible(False)
    for ticks, labels, most in ((axes.set_yticks, chart["rows"], 24), (axes.set_xticks, chart["columns"], 14)):
        step = -(-len(labels) // most)
        ticks(range(0, len(labels), step), [clean(label, LONGEST_TICK) for label in labels[::step]])
    axes.set_xlabel(chart["x-label"])
    axes.set_ylabel(chart["y-label"])


def _label(text: str) -> str:
    """Return a legend's label with a zero-width space before an underscore: matplotlib drops labels that start so."""
    return f"\u200b{text}" if text.startswith("_") else text


def _format(axis: Any, chart: dict[str, Any]) -> None:
    unit = chart["unit"]
    if unit == "percent":
        axis.set_major_formatter(PercentFormatter(1.0))
    elif unit == "bytes":
        axis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, unit)))


def _round_axis(axes: Axes, chart: dict[str, Any]) -> None:
    axes.set_xlabel(chart["x-label"])
    axes.set_ylabel(chart.get("y-label", ""))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _legend(figure: Figure, axes: Axes, many: bool | None, columns: int = 2) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if many or len(labels) < 1:
        return
    labels = [clean(label, LONGEST_ENTRY) for label in labels]
    longest = max(map(len, labels))
    columns = 1 if longest > 36 else columns
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9)
    if -(-len(labels) // columns) > 4:
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + 0.17 * (-(-len(labels) // columns) - 4))
