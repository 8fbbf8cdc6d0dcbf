"""Units in which no square leaves float64's range."""

from __future__ import annotations

import math


def power_of_two(norms: list[float]) -> float:
    """Return a power of two (which scales without rounding) of about the largest norm's size; 1 for zeros."""
    exponent = math.frexp(max(norms))[1]
    return 2.0 ** min(max(exponent, -1000), 1000)
