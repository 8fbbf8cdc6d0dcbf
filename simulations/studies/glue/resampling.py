"""A crossed bootstrap: seeds and examples are drawn anew, every method and seed on the same examples."""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Array = NDArray[np.float64]


def counts(generator: np.random.Generator, n: int, draws: int) -> Array:
    """Return (1 + draws, n) how often each of n is drawn, n times with replacement; in row 0 each is drawn once."""
    drawn = generator.multinomial(n, np.full(n, 1 / n), size=draws)
    return np.concatenate([np.ones((1, n)), drawn])


def scores(metric: str, labels: NDArray[np.generic], answers: NDArray[np.generic], drawn: Array) -> Array:
    """Return the scores of several answers on examples that were drawn so often.

    Parameters
    ----------
    metric : str
        "accuracy", "matthews" (of two classes) or "spearman".
    labels : NDArray
        (n,) the right answers.
    answers : NDArray
        (k, n) of k models.
    drawn : Array
        (draws, n), see `counts`.

    Returns
    -------
    Array
        (draws, k). A correlation with a constant is 0.

    Notes
    -----
    Matthews' correlation of two classes is Pearson's of their numbers. For Spearman's the ranks are those among all
    examples, in every draw.
    """
    n = drawn.sum(1, keepdims=True)
    if metric == "accuracy":
        return drawn @ (answers == labels).T.astype(float) / n
    if metric == "spearman":
        answers, labels = rankdata(answers, axis=1), rankdata(labels)
    x, y = (values - values.mean(-1, keepdims=True) for values in (answers.astype(float), labels.astype(float)))
    mean_x, mean_y = drawn @ x.T / n, (drawn @ y)[:, None] / n
    together = drawn @ (x * y).T / n - mean_x * mean_y
    spread = (drawn @ (x * x).T / n - mean_x**2) * ((drawn @ (y * y))[:, None] / n - mean_y**2)
    return np.where(spread > 1e-12, together / np.sqrt(np.maximum(spread, 1e-12)), 0.0)
