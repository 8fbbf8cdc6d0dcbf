"""Pictures of what was measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from benchmarks.attacks.contenders import CONTENDERS, FEDFROM
from benchmarks.attacks.tables import BAR
from fedfrom.pages.canvas import canvas
from fedfrom.pages.look import COLOURS, MARKERS

NEAREST = 1e-4  # of 1 - cosine: the lower end of the axis
NINTH = ("#7A3E9D", "h")


def draw_scales(curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], path: Path) -> None:
    """Draw 1 - cosine against the scale of a sign-flip: a panel for each title, a line for each strategy."""
    with canvas(path, columns=len(curves), figsize=(5 * len(curves), 5), sharey=True) as (figure, axes):
        for plot, (title, lines) in zip(axes[0], curves.items(), strict=True):
            _draw_lines(plot, title, lines)
        axes[0, 0].set_ylabel("1 − cosine to the honest merge\n(0: nothing lost, 2: opposite)")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5)


def _draw_lines(plot: Axes, title: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    for name, points in lines.items():
        position, own = list(CONTENDERS).index(name), name.startswith(FEDFROM)
        plot.plot(
            [x for x, _ in points],
            [max(1 - y, NEAREST) for _, y in points],
            color=(*COLOURS, NINTH[0])[position],
            marker=(*MARKERS, NINTH[1])[position],
            linestyle="-" if own else "--",
            linewidth=2.4 if own else 1.3,
            markersize=5,
            label=name,
        )
    plot.axhline(1 - BAR, color="#555555", linewidth=1, linestyle=":")
    plot.set_xscale("log")
    plot.set_yscale("log")
    plot.set_ylim(NEAREST / 1.5, 3)
    plot.set_xlabel("scale of the attackers' sign-flip")
    plot.set_title(title)


def draw_tradeoff(table: pd.DataFrame, chosen: tuple[float | None, float | None], path: Path) -> None:
    """Draw the table of `tables.tradeoff`; `chosen` are FedFroM's (clip, examples_cap)."""
    options = {"figsize": (10.5, 7), "sharex": "col", "sharey": "row", "height_ratios": (3, 2)}
    with canvas(path, 2, 2, **options) as (figure, axes):
        for column, kind in enumerate(("clip", "cap")):
            _draw_setting(axes[:, column], table[table["setting"] == kind])
            default = "None" if chosen[column] is None else f"{chosen[column]:g}"
            axes[0, column].set_title(f"{('clip', 'examples_cap')[column]}: {default} by default")
            axes[1, column].set_xlabel(("times the median norm", "times the median number of examples")[column])
        axes[0, 0].set_ylabel("lowest cosine, one attacker of 10")
        axes[1, 0].set_ylabel("accuracy of honest clients,\npoints above no bound")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)


def _draw_setting(axes: Sequence[Axes], rows: pd.DataFrame) -> None:
    places = range(len(rows))
    lines = {
        "lowest cosine": "any untargeted attack",
        "flip at the bound": "sign-flip as large as counts in full",
        "flip with 1e12 examples": "sign-flip that claims 1e12 examples",
    }
    for position, (column, label) in enumerate(lines.items()):
        values = pd.to_numeric(rows[column], errors="coerce")
        axes[0].plot(places, values, color=COLOURS[position], marker=MARKERS[position], linewidth=1.8, label=label)
    axes[0].axhline(BAR, color="#555555", linewidth=1, linestyle=":")
    means, errors = ([100 * getattr(one, name) for one in rows["difference"]] for name in ("mean", "half_width"))
    axes[1].errorbar(places, means, errors, color="#000000", marker="o", linestyle="none", capsize=3)
    axes[1].axhline(0, color="#555555", linewidth=1)
    axes[1].set_xticks(places, rows["value"])
