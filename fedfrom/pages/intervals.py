"""Means over seeds with their 95 % intervals, paired where the seeds are the same."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and the half-width of its 95 % interval (NaN for a single value, which has none)."""

    mean: float
    half_width: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.count < 2 else f"{self.mean:.3f} ± {self.half_width:.3f}"


def mean(values: Sequence[float]) -> Interval:
    """Return the mean of independent values with Student's interval.

    Parameters
    ----------
    values : Sequence[float]
        At least one, a value a seed.
    """
    count = len(values)
    centre = math.fsum(values) / count
    if count < 2:
        return Interval(centre, float("nan"), count)
    spread = math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (count - 1))
    return Interval(centre, student(count - 1) * spread / math.sqrt(count), count)


def paired(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Return the mean of value - other over the same seeds, with Student's interval of the differences."""
    return mean([a - b for a, b in zip(values, others, strict=True)])


def proportion(correct: int, total: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a proportion, for one model on a finite set of examples."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    p, shrunk = correct / total, 1 + z * z / total
    centre = (p + z * z / (2 * total)) / shrunk
    half = z / shrunk * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    # rounding must not leave 1e-17 where the interval ends at 0 or 1
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == total else centre + half)


def student(freedom: int) -> float:
    """Return t such that Student's t with that many degrees of freedom, 1 or more, lies within ±t 95 % of the time.

    Bisection on the angle whose tangent is t/√freedom, in which the distribution is a finite sum (Abramowitz & Stegun
    26.7.3 and 26.7.4): the pages need no scipy for one number.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < LEVEL else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (cosine, 0.0) if freedom % 2 else (1.0, 0.0)
    for i in range(freedom // 2):
        total += term
        term *= cosine * cosine * ((2 * i + 2) / (2 * i + 3) if freedom % 2 else (2 * i + 1) / (2 * i + 2))
    return 2 / math.pi * (angle + sine * total) if freedom % 2 else sine * total
