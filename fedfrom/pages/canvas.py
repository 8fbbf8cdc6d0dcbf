"""A matplotlib figure in the style of all pictures, and the numbers written into heat maps."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from fedfrom.atomic import whole_file
from fedfrom.pages.look import STYLE

# dark and light text; not black itself, which figures.draw replaces for dark pages
DARK, LIGHT = "#010101", "#ffffff"


@contextlib.contextmanager
def canvas(
    path: Path, rows: int = 1, columns: int = 1, dpi: int = 150, grid: bool = True, **options: Any
) -> Iterator[tuple[Any, Any]]:
    """Yield a figure and its axes, an array of (rows, columns); write the figure to a file at the end.

    Parameters
    ----------
    path : Path
        The picture. Its folder is made where it is missing.
    rows, columns : int (default: 1)
        Number of axes.
    dpi : int (default: 150)
        Pixels an inch.
    grid : bool (default: True)
        Draw grid lines.
    **options
        Further arguments of `matplotlib.pyplot.subplots`, such as `figsize`.
    """
    with plt.rc_context({**STYLE, "axes.grid": grid}):
        figure, axes = plt.subplots(rows, columns, dpi=dpi, layout="constrained", squeeze=False, **options)
        try:
            yield figure, axes
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as hidden:
                figure.savefig(hidden)
        finally:
            plt.close(figure)


def write_values(axes: Axes, image: Any, form: Callable[[float], str] = "{:.2f}".format, size: float = 8.5) -> None:
    """Write each value of a heat map into its cell, in light text on dark colours; NaN is left out.

    Parameters
    ----------
    axes : Axes
        The heat map's.
    image : AxesImage
        What `axes.imshow` returned for a matrix.
    form : Callable[[float], str]
        Returns a value's text. Two decimals by default.
    size : float (default: 8.5)
        Font size.
    """
    values: Any = np.ma.filled(np.ma.asarray(image.get_array(), dtype=float), np.nan)
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
            axes.text(j, i, form(value), ha="center", va="center", fontsize=size, color=DARK if bright else LIGHT)
