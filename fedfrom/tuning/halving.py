"""The choice of a scale: every scale on the first tuning rows, then the better half of the scales on all rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Merit = Callable[[float], float]


def scales(count: int) -> list[float]:
    """Return the scales that are tried: from 0.25 to 4, each the same multiple of the one before, to three digits."""
    return [float(f"{scale:.3g}") for scale in np.geomspace(0.25, 4, count)]


def halved(scales: Sequence[float], few: Merit, every: Merit) -> tuple[float, list[dict[str, Any]]]:
    """Return the scale with the highest merit, found by successive halving, and what was tried.

    Parameters
    ----------
    scales : Sequence[float]
        At least one, ascending.
    few, every : Callable[[float], float]
        A scale's merit on the first tuning rows, and on all of them.

    Notes
    -----
    n scales cost n merits on the first rows and n / 2, rounded down, on all rows. Of equal merits the smaller scale
    wins.
    """
    tried = [{"scale": scale, "rows": "first", "merit": few(scale)} for scale in scales]
    best, last = highest([trial["scale"] for trial in _best_first(tried)[: max(1, len(tried) // 2)]], every)
    return best, [*tried, *last]


def highest(scales: Sequence[float], every: Merit) -> tuple[float, list[dict[str, Any]]]:
    """Return the scale with the highest merit on all tuning rows, and what was tried."""
    tried = [{"scale": scale, "rows": "all", "merit": every(scale)} for scale in scales]
    return _best_first(tried)[0]["scale"], tried


def _best_first(tried: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(tried, key=lambda trial: (-trial["merit"], trial["scale"]))
