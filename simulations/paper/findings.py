"""What the finished pieces say: scores by row over seeds, and whether interference predicts what merging costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedfrom.pages import intervals
from simulations.paper.arena import Scores, accuracy, mean_accuracy
from simulations.paper.grids import KS_PAIRS, Row, rows
from simulations.paper.options import TASKS, PaperOptions
from simulations.paper.pieces import pieces
from simulations.study import Study

MEAN = "mean"
COLUMNS = (*TASKS, MEAN)
DRAWS = 2000
TINY = float(np.finfo(float).tiny)


@dataclass(frozen=True)
class Findings:
    """The results of one kind, of those seeds whose pieces are all there."""

    study: Study
    kind: str
    seeds: list[int]

    @classmethod
    def of(cls, options: PaperOptions, study: Study, kind: str) -> "Findings":
        """Return what is there."""
        missing = set(study.missing())
        names = [piece.name for piece in pieces(options) if piece.name.startswith(f"{kind}-")]
        whole = [
            seed
            for seed in range(options.seeds)
            if not any(name in missing for name in names if name.startswith(f"{kind}-s{seed}-"))
        ]
        return cls(study, kind, whole)

    def pieces(self, name: str) -> list[dict[str, Any]]:
        """Return a piece's result by seed."""
        found = [self.study.get(f"{self.kind}-s{seed}-{name}") for seed in self.seeds]
        return [result for result in found if result is not None]

    def searches(self, row: Row) -> list[dict[str, Any]]:
        """Return a row's searches by seed."""
        return self.pieces(f"search-{row.name.replace(', ', '-')}")

    def reported(self, row: Row) -> list[Scores]:
        """Return a row's scores on the reported half by seed, at the setting that the validation half chose."""
        return [found["reported"] for found in self.searches(row)]

    def bounds(self) -> dict[str, list[Scores]]:
        """Return the scores of what the merges stand between, by name and seed."""
        found = self.pieces("bounds")
        named = {
            "constant answer": "constant",
            "base head": "base",
            **{f"{task.upper()} alone": task for task in TASKS},
        }
        result = {name: [bounds[key] for bounds in found] for name, key in named.items()}
        result["each task by its own"] = [{task: bounds[task][task] for task in TASKS} for bounds in found]
        result["all data pooled"] = [bounds["pooled"] for bounds in found]
        return result

    def table(self) -> dict[str, list[Scores]]:
        """Return Table 3: the scores of every bound and row by seed."""
        return {**self.bounds(), **{row.label: self.reported(row) for row in rows(self.kind)}}

    def sweep(self, name: str, key: str) -> dict[float, list[Scores]]:
        """Return the scores on the reported half by a sweep's value and seed."""
        found = [piece["points"] for piece in self.pieces(name)]
        return {points[0][key]: [point["reported"] for point in points] for points in zip(*found, strict=True)}


def values(scores: Sequence[Scores], column: str) -> list[float]:
    """Return a task's accuracies by seed, or their means over the tasks."""
    return [mean_accuracy(found) if column == MEAN else accuracy(found, column) for found in scores]


def chances(found: Findings) -> tuple[float, float]:
    """Return Wilson's interval of WNLI's accuracy half right, by as many examples as are reported."""
    total = int(found.bounds()["base head"][0]["wnli"]["total"])
    return intervals.proportion(total // 2, total)


@dataclass(frozen=True)
class Point:
    """One merge of some tasks: how much of the updates it loses, and how much accuracy that costs."""

    seed: int
    tasks: tuple[str, ...]
    k: float
    interference: float
    misalignment: float
    lost: float

    @property
    def cluster(self) -> tuple[int, tuple[str, ...]]:
        """What merges of different k share."""
        return self.seed, self.tasks


def points(found: Findings) -> list[Point]:
    """Return a point for each pair of tasks and all of them, each k of the pairs', and each seed.

    Accuracy lost: that of each task's own state less the merge's, mean over the tasks merged, on the reported half.
    """
    result = []
    columns = zip(
        found.seeds,
        *(found.pieces(name) for name in ("bounds", "pairs", "k", "geometry")),
        strict=True,
    )
    for seed, bounds, pairs, ks, geometry in columns:
        triple = [{**point, "tasks": list(TASKS)} for point in ks["points"] if point["k"] in KS_PAIRS]
        for point in [*pairs["points"], *triple]:
            tasks = tuple(point["tasks"])
            lost = [accuracy(bounds[task], task) - accuracy(point["reported"], task) for task in tasks]
            turned = misalignment(geometry["layers"], [TASKS.index(task) for task in tasks], point["k"])
            result.append(Point(seed, tasks, point["k"], point["interference"], turned, float(np.mean(lost))))
    return result


def misalignment(layers: list[dict[str, Any]], clients: list[int], k: float) -> float:
    """Return the mean over clients of 1 - cos(theta*, theta_i), of whole updates, for FroM at k.

    Unlike interference, where a client's loss counts by its weight, every client counts alike: a merge that is one
    client's update alone has interference 0, but points elsewhere than the others.
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
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def correlate(chosen: list[Point], name: str) -> Correlation | None:
    """Return the correlation of a measure with the accuracy lost; None where it is undefined.

    The interval is from a bootstrap of whole clusters (a seed's pair or triple with all its k): merges of one cluster
    are of the same updates. All clusters have equally many merges.
    """
    xs, ys = np.array([[getattr(point, name), point.lost] for point in chosen]).T
    if np.ptp(xs) == 0 or np.ptp(ys) == 0:
        return None
    clusters = sorted({point.cluster for point in chosen})
    members = np.array([[i for i, p in enumerate(chosen) if p.cluster == cluster] for cluster in clusters])
    drawn = np.random.default_rng(0).integers(len(clusters), size=(DRAWS, len(clusters)))
    rows = members[drawn].reshape(DRAWS, -1)
    low, high = np.nanpercentile(_spearman(xs[rows], ys[rows]), [2.5, 97.5])
    rho = float(_spearman(xs[None], ys[None])[0])
    return Correlation(rho, float(low), float(high), len(chosen))


def _spearman(xs: NDArray[np.float64], ys: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rank correlation of each row of (draws, n); NaN where either is constant."""
    x, y = (stats.rankdata(each, axis=1) for each in (xs, ys))
    x, y = (each - each.mean(axis=1, keepdims=True) for each in (x, y))
    sizes = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    return np.divide((x * y).sum(axis=1), sizes, out=np.full(len(x), np.nan), where=sizes > 0)
