"""Differences between two methods at their tuned scales: by seed, by a crossed bootstrap, without each task."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from fedfrom.pages import intervals
from simulations.studies.frame import Frame
from simulations.studies.glue.data import metric
from simulations.studies.glue.kept import unpacked
from simulations.studies.glue.plan import KIND, MERGE, OWN, gated, share
from simulations.studies.glue.resampling import Array, counts, scores

DRAWS = 2000
_SEED = 0  # of the draws
SHARE, RAW = "share", "raw"


@dataclass(frozen=True)
class Contrast:
    """One method less another, as a mean over the tasks that count and over the confirming seeds.

    Attributes
    ----------
    by_seeds : intervals.Interval
        Student's interval over the seeds.
    low, high : float
        The bootstrap's 95 % interval over seeds and examples.
    p : float
        The larger of the two tests' p-values, two-sided; NaN with one seed.
    without : dict[str, float]
        The mean without each task.
    """

    by_seeds: intervals.Interval
    low: float
    high: float
    p: float
    without: dict[str, float]

    @property
    def interval(self) -> intervals.Interval:
        """The mean with the wider of the two intervals."""
        bootstrap = max(self.high - self.by_seeds.mean, self.by_seeds.mean - self.low)
        return intervals.Interval(
            self.by_seeds.mean, float(np.nanmax([self.by_seeds.half_width, bootstrap])), self.by_seeds.count
        )


class Evidence:
    """What the merged bodies of the confirming seeds answered at one rank, at their tuned scales.

    Parameters
    ----------
    frame : Frame
        Of the study.
    rank : str
        As in its rows.
    methods : Sequence[str]
        The rows of the tables that are compared, each finished on `seeds`.
    seeds : Sequence[int]
        Seeds, at least one.

    Attributes
    ----------
    tasks : list[str]
        The tasks that count on one seed at least.
    """

    def __init__(self, frame: Frame, rank: str, methods: Sequence[str], seeds: Sequence[int]) -> None:
        self._methods = list(methods)
        rows = frame.rows()
        counted = [gated(rows, seed) for seed in seeds]
        self.tasks = [task for task in frame.study.tasks if any(task in tasks for tasks in counted)]
        generator = np.random.default_rng(_SEED)
        self._drawn = counts(generator, len(seeds), DRAWS) / len(seeds)
        every = [self._of_task(frame, rank, task, seeds, generator) for task in self.tasks]
        left_out = np.array([[task not in tasks for task in self.tasks] for tasks in counted])
        # (draws, seeds, tasks, methods), NaN where a task does not count
        self._values = {
            name: np.where(left_out[..., None], np.nan, np.stack([one[place] for one in every], axis=2))
            for place, name in enumerate((SHARE, RAW))
        }

    def _of_task(
        self, frame: Frame, rank: str, task: str, seeds: Sequence[int], generator: np.random.Generator
    ) -> tuple[Array, Array]:
        """Return (draws, seeds, methods) shares of the own lead that are kept, and the plain scores."""
        kind, own = metric(task), [f"{OWN}/{KIND}/{seed}/{task}" for seed in seeds]
        regression = kind == "spearman"
        labels = unpacked(frame.beside(own[0])["labels"], regression)
        merged = [f"{MERGE}/{KIND}/{seed}/{name}" for seed in seeds for name in self._methods]
        kept = [frame.beside(cell)["answers"][rank][task] for cell in merged]
        kept += [frame.beside(cell)["answers"][OWN][task] for cell in own]
        answers = np.stack([unpacked(text, regression) for text in kept])
        if kind == "accuracy":  # in a correlation the constant answer scores 0
            answers = np.concatenate([answers, np.full((1, len(labels)), np.bincount(labels).argmax())])
        found = scores(kind, labels, answers, counts(generator, len(labels), DRAWS))
        constant = found[:, -1, None] if kind == "accuracy" else np.zeros((len(found), 1))
        plain = found[:, : len(merged)].reshape(len(found), len(seeds), -1)
        own_scores = found[:, len(merged) : len(kept)]
        with np.errstate(divide="ignore", invalid="ignore"):  # a lead of 0: on that seed the task does not count
            return share(plain, constant[..., None], own_scores[..., None]), plain

    def contrast(self, method: str, other: str, of: str = SHARE) -> Contrast:
        """Return one method less another, in shares of the own lead or in plain scores ("raw")."""
        values = self._values[of]
        difference = values[..., self._methods.index(method)] - values[..., self._methods.index(other)]
        by_seed = np.nanmean(difference, axis=2)
        drawn = (self._drawn * by_seed).sum(1)[1:]
        low, high = np.quantile(drawn, [(1 - intervals.LEVEL) / 2, (1 + intervals.LEVEL) / 2])
        above = float((drawn > 0).mean())
        seeds = by_seed[0].tolist()
        by_t = float(stats.ttest_1samp(seeds, 0.0).pvalue) if len(seeds) > 1 else float("nan")
        without = {
            task: float(np.nanmean(np.delete(difference[0], place, axis=1))) for place, task in enumerate(self.tasks)
        }
        p = max(by_t, 2 * min(above, 1 - above), 1 / DRAWS)
        return Contrast(intervals.mean(seeds), float(low), float(high), p, without)


def holm(p: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for being several by Holm's step-down method; of NaN, NaN."""
    order, adjusted, least = np.argsort(p), [0.0] * len(p), 0.0
    for place, index in enumerate(order.tolist()):
        if math.isnan(p[index]):  # sorted last: no test was made
            adjusted[index] = p[index]
            continue
        least = max(least, min(1.0, p[index] * (len(p) - place)))
        adjusted[index] = least
    return adjusted
