"""How much of its adapter each input keeps, and which of two merges keeps more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from fedfrom.tuning.answers import LOSS, Answers


@dataclass(frozen=True)
class Input:
    """One input as it was before the merge.

    Attributes
    ----------
    name : str
        As the user gave it.
    rows : str
        The file that it is scored on.
    count : int
        Number of rows.
    metric : str
        See `Answers`.
    own : float
        Score of its own adapter.
    constant : float
        Score of the best constant answer; of language models, of the base model.
    """

    name: str
    rows: str
    count: int
    metric: str
    own: float
    constant: float

    @property
    def is_counted(self) -> bool:
        """Whether its own adapter is better than the constant answer; others are left out of the mean."""
        return self.own > self.constant

    def share(self, score: float) -> float:
        """Return how much of the adapter's lead over the constant answer a score keeps: 1 all, 0 none."""
        return (score - self.constant) / (self.own - self.constant)

    def shown(self, score: float) -> str:
        """Return a score as tables have it: losses above 0."""
        return f"{-score if self.metric == LOSS else score:.3f}"


def mean_share(inputs: Sequence[Input], answers: Sequence[Answers], refit: bool) -> float:
    """Return the mean share over the inputs that count.

    Parameters
    ----------
    inputs : Sequence[Input]
        At least one counts.
    answers : Sequence[Answers]
        Of one merge, in the order of the inputs.
    refit : bool
        Score classes with a bias that is fitted to these answers.
    """
    pairs = [(known, found) for known, found in zip(inputs, answers, strict=True) if known.is_counted]
    return fmean(known.share(found.score(found.bias() if refit else None)) for known, found in pairs)


@dataclass(frozen=True)
class Difference:
    """One merge's mean share less another's, on the same rows.

    Attributes
    ----------
    value : float
        The difference.
    error : float
        Its standard error.
    """

    value: float
    error: float

    @property
    def is_within_error(self) -> bool:
        return abs(self.value) <= self.error


def difference(inputs: Sequence[Input], one: Sequence[Answers], other: Sequence[Answers], refit: bool) -> Difference:
    """Return how much more one merge keeps than another, with a standard error that is paired by row.

    Notes
    -----
    The jackknife: the difference is computed without each row in turn, both merges' scores alike, and
    se^2 = (n - 1) / n sum_r (d_r - mean d)^2, summed over files. Inputs of one file lose a row together. Of mean scores
    such as accuracy this is the standard error of the mean of the rows' differences. The adapters' own scores and the
    constant answers' are taken as known, and biases as fitted.
    """
    value = mean_share(inputs, one, refit) - mean_share(inputs, other, refit)
    if not math.isfinite(value):
        return Difference(value, 0.0)
    counted = sum(known.is_counted for known in inputs)
    without: dict[str, np.ndarray] = {}
    for known, a, b in zip(inputs, one, other, strict=True):
        if known.is_counted:
            first, second = (each.without_each(each.bias() if refit else None) for each in (a, b))
            lost = (first - second) / (known.own - known.constant) / counted
            without[known.rows] = without.get(known.rows, 0) + lost
    square = sum((len(d) - 1) / len(d) * float(((d - d.mean()) ** 2).sum()) for d in without.values())
    return Difference(value, math.sqrt(square))
