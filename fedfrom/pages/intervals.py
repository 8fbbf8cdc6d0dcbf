"""Means over seeds with their 95 % intervals, and differences paired by seed.

scipy is imported by the functions that call it: importing fedfrom.pages does not wait for it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and the half-width of its 95 % interval (NaN for a single value, which has none)."""

    mean: float
    half_width: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.count < 2 else f"{self.mean:.3f} ± {self.half_width:.3f}"

    @property
    def signed(self) -> str:
        """The same text with the mean's sign, for a difference."""
        return f"{self.mean:+.3f}" if self.count < 2 else f"{self.mean:+.3f} ± {self.half_width:.3f}"

    @property
    def settled(self) -> bool:
        """Whether there is an interval that leaves 0 out."""
        return self.count > 1 and abs(self.mean) > self.half_width


def mean(values: Sequence[float]) -> Interval:
    """Return the mean of independent values with Student's interval.

    Parameters
    ----------
    values : Sequence[float]
        One value for each seed, at least one.
    """
    from scipy import stats

    count, centre = len(values), fmean(values)
    if count < 2:
        return Interval(centre, float("nan"), count)
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, count - 1))
    return Interval(centre, quantile * stdev(values) / math.sqrt(count), count)


def paired(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Return the mean of value - other over the same seeds, with Student's interval of the differences."""
    return mean([a - b for a, b in zip(values, others, strict=True)])


def proportion(correct: int, total: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a proportion, for one model on a finite set of examples."""
    from scipy import stats

    found = stats.binomtest(correct, total).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)
