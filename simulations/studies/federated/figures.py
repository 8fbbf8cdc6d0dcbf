"""The study's pictures: the accuracy by p and k, and each strategy's accuracy by round."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedfrom.pages import intervals
from fedfrom.pages.canvas import canvas
from fedfrom.pages.look import COLOURS, MARKERS
from simulations.studies.federated.plan import BASELINE, GRID, POWERS, ROWS, SETTINGS, from_spec
from simulations.studies.federated.tables import scores_by_seed
from simulations.studies.tables import MEAN

WHO = {"dirichlet": "Dirichlet 0.5 over labels, unequal sizes", "equal": "equal-sized, labels alike"}


def draw_grid(rows: pd.DataFrame, path: Path) -> None:
    """Draw the accuracy of each p and k, every seed a dot."""
    with canvas(path, columns=len(GRID), figsize=(10.5, 4.2), sharey=True) as (_, axes):
        for plot, setting in zip(axes[0], GRID, strict=True):
            scores = scores_by_seed(rows, setting)[MEAN]
            powers = sorted({p for _, p in GRID[setting]})
            for position, p in enumerate(powers):
                shift = (position - (len(powers) - 1) / 2) * 0.06
                label = f"p = {p:g}" if len(powers) > 1 else "any p"
                points = [
                    (k + shift, scores[scores.index.get_level_values(0) == from_spec(k, p)].tolist()) for k in POWERS
                ]
                _draw_seeds(plot, points, position, label)
            plot.set_title(WHO[setting])
            plot.set_xlabel("k, power of the norm")
            plot.set_xticks(POWERS)
            plot.legend(loc="lower left")
        axes[0, 0].set_ylabel("accuracy, mean of the last three rounds")
        axes[0, 0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _draw_seeds(plot: Axes, points: Sequence[tuple[float, list[float]]], position: int, label: str) -> None:
    colour, marker = COLOURS[position], MARKERS[position]
    for x, values in points:
        plot.scatter([x] * len(values), values, color=colour, marker=marker, s=18, alpha=0.45)
    means = [float(np.mean(values)) if values else np.nan for _, values in points]
    plot.plot([x for x, _ in points], means, color=colour, marker=marker, linewidth=2, label=label)


def draw_curves(rows: pd.DataFrame, path: Path) -> None:
    """Draw each strategy's accuracy by round, mean over seeds, and below it the difference to FedAvg."""
    with canvas(path, 2, len(SETTINGS), figsize=(11.5, 7.4), sharey="row") as (figure, axes):
        for column, setting in enumerate(SETTINGS):
            curves = rows[rows["kind"] == setting].pivot(index=["method", "seed"], columns="round", values="score")
            there = curves.index.unique(level=0)
            for number, row in enumerate(ROWS):
                look = {"color": COLOURS[number], "marker": MARKERS[number]}
                if row not in there:
                    continue
                _draw_mean(axes[0, column], curves.loc[row], look, row, band=False)
                gains = (curves.loc[row] - curves.loc[BASELINE]).dropna() if BASELINE in there else curves.loc[row][:0]
                if row != BASELINE and len(gains):
                    _draw_mean(axes[1, column], gains, look, row, band=True)
            axes[0, column].set_title(f"{WHO[setting]}: mean over seeds")
            axes[1, column].set_title("Ahead of FedAvg on factors, 95 % intervals")
            axes[1, column].axhline(0, color="#555555", linewidth=1)
            axes[1, column].set_xlabel("round")
            for plot in axes[:, column]:
                plot.xaxis.set_major_locator(MaxNLocator(integer=True))
                plot.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes[0, 0].set_ylabel("accuracy on held-out data")
        axes[1, 0].set_ylabel("difference in accuracy")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)


def _draw_mean(plot: Axes, curves: pd.DataFrame, look: dict[str, Any], label: str, band: bool) -> None:
    """Draw the mean by round of curves, one seed a row of the frame."""
    found = [intervals.mean(curves[number].tolist()) for number in curves.columns]
    offset = MARKERS.index(look["marker"]) * 0.06 - 0.18 if band else 0.0
    places = [number + offset for number in curves.columns]
    means = [value.mean for value in found]
    plot.plot(places, means, linewidth=1.8, markersize=4, label=label, **look)
    if band and len(curves) > 1:
        errors = [value.half_width for value in found]
        plot.errorbar(places, means, errors, fmt="none", ecolor=look["color"], elinewidth=0.8, alpha=0.6)
