"""Views that studies share: scores by seed, their means with intervals, and differences paired by seed."""

from collections.abc import Sequence

import pandas as pd

from fedfrom.pages import intervals

MEAN = "mean"


def by_seed(rows: pd.DataFrame, index: str, tasks: Sequence[str]) -> pd.DataFrame:
    """Return the scores by (index, seed) with a column for each task and their mean; labels keep their order.

    Raises
    ------
    ValueError
        A label has two scores of one task and seed.
    """
    found = rows.pivot(index=[index, "seed"], columns="task", values="score")[list(tasks)]
    found[MEAN] = found.mean(axis=1)
    return found.reindex(list(dict.fromkeys(rows[index])), level=0)


def interval(scores: pd.DataFrame, label: object, column: str = MEAN) -> intervals.Interval:
    """Return the mean of one label's scores over seeds with its interval."""
    return intervals.mean(scores.loc[label, column].tolist())


def gain(scores: pd.DataFrame, label: object, against: object, column: str = MEAN) -> intervals.Interval:
    """Return the mean difference of two labels' scores over the seeds that both have, with its interval."""
    one, other = scores.loc[label, column], scores.loc[against, column]
    shared = one.index.intersection(other.index)
    return intervals.paired(one[shared].tolist(), other[shared].tolist())


def means(scores: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each label, whose texts are the means over seeds ± half of their 95 % intervals."""
    return scores.groupby(level=0, sort=False).agg(lambda values: str(intervals.mean(values.tolist())))
