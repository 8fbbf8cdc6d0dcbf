"""Heat maps: the cosines of the clients' updates, and their norms and weights in each layer."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from fedfrom.pages.canvas import canvas, write_values
from fedfrom.pages.look import module_name
from simulations.studies.paper.findings import KIND_NAMES, Findings
from simulations.studies.paper.options import TASKS

Matrix = NDArray[np.float64]
ROWS_LABELLED = 30  # the names of more layers would overlap


def short_name(name: str) -> str:
    """Return a layer's name without the parts that all layers share."""
    return re.sub(r"^layer\.(\d+)\.", r"\1 ", module_name(name)).replace("attention.self.", "")


def _worth_showing(name: str, layers: list[dict[str, Any]]) -> bool:
    """Return whether a layer is drawn; of many layers only matrices are."""
    return len(layers) <= ROWS_LABELLED or not (name.endswith("bias") or "LayerNorm" in name)


def draw(found: Findings, folder: Path) -> None:
    """Draw the cosines and, by layer, the norms and the weights at k = 1; means over seeds."""
    seeds = found.geometry()
    shown = [i for i, layer in enumerate(seeds[0]["layers"]) if _worth_showing(layer["name"], seeds[0]["layers"])]
    names = [short_name(seeds[0]["layers"][i]["name"]) for i in shown]
    norms, weights = (
        np.mean([[seed["layers"][i][key] for i in shown] for seed in seeds], axis=0) for key in ("norms", "weights")
    )
    alike = np.mean([seed["cosines"] for seed in seeds], axis=0)
    with canvas(folder / f"cosines-{found.kind}.png", dpi=130, grid=False, figsize=(4.6, 3.9)) as (_, axes):
        _map(axes[0, 0], alike, list(map(str.upper, TASKS)), "cosine", "RdBu_r", (-1.0, 1.0))
        axes[0, 0].set_title(f"Cosines of the updates\n{KIND_NAMES[found.kind]}")
    path, size = folder / f"layers-{found.kind}.png", (9, 1.5 + 0.22 * min(len(names), 60))
    with canvas(path, columns=2, dpi=130, grid=False, figsize=size, sharey=True) as (figure, axes):
        figure.get_layout_engine().set(wspace=0.08)
        _map(axes[0, 0], norms, names, "Frobenius norm", "viridis", (0.0, None))
        _map(axes[0, 1], weights, names, "weight at k = 1", "viridis", (0.0, None))
        axes[0, 0].set_title("Norm of each update")
        axes[0, 1].set_title("FroM's weight")
        figure.suptitle(f"By layer, {KIND_NAMES[found.kind]}")


def _map(
    axes: Axes, matrix: Matrix, names: list[str], label: str, colours: str, limits: tuple[float, float | None]
) -> None:
    image = axes.imshow(matrix, aspect="auto", cmap=colours, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, label=label)
    axes.set_xticks(range(len(TASKS)), [task.upper() for task in TASKS])
    step = 1 + (len(names) - 1) // ROWS_LABELLED
    shown = range(0, len(names), step)
    axes.set_yticks(shown, [names[i] for i in shown], fontsize=9 if len(names) < 12 else 7.5)
    if len(names) <= 12:
        write_values(axes, image, size=8)
