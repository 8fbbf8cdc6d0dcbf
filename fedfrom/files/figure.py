"""The picture of `fedfrom inspect --plot`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fedfrom.atomic import whole_file
from fedfrom.errors import BadInput
from fedfrom.files.inspection import Inspection

# Okabe and Ito's colours, told apart under the common kinds of colour blindness
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MOST_NAMES = 40  # layers whose names fit under an axis
_LONGEST = 28  # characters of an input's name


def check_plot(path: Path) -> None:
    """Raise BadInput where matplotlib is missing, or the path is no place for a picture."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise BadInput("--plot needs matplotlib: pip install 'fedfrom[cli]'") from None
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise BadInput(f"--plot {path}: expected a name that ends with .png, .pdf or .svg")
    if path.is_dir() or not path.parent.is_dir():
        raise BadInput(f"--plot {path}: expected a file in a folder that is there")


def draw(inspection: Inspection, path: Path) -> None:
    """Draw norms, weights and interference by layer, and the cosines of whole updates; replace an earlier picture."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    layers, names = inspection.layers, [_short(name) for name in inspection.report.clients]
    figure = Figure(figsize=(min(24.0, 11 + 0.12 * min(len(layers), 100)), 8.6), dpi=130, layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=(2.6, 1), height_ratios=(1, 1, 0.8))
    norms, weights, lost = (figure.add_subplot(grid[row, 0]) for row in range(3))
    places = range(len(layers))
    for i, name in enumerate(names):
        style: dict[str, Any] = {"color": _COLOURS[i % len(_COLOURS)], "marker": "o", "markersize": 3.5, "linewidth": 1}
        norms.plot(places, [layer.norms[i] or float("nan") for layer in layers], label=name, **style)
        weights.plot(places, [layer.weights[i] for layer in layers], **style)
    lost.bar(places, [layer.interference for layer in layers], color="#777777", width=0.8)
    if any(norm > 0 for layer in layers for norm in layer.norms):
        norms.set_yscale("log")
        for axis_formatter in (norms.yaxis.set_major_formatter, norms.yaxis.set_minor_formatter):
            axis_formatter(StrMethodFormatter("{x:g}"))
    norms.set_title("Norm of the update, by layer", **_TITLE)
    weights.set_title(f"Weight in a merge by FroM, k = {inspection.report.method['k']}", **_TITLE)
    weights.set_ylim(0, 1)
    lost.set_title("Interference: the share of the updates' energy that the merge loses", **_TITLE)
    lost.set_ylim(0, 1)
    for axes in (norms, weights, lost):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#E6E6E6")
        axes.set_axisbelow(True)
        axes.set_xlim(-0.7, len(layers) - 0.3)
        axes.tick_params(labelbottom=False, bottom=False)
    if len(layers) <= _MOST_NAMES:
        lost.set_xticks(list(places), _layer_names([layer.name for layer in layers]), rotation=90, fontsize=7)
        lost.tick_params(labelbottom=True)
    else:
        lost.tick_params(labelbottom=True, bottom=True)
        lost.set_xlabel("layer, in the order of their names")
    if len(names) > 1:
        _draw_cosines(figure, figure.add_subplot(grid[1:, 1]), inspection, names)
    handles, labels = norms.get_legend_handles_labels()
    side = figure.add_subplot(grid[0, 1])
    side.axis("off")
    side.legend(handles[:20], labels[:20], loc="upper left", frameon=False, fontsize=9)
    _save(figure, path)


_TITLE: dict[str, Any] = {"loc": "left", "fontsize": 10, "fontweight": "bold"}


def _draw_cosines(figure: Any, axes: Any, inspection: Inspection, names: list[str]) -> None:
    cosines = inspection.report.cosines()
    axes.set_title("Cosine of the whole updates", **_TITLE)
    if not cosines:
        axes.text(0.5, 0.5, "not computed for so many inputs", ha="center", transform=axes.transAxes)
        axes.axis("off")
        return
    image = axes.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    for i, row in enumerate(cosines if len(names) <= 10 else []):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if abs(value) > 0.6 else "black")
    figure.colorbar(image, ax=axes, shrink=0.6)


def _layer_names(names: list[str]) -> list[str]:
    """Return the names without their common start."""
    common = os.path.commonprefix(names) if len(names) > 1 else ""
    cut = common.rfind(".") + 1
    return [name[cut:] for name in names]


def _short(name: str) -> str:
    # $ starts mathematics in matplotlib
    last = Path(name.rstrip("/")).name or name
    return (last if len(last) <= _LONGEST else "…" + last[1 - _LONGEST :]).replace("$", r"\$")


def _save(figure: Any, path: Path) -> None:
    try:
        with whole_file(path) as hidden:
            figure.savefig(hidden)
    except OSError as error:
        raise BadInput(f"--plot {path}: can't be written: {error.strerror or error}") from None
