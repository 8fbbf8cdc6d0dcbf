"""Means over seeds with their 95 % intervals, paired where the seeds are the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

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
    numbers = np.asarray(values, dtype=np.float64)
    if len(numbers) < 2:
        return Interval(float(numbers.mean()), float("nan"), len(numbers))
    error = float(numbers.std(ddof=1) / np.sqrt(len(numbers)))
    return Interval(float(numbers.mean()), float(stats.t.ppf((1 + LEVEL) / 2, len(numbers) - 1)) * error, len(numbers))


def paired(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Return the mean of value - other over the same seeds, with Student's interval of the differences."""
    return mean([a - b for a, b in zip(values, others, strict=True)])


def proportion(correct: int, total: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a proportion, for one model on a finite set of examples."""
    interval = stats.binomtest(correct, total).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)
