"""How far each client's update of a layer is shortened before it is weighed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

# The share of clients that may be attackers, and the share of the largest honest norm that is negligible.
_TOLERATED, _NEGLIGIBLE = 0.3, 0.01


def clip_factors(norms: Sequence[float], clip: float | None) -> list[float]:
    """Return (n,) factors in (0, 1] that bring every norm to at most `clip` times the median of those that count.

    Norms of 0 do not count: those clients do not train the layer. Of the other clients three tenths may be attackers,
    and one at least. The largest norm without that many is taken for honest. Norms below a hundredth of it are
    negligible and do not count either. So a majority that hardly moves a layer (weight decay without a gradient, a head
    that most barely train) does not clip the clients who learn there, if more than three tenths do. And three attackers
    of ten can't make their own norms the measure, as long as the honest clients' norms are within a hundred times each
    other.

    Parameters
    ----------
    norms : Sequence[float]
        (n,) of the clients' updates of one layer, finite, >= 0.
    clip : float | None
        The bound, > 0; None is no bound.
    """
    heard = sorted((norm for norm in norms if norm > 0), reverse=True)
    if clip is None or not heard:
        return [1.0] * len(norms)
    place = max(1, int(_TOLERATED * len(heard)))  # the norms above this place may be attackers'
    least = _NEGLIGIBLE * heard[min(place, len(heard) - 1)]
    most = clip * statistics.median(norm for norm in heard if norm >= least)
    return [min(1.0, most / norm) if norm > 0 else 1.0 for norm in norms]
