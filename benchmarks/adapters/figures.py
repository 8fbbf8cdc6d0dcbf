"""How time and memory grow, on log-log scales with fitted slopes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter

from simulations.figures import COLOURS, MARKERS, STYLE

Curve = Sequence[tuple[int, float, float]]  # value, seconds, MiB


def slope(points: Curve, of: int) -> float:
    """Return the exponent of a power law fitted by least squares in logarithms; of 1 is the seconds, 2 the MiB."""
    shown = [(point[0], point[of]) for point in points if point[of] > 0]
    if len(shown) < 2:
        return 0.0
    return float(np.polyfit(*np.log(np.array(shown)).T, 1)[0])


def draw(curves: Mapping[str, Curve], path: Path) -> None:
    """Draw the curves: by clients, by rank and by width, seconds above and memory below."""
    kinds = ("clients", "rank", "d")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, len(kinds), figsize=(12, 7), constrained_layout=True)
        for column, kind in enumerate(kinds):
            chosen = {name: curve for name, curve in curves.items() if name.split(",")[0] == kind}
            for row, unit in ((0, "seconds"), (1, "extra memory, MiB")):
                axis = axes[row][column]
                for (name, curve), colour, marker in zip(chosen.items(), COLOURS, MARKERS, strict=False):
                    fitted = [point for point in curve if kind != "clients" or point[0] >= 32]
                    label = f"{name.split(', ', 1)[1]}: slope {slope(fitted, row + 1):.2f}"
                    shown = [point[row + 1] for point in curve]
                    axis.loglog([p[0] for p in curve], shown, color=colour, marker=marker, label=label)
                axis.set(xlabel=kind, ylabel=unit)
                axis.xaxis.set_minor_formatter(NullFormatter())
                axis.legend(frameon=False)
            axes[0][column].set_title(f"by {kind}" if kind != "d" else "by width d of a d x d layer")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        plt.close(figure)
