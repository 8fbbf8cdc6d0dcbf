"""The growth of time and memory on log-log scales, with fitted slopes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from fedfrom.pages.canvas import canvas
from fedfrom.pages.look import COLOURS, MARKERS

Curve = Sequence[tuple[int, float, float]]  # value, seconds, MiB


def slope(points: Curve, of: int) -> float:
    """Return the exponent of a power law fitted by least squares in logarithms; `of` is 1 for seconds, 2 for MiB."""
    shown = [(point[0], point[of]) for point in points if point[of] > 0]
    if len(shown) < 2:
        return 0.0
    return float(np.polyfit(*np.log(np.array(shown)).T, 1)[0])


@dataclass(frozen=True)
class Panel:
    """A column of the picture: curves over one quantity, with slopes fitted to its values from `fitted_from` on."""

    title: str
    quantity: str
    curves: Mapping[str, Curve]
    fitted_from: int = 0

    def fitted(self, curve: Curve) -> Curve:
        """Return the points of a curve to which its slope is fitted."""
        return [point for point in curve if point[0] >= self.fitted_from]


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Draw the panels side by side, seconds above and memory below."""
    with canvas(path, 2, len(panels), dpi=120, figsize=(4 * len(panels), 7)) as (_, axes):
        for column, panel in enumerate(panels):
            for row, unit in ((0, "seconds"), (1, "extra memory, MiB")):
                axis = axes[row][column]
                for (name, curve), colour, marker in zip(panel.curves.items(), COLOURS, MARKERS, strict=False):
                    label = f"{name}: slope {round(slope(panel.fitted(curve), row + 1), 2) + 0.0:.2f}"  # never -0.00
                    shown = [point[row + 1] for point in curve]
                    axis.loglog([p[0] for p in curve], shown, color=colour, marker=marker, label=label)
                axis.set(xlabel=panel.quantity, ylabel=unit)
                _scales(axis, panel, row + 1)
                axis.legend(frameon=False, loc="upper left")
            axes[0][column].set_title(panel.title)


def _scales(axis: Axes, panel: Panel, of: int) -> None:
    """Mark the measured values, and show at least a decade, so that slow growth looks slow."""
    values = sorted({point[0] for curve in panel.curves.values() for point in curve})
    axis.set_xticks(values, [f"{value / 1e6:.3g} M" if value >= 1e6 else f"{value:,}" for value in values])
    axis.xaxis.set_minor_locator(NullLocator())
    shown = [point[of] for curve in panel.curves.values() for point in curve if point[of] > 0]
    if shown:
        low, high = np.log10(min(shown)), np.log10(max(shown))
        room = max(0.5 - (high - low) / 2, 0.05)
        low, high = low - room, high + room
        # with room for the legend
        axis.set_ylim(10**low, 10 ** (high + (high - low) * 0.1 * len(panel.curves)))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())
