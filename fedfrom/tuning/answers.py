"""What a model answers on one input's rows, and how good that is: of all rows, and without each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedfrom.tuning.bias import refitted_bias

ACCURACY, SPEARMAN, LOSS = "accuracy", "Spearman", "token loss"


@dataclass(frozen=True)
class Answers:
    """A model's outputs on some rows.

    Attributes
    ----------
    metric : str
        ACCURACY, SPEARMAN (of a head with one output), or LOSS (of a language model).
    outputs : NDArray
        (n, classes) float32 logits; (n, 1) scores; or (n, 2) float64 losses, summed over each row's tokens, and numbers
        of tokens.
    labels : NDArray
        (n,) the right answers; not looked at for LOSS.
    """

    metric: str
    outputs: NDArray[np.floating]
    labels: NDArray[Any]

    def followed_by(self, other: Answers) -> Answers:
        """Return these rows and another's."""
        labels = np.concatenate([self.labels, other.labels])
        return Answers(self.metric, np.concatenate([self.outputs, other.outputs]), labels)

    def bias(self) -> NDArray[np.float64] | None:
        """Return (classes,) the bias to add to the logits, fitted anew; None where there are no (finite) logits."""
        if self.metric != ACCURACY or not np.isfinite(self.outputs).all():
            return None
        return refitted_bias(self.outputs, self.labels)

    def score(self, bias: NDArray[np.float64] | None = None) -> float:
        """Return accuracy, Spearman's correlation, or minus the mean loss of a token; higher is better.

        Minus infinity where an output is not finite. A correlation with a constant is 0.
        """
        if not np.isfinite(self.outputs).all():
            return -float("inf")
        if self.metric == SPEARMAN:
            return _spearman(self.outputs[:, 0], self.labels)
        if self.metric == LOSS:
            return -float(self.outputs[:, 0].sum() / self.outputs[:, 1].sum())
        return float(self._right(bias).mean())

    def without_each(self, bias: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """Return (n,) the score of all rows but one, for each of them."""
        n = len(self.labels)
        if self.metric == SPEARMAN:
            kept = [np.delete(np.arange(n), i) for i in range(n)]
            return np.array([_spearman(self.outputs[rows, 0], self.labels[rows]) for rows in kept])
        if self.metric == LOSS:
            losses, tokens = self.outputs.T
            return -(losses.sum() - losses) / (tokens.sum() - tokens)
        right = self._right(bias)
        return (right.sum() - right) / (n - 1)

    def constant(self) -> float:
        """Return the score of the best constant answer; of language models there is none."""
        return (
            0.0
            if self.metric == SPEARMAN
            else float(np.unique(self.labels, return_counts=True)[1].max() / len(self.labels))
        )

    def _right(self, bias: NDArray[np.float64] | None) -> NDArray[np.float64]:
        logits = self.outputs if bias is None else self.outputs + bias
        return (logits.argmax(1) == self.labels).astype(np.float64)


def _spearman(one: NDArray[Any], other: NDArray[Any]) -> float:
    from scipy.stats import spearmanr

    return 0.0 if np.ptp(one) == 0 or np.ptp(other) == 0 else float(spearmanr(one, other)[0])
