"""Views of the frame: scores by row and seed, and whether interference predicts the accuracy lost by merging."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from simulations.studies.frame import Frame
from simulations.studies.paper.cells import alone
from simulations.studies.paper.data import REPORTED
from simulations.studies.paper.grids import KS_PAIRS, rows
from simulations.studies.paper.options import TASKS
from simulations.studies.tables import MEAN, by_seed

COLUMNS = (*TASKS, MEAN)
OWN = "each task by its own"
KIND_NAMES = {"lora": "LoRA adapters", "full": "full fine-tuning"}
DRAWS = 2000
TINY = float(np.finfo(float).tiny)


@dataclass(frozen=True)
class Findings:
    """The rows of one kind, for the seeds whose cells are all finished."""

    frame: Frame
    kind: str
    seeds: list[int]
    rows: pd.DataFrame

    @classmethod
    def of(cls, frame: Frame, kind: str) -> "Findings":
        """Return the findings of a frame for one kind."""
        missing = {cell.seed for cell in frame.missing() if cell.kind == kind}
        seeds = [seed for seed in frame.study.seeds if seed not in missing]
        every = frame.rows()
        return cls(frame, kind, seeds, every[(every.kind == kind) & every.seed.isin(seeds)])

    def part(self, name: str, split: str = REPORTED) -> pd.DataFrame:
        """Return the rows of a part of the study and one half of the dev sets."""
        return self.rows[(self.rows.part == name) & (self.rows.split == split)]

    def bounds(self) -> pd.DataFrame:
        """Return the rows of the merges' lower and upper bounds, with each task by its own state among them."""
        found = self.part("bounds")
        own = found[found.method == found.task.map(alone)].assign(method=OWN)
        *first, last = found.method.unique()
        return pd.concat([found[found.method.isin(first)], own, found[found.method == last]])

    def table(self) -> pd.DataFrame:
        """Return the rows of Table 3: every bound, and every method at the setting chosen on the validation half."""
        found = pd.concat([self.bounds(), self.part("search")])
        order = [*self.bounds().method.unique(), *(row.label for row in rows(self.kind))]
        return found.sort_values("method", key=lambda names: names.map(order.index), kind="stable")

    def scores(self) -> pd.DataFrame:
        """Return Table 3's scores by method and seed."""
        return by_seed(self.table(), "method", TASKS)

    def sweep(self, part: str) -> pd.DataFrame:
        """Return a sweep's scores by value and seed."""
        return by_seed(self.part(part), "value", TASKS)

    def geometry(self) -> list[dict[str, Any]]:
        """Return, by seed, the cosines of the updates and the layers' norms, weights and cosines."""
        return [self.frame.beside(f"geometry/{self.kind}/{seed}/from") for seed in self.seeds]


@dataclass(frozen=True)
class Point:
    """One merge of some tasks: the share of the updates that it loses, and the accuracy that it loses."""

    seed: int
    tasks: tuple[str, ...]
    k: float
    interference: float
    misalignment: float
    lost: float

    @property
    def cluster(self) -> tuple[int, tuple[str, ...]]:
        """Seed and tasks, which merges of different k share."""
        return self.seed, self.tasks


def points(found: Findings) -> list[Point]:
    """Return a point for each pair of tasks and all of them, each k of the pairs', and each seed.

    Accuracy lost is the accuracy of each task's own state less the merge's on the reported half, mean over the tasks.
    """
    bounds, layers = found.bounds(), dict(zip(found.seeds, found.geometry(), strict=True))
    own = bounds[bounds.method == OWN].set_index(["seed", "task"]).score
    merges, every = found.part("pairs"), found.part("k")
    merges = pd.concat([merges, every[every.value.isin(KS_PAIRS)]])
    result = []
    for seed in found.seeds:
        for (clients, k), merge in merges[merges.seed == seed].groupby(["clients", "value"], sort=False):
            tasks = tuple(clients.split())
            lost = [own[seed, task] - score for task, score in zip(merge.task, merge.score, strict=True)]
            turned = misalignment(layers[seed]["layers"], [TASKS.index(task) for task in tasks], k)
            interference = float(merge.interference.iloc[0])
            result.append(Point(seed, tasks, float(k), interference, turned, float(np.mean(lost))))
    return result


def misalignment(layers: list[dict[str, Any]], clients: list[int], k: float) -> float:
    """Return the mean over clients of 1 - cos(theta*, theta_i) of the whole updates, for FroM at k.

    Every client counts alike. Interference weighs a client's loss by the client's weight: a merge that equals one
    client's update has interference 0, though it differs from the other clients' updates.
    """
    along, own, merged = np.zeros(len(clients)), np.zeros(len(clients)), 0.0
    for layer in layers:
        norms = np.array(layer["norms"])[clients]
        inner = np.array(layer["cosines"])[np.ix_(clients, clients)] * np.outer(norms, norms)
        powers = (norms / max(norms.max(), TINY)) ** k
        w = powers / powers.sum()
        along += inner @ w
        merged += float(w @ inner @ w)
        own += norms**2
    return float(np.mean(1 - along / np.sqrt(np.maximum(own * merged, TINY))))


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation with a 95 % interval."""

    rho: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.rho:.2f} [{self.low:.2f}, {self.high:.2f}]"

    @property
    def settled(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def correlate(chosen: list[Point], name: str) -> Correlation | None:
    """Return the correlation of a measure with the accuracy lost; None where it is undefined.

    The interval comes from a bootstrap of whole clusters, each a seed's pair or triple of tasks at all k: the merges of
    a cluster merge the same updates. All clusters have the same number of merges.
    """
    xs, ys = np.array([[getattr(point, name), point.lost] for point in chosen]).T
    if np.ptp(xs) == 0 or np.ptp(ys) == 0:
        return None
    clusters = sorted({point.cluster for point in chosen})
    members = np.array([[i for i, p in enumerate(chosen) if p.cluster == cluster] for cluster in clusters])
    drawn = np.random.default_rng(0).integers(len(clusters), size=(DRAWS, len(clusters)))
    chosen_rows = members[drawn].reshape(DRAWS, -1)
    low, high = np.nanpercentile(_spearman(xs[chosen_rows], ys[chosen_rows]), [2.5, 97.5])
    rho = float(_spearman(xs[None], ys[None])[0])
    return Correlation(rho, float(low), float(high), len(chosen))


def _spearman(xs: NDArray[np.float64], ys: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rank correlation of each row of (draws, n); NaN where either is constant."""
    x, y = (stats.rankdata(each, axis=1) for each in (xs, ys))
    x, y = (each - each.mean(axis=1, keepdims=True) for each in (x, y))
    sizes = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    return np.divide((x * y).sum(axis=1), sizes, out=np.full(len(x), np.nan), where=sizes > 0)


def correlations(found: Findings) -> dict[tuple[str, str], Correlation | None]:
    """Return the correlations of interference and misalignment with the accuracy lost, for all k and for each k."""
    every = points(found)
    parts = {"all k": every} | {f"k = {k:g}": [point for point in every if point.k == k] for k in KS_PAIRS}
    return {
        (name, part): correlate(some, name) for name in ("interference", "misalignment") for part, some in parts.items()
    }
