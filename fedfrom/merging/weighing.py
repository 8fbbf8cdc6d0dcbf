"""What the clients of one layer weigh, how far their updates are clipped, and what keeps rounds from swinging.

Near its fixed point a round multiplies the distance along the updates' main line by 1 - alpha c (1 + k lambda_max), c
the clients' relative progress: it is stable only while alpha c (1 + k lambda_max) < 2. Here c is taken for 1, its most.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedfrom.merging.lowrank import random_normal
from fedfrom.merging.method import Method, Survey

_T = TypeVar("_T")
SAFE = "safe"
MOST_COSINES = 32  # clients whose pairwise cosines a report holds: their number grows with the square
_LANCZOS = 30  # steps
# how near to the bound a safe step comes: a distance along the worst line then shrinks by a fifth a round, at least
_MARGIN = 0.9


@dataclass(frozen=True)
class Weighing:
    """One method's weights in one layer.

    Attributes
    ----------
    method : Method
        With the k that the layer gets.
    weights : Tensor
        (n,) float64 w_i, summing to 1, in the order of sums.
    server_lr : float
        alpha of the layer.
    lambda_max : float
        See `LayerReport`.
    """

    method: Method
    weights: Tensor
    server_lr: float
    lambda_max: float

    @cached_property
    def clients_effective(self) -> float:
        """1 / sum w_i^2."""
        return 1 / math.fsum(w * w for w in self.weights.tolist())


@dataclass(frozen=True)
class Updates:
    """What one layer's updates are, whatever method merges them; tensors and sizes in the order of sums.

    Attributes
    ----------
    norms : list[float]
        (n,) ||theta_i||_F as sent, in the order given.
    factors : list[float]
        (n,) what clipping multiplies them by, in the order given.
    order : list[int]
        Clients in the order that sums run in.
    unit : float
        A power of two of about the layer's size: what follows is in it, so that no square leaves float64's range.
    sizes : list[float]
        (n,) norms after clipping.
    gram : Tensor | None
        (n, n) float64 inner products of the updates, each times any factor above 0: only their cosines count. None
        where there is a sketch.
    sketch : Tensor | None
        (n, m) float64 numbers of each update whose inner products are about those of the updates.
    """

    norms: list[float]
    factors: list[float]
    order: list[int]
    unit: float
    sizes: list[float]
    gram: Tensor | None
    sketch: Tensor | None = None

    def weigh(
        self, methods: Sequence[Method], survey: Survey, examples: Sequence[float] | None, server_lr: float | str
    ) -> list[Weighing]:
        """Return what each method makes of the layer; of several, each falls back to the last before it within bounds.

        Parameters
        ----------
        methods : Sequence[Method]
            One, which is taken as it is, or candidates that differ in k alone, ascending. A candidate whose k is too
            much for this layer, alpha (1 + k lambda_max) >= 2 or 1 / sum w_i^2 < n / 2, gets the largest k below it
            that is not; the first has nothing below it.
        survey : Survey
            Has the norms that count where whole updates are weighed.
        examples : Sequence[float] | None
            (n,) n_i, in the order given.
        server_lr : float | str
            alpha; "safe" is the most, up to 1, that stays within the bound.
        """
        sizes = self.sizes if survey.norms is None else [survey.norms[i] for i in self.order]
        counts = None if examples is None else [examples[i] for i in self.order]
        found: list[Weighing] = []
        for method in methods:
            w = method.weights(torch.tensor(sizes, dtype=torch.float64), counts)
            largest, n = self._lambda_max(w), len(w)
            alpha = safe_lr(method.k, largest, n) if isinstance(server_lr, str) else server_lr
            weighing = Weighing(method, w, alpha, largest)
            within = not found or (stable(alpha, method.k, largest, n) and weighing.clients_effective >= n / 2)
            found.append(weighing if within else found[-1])
        return found

    @cached_property
    def cosines(self) -> np.ndarray | None:
        """(n, n) float64; None where there is a sketch."""
        return None if self.gram is None else cosines(self.gram)

    def _lambda_max(self, weights: Tensor) -> float:
        if self.cosines is not None:
            return largest_eigenvalue(self.cosines, weights)
        assert self.sketch is not None
        return largest_of_sketch(self.sketch, weights)

    def report(self, weighing: Weighing, squares: float, spread: float) -> dict[str, Any]:
        """Return what a layer's report says of the clients, in the order given.

        Parameters
        ----------
        squares : float
            sum_i w_i ||theta_i||^2, in units.
        spread : float
            sum_i w_i ||theta_i - theta*||^2, in units.
        """
        place = sorted(range(len(self.order)), key=self.order.__getitem__)
        few = self.cosines is not None and len(place) <= MOST_COSINES
        k, weights = weighing.method.k, weighing.weights.tolist()
        return {
            "norms": self.norms,
            "weights": [weights[i] for i in place],
            "clients_effective": weighing.clients_effective,
            "interference": spread / squares if squares else 0.0,
            "lambda_max": weighing.lambda_max,
            "cosines": self.cosines[place][:, place].tolist() if few and self.cosines is not None else [],
            "k": "infinity" if k == float("inf") else k,
            "server_lr": weighing.server_lr,
            "clipped": [] if all(factor == 1.0 for factor in self.factors) else self.factors,
        }


def once_each(weighings: Sequence[Weighing], merged: Callable[[Weighing], _T]) -> list[_T]:
    """Return merged(w) for each w; those that fell back on another share its result."""
    done: dict[int, _T] = {}
    return [done[id(w)] if id(w) in done else done.setdefault(id(w), merged(w)) for w in weighings]


def stable(server_lr: float, k: float, lambda_max: float, clients: int) -> bool:
    """Return whether alpha (1 + k lambda_max) < 2; one client alone has nobody to swing with."""
    # two opposed clients have lambda_max = 1 but for rounding
    return clients < 2 or lambda_max == 0 or server_lr * (1 + k * lambda_max) < 2 * (1 - 1e-6)


def safe_lr(k: float, lambda_max: float, clients: int) -> float:
    """Return the most alpha, up to 1, that is stable by a margin."""
    return 1.0 if clients < 2 or lambda_max == 0 else min(1.0, 2 * _MARGIN / (1 + k * lambda_max))


def clip_factors(norms: Sequence[float], clip: float | None) -> list[float]:
    """Return (n,) factors in (0, 1] that bring every norm to at most `clip` times the median of those above 0."""
    heard = [norm for norm in norms if norm > 0]
    if clip is None or not heard:
        return [1.0] * len(norms)
    most = clip * statistics.median(heard)
    return [min(1.0, most / norm) if norm > 0 else 1.0 for norm in norms]


def largest_eigenvalue(cosines: np.ndarray, weights: Tensor) -> float:
    """Return lambda_max of sqrt(w_i w_j) cos(theta_i, theta_j); zero deltas count as orthogonal to all.

    Parameters
    ----------
    cosines : np.ndarray
        (n, n) float64.
    weights : Tensor
        (n,) float64.
    """
    root = np.sqrt(weights.numpy())
    return min(1.0, max(0.0, float(np.linalg.eigvalsh(root[:, None] * cosines * root)[-1])))


def largest_of_sketch(sketch: Tensor, weights: Tensor) -> float:
    """Return `largest_eigenvalue` of the sketch's inner products, in time that is linear in n: by Lanczos.

    Parameters
    ----------
    sketch : Tensor
        (n, m) float64.
    weights : Tensor
        (n,) float64.
    """
    rows = torch.nn.functional.normalize(sketch, dim=1, eps=1e-300) * weights.to(sketch.device).sqrt()[:, None]
    v = random_normal(1, rows.shape[1], "lanczos")[0].to(sketch.device)
    found: list[Tensor] = []
    for _ in range(min(_LANCZOS, *rows.shape)):
        for basis in found * 2:  # once is not orthogonal to rounding
            v = v - (basis @ v) * basis
        length = float(torch.linalg.vector_norm(v))
        if not length > 1e-300:  # zero updates, or no direction is left
            break
        found.append(v / length)
        v = (rows @ found[-1]) @ rows
    images = rows @ torch.stack(found, dim=1)
    return float((torch.linalg.matrix_norm(images, ord=2) ** 2).clamp(0, 1))


def cosines(gram: Tensor) -> np.ndarray:
    """Return (n, n) float64 G_ij / sqrt(G_ii G_jj), in [-1, 1]; 0 where an update is zero."""
    inner: np.ndarray = gram.cpu().numpy()
    scale = np.array([1 / math.sqrt(square) if square > 0 else 0.0 for square in inner.diagonal().tolist()])
    found = np.multiply(inner, scale[:, None])
    found *= scale
    found += found.T.copy()
    found *= 0.5
    np.maximum(found, -1, out=found)
    return np.minimum(found, 1, out=found)
