"""The pictures of one kind: methods and bounds, sweeps, checkpoints, interference."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from fedfrom.pages import intervals
from fedfrom.pages.canvas import canvas
from fedfrom.pages.look import COLOURS, MARKERS
from simulations.studies.paper.cells import BASE, POOLED
from simulations.studies.paper.findings import COLUMNS, KIND_NAMES, OWN, Findings, correlations, points
from simulations.studies.paper.grids import ALPHAS, KS_FIGURE, KS_PAIRS
from simulations.studies.paper.options import CHECKPOINTS, CHECKPOINTS_OF, TASKS
from simulations.studies.tables import MEAN, by_seed, interval

LEVELS = {BASE: ("#555555", ":"), OWN: ("#555555", "--"), POOLED: ("#555555", "-")}
TITLES = {**{task: task.upper() for task in TASKS}, MEAN: "mean of the tasks"}


def draw_all(found: Findings, folder: Path) -> None:
    """Draw every picture of one kind."""
    for name, draw in {
        "table3": _table_3,
        "table5-alpha": _alphas,
        "figure5-k": _ks,
        "figure4-checkpoints": _checkpoints,
        "interference": _interference,
    }.items():
        draw(found, folder / f"{name}-{found.kind}.png")


def _dots(axes: Axes, names: Sequence[str], means: Sequence[intervals.Interval], bounds: int) -> None:
    """Draw a dot with its interval for each row, from the top; the first `bounds` rows are grey."""
    for position, one in enumerate(means):
        colour = "#555555" if position < bounds else COLOURS[1] if names[position].startswith("from") else COLOURS[0]
        error = None if np.isnan(one.half_width) else one.half_width
        axes.errorbar(one.mean, position, xerr=error, fmt="o", color=colour, markersize=5, capsize=2.5, linewidth=1.3)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.axhline(bounds - 0.5, color="#AAAAAA", linewidth=0.8)


def _table_3(found: Findings, path: Path) -> None:
    scores, bounds = found.scores(), found.bounds().method.nunique()
    names = list(scores.index.unique(level=0))
    size = (12, 1.6 + 0.27 * len(names))
    with canvas(path, columns=len(COLUMNS), dpi=130, figsize=size, sharey=True) as (figure, panels):
        for axes, column in zip(panels[0], COLUMNS, strict=True):
            _dots(axes, names, [interval(scores, name, column) for name in names], bounds)
            axes.set_title(TITLES[column])
            axes.set_xlabel("accuracy")
        panels[0, 0].set_yticks(range(len(names)), names)
        figure.suptitle(f"Merging {', '.join(map(str.upper, TASKS))}: {KIND_NAMES[found.kind]}, {_seeds(found)}")


def _seeds(found: Findings) -> str:
    count = len(found.seeds)
    return f"mean and 95 % interval over {count} seeds" if count > 1 else "one seed"


def _lines(axes: Axes, positions: Sequence[float], sweep: pd.DataFrame, ticks: Sequence[float]) -> None:
    for number, column in enumerate(COLUMNS):
        means = [interval(sweep, tick, column) for tick in ticks]
        centre, half = np.array([one.mean for one in means]), np.array([one.half_width for one in means])
        width = 2.4 if column == MEAN else 1.4
        band = column == MEAN and not np.isnan(half).any()
        label = f"{TITLES[column]}, 95 % interval" if band else TITLES[column]
        colour, marker = ("#000000", "o") if column == MEAN else (COLOURS[number], MARKERS[number + 1])
        axes.plot(positions, centre, color=colour, marker=marker, linewidth=width, markersize=5, label=label)
        if band:
            axes.fill_between(positions, centre - half, centre + half, color=colour, alpha=0.12, linewidth=0)


def _levels(axes: Axes, found: Findings) -> None:
    scores = found.scores()
    for name, (colour, style) in LEVELS.items():
        level = interval(scores, name).mean
        axes.axhline(level, color=colour, linestyle=style, linewidth=1.2, label=f"{name} (mean)")


def _sweep(found: Findings, path: Path, part: str, ticks: Sequence[float], title: str, label: str) -> None:
    with canvas(path, dpi=130, figsize=(8, 4.6)) as (_, ((axes,),)):
        positions = list(range(len(ticks)))
        _lines(axes, positions, found.sweep(part), ticks)
        _levels(axes, found)
        axes.set_xticks(positions, [f"{tick:g}" for tick in ticks])
        axes.set_xlabel(label)
        axes.set_ylabel("accuracy, reported half")
        axes.set_title(f"{title}, {KIND_NAMES[found.kind]}")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)


def _alphas(found: Findings, path: Path) -> None:
    _sweep(found, path, "alpha", ALPHAS, "Task Arithmetic by its coefficient", "alpha")


def _ks(found: Findings, path: Path) -> None:
    _sweep(found, path, "k", KS_FIGURE, "FroM by k", "k (0 is the mean)")


def _checkpoints(found: Findings, path: Path) -> None:
    scores = by_seed(found.part("checkpoints"), "method", (CHECKPOINTS_OF,))
    names = list(scores.index.unique(level=0))
    means = [interval(scores, name) for name in names]
    with canvas(path, dpi=130, figsize=(7.5, 1.4 + 0.27 * len(names))) as (_, ((axes,),)):
        _dots(axes, names, means, len(CHECKPOINTS))
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("accuracy, reported half")
        axes.set_title(f"Three checkpoints of {CHECKPOINTS_OF.upper()} merged, {KIND_NAMES[found.kind]}")


def _interference(found: Findings, path: Path) -> None:
    every, spearman = points(found), correlations(found)
    labels = {
        "interference": "interference: share of weighted energy lost",
        "misalignment": "misalignment: mean of 1 - cos(merge, update)",
    }
    groups = list(dict.fromkeys(point.tasks for point in every))
    with canvas(path, columns=len(labels), dpi=130, figsize=(1.5 + 5 * len(labels), 4.8), sharey=True) as (
        figure,
        (panels,),
    ):
        for axes, (name, label) in zip(panels, labels.items(), strict=True):
            for number, k in enumerate(KS_PAIRS):
                for mark, tasks in enumerate(groups):
                    some = [point for point in every if point.k == k and point.tasks == tasks]
                    xs, ys = [getattr(point, name) for point in some], [point.lost for point in some]
                    axes.scatter(xs, ys, color=COLOURS[number], marker=MARKERS[mark], alpha=0.8, s=32)
            one = spearman[name, "all k"]
            axes.set_title(f"Spearman {'undefined' if one is None else one}", fontweight="normal")
            axes.set_xlabel(label)
            axes.axhline(0, color="#555555", linewidth=0.8)
        panels[0].set_ylabel("accuracy lost by merging, mean over its tasks")
        for number, k in enumerate(KS_PAIRS):
            panels[-1].scatter([], [], color=COLOURS[number], label=f"k = {k:g}")
        for mark, tasks in enumerate(groups):
            panels[-1].scatter([], [], color="#555555", marker=MARKERS[mark], label=", ".join(tasks).upper())
        panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
        figure.suptitle(f"What FroM's merges lose of the updates and of accuracy, {KIND_NAMES[found.kind]}")
