"""GLUE's metrics of each task: correlations in [-1, 1], all others in [0, 1], never in per cent."""

import numpy as np
from numpy.typing import NDArray

Scores = dict[str, float]

METRICS = {
    "reviews": ("accuracy",),
    "cola": ("matthews",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
    "snli": ("accuracy",),
    "sick": ("accuracy",),
}


def scores(task: str, predictions: NDArray[np.generic], labels: NDArray[np.generic]) -> Scores:
    """Return a task's metrics and, under "score", their mean, which is the task's entry in GLUE's table.

    Parameters
    ----------
    task : str
        Name of the task.
    predictions : NDArray
        (n,) class numbers, or real numbers for STS-B.
    labels : NDArray
        (n,) of the same kind.

    Notes
    -----
    A correlation with a constant is undefined, and GLUE's own evaluation returns NaN. Here it is 0, so that a model
    with constant answers, such as an untrained one, can be drawn and compared.
    """
    values = {name: metric(name, predictions, labels) for name in METRICS[task]}
    return {**values, "score": float(np.mean(list(values.values())))}


def metric(name: str, predictions: NDArray[np.generic], labels: NDArray[np.generic]) -> float:
    """Return one of the metrics that `METRICS` names; see `scores`."""
    if name == "accuracy":
        return float(np.mean(predictions == labels))
    if name == "f1":
        from sklearn.metrics import f1_score

        return float(f1_score(labels, predictions, pos_label=1, zero_division=0))
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    if name == "matthews":
        from sklearn.metrics import matthews_corrcoef

        return float(matthews_corrcoef(labels, predictions))
    from scipy.stats import pearsonr, spearmanr

    return float((pearsonr if name == "pearson" else spearmanr)(predictions, labels)[0])


def constant_score(task: str, labels: NDArray[np.generic]) -> float:
    """Return the score of a constant answer: the majority class, or the mean of real numbers."""
    return 0.0 if task == "stsb" else scores(task, majority(labels), labels)["score"]


def majority(labels: NDArray[np.generic]) -> NDArray[np.generic]:
    """Return (n,) the most frequent class in the place of each label."""
    values, counts = np.unique(labels, return_counts=True)
    return np.full_like(labels, values[counts.argmax()])
