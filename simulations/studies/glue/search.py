"""The choice of a scale by successive halving: all on the first tuning rows, the better half on all of them."""

from collections.abc import Callable, Sequence
from typing import Any


def halved(scales: Sequence[float], merit: Callable[[float, bool], float]) -> tuple[float, list[dict[str, Any]]]:
    """Return the scale with the highest merit, and what was tried.

    Parameters
    ----------
    scales : Sequence[float]
        At least one, ascending.
    merit : Callable[[float, bool], float]
        merit(scale, all) of a scale: on the first tuning rows, or on all of them.

    Notes
    -----
    n scales cost n merits on the first rows and n / 2, rounded up, on all rows. Of equal merits the smaller scale wins.
    """
    tried = [{"scale": scale, "all": False, "merit": merit(scale, False)} for scale in scales]
    better = sorted(tried, key=lambda trial: (-trial["merit"], trial["scale"]))[: -(-len(tried) // 2)]
    last = [{"scale": trial["scale"], "all": True, "merit": merit(trial["scale"], True)} for trial in better]
    best = min(last, key=lambda trial: (-trial["merit"], trial["scale"]))
    return best["scale"], [*tried, *last]
