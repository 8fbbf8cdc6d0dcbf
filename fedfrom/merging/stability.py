"""A method's weights in each layer, and the bounds on k and alpha that keep rounds from swinging.

Where the merged update is 0, a shift of W by d changes each theta_i by -c d, c the clients' relative progress, and the
merged update by -c (1 + k sum_i w_i u_i u_i^T) d, u_i = theta_i / ||theta_i||: k multiplies the change of the weights.
So a round multiplies the distance along an eigenvector of that sum, its eigenvalue lambda in [0, lambda_max],
by 1 - alpha c (1 + k lambda), and is stable while 0 < alpha c (1 + k lambda) < 2. For k >= 0 the bound is
alpha c (1 + k lambda_max) < 2, along the updates' main line. For k < 0 it is alpha c < 2, along what is orthogonal to
all updates, and 1 + k lambda_max > 0, whatever alpha: below, W moves away from that point towards the nearest client.
At k = -1 every point between two opposed clients is such a point: 1 + k lambda_max is 0 there. Here c is taken for 1,
its most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from torch import Tensor

from fedfrom.merging.layer import LayerUpdates
from fedfrom.merging.linalg.many import largest_of_sketch
from fedfrom.merging.methods.base import Method
from fedfrom.merging.weights import mean_weight

_T = TypeVar("_T")
SAFE = "safe"
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
    cosines : np.ndarray | None
        (n, n) float64 cosines of the updates, in the order of sums; None where there is a sketch.
    mean_weight : float
        Of the user's own weights: see `weights.mean_weight`.
    """

    method: Method
    weights: Tensor
    server_lr: float
    lambda_max: float
    cosines: np.ndarray | None
    mean_weight: float = 1.0

    @cached_property
    def coefficients(self) -> Tensor:
        """(n,) float64 c_i, what the method multiplies the updates by."""
        return self.method.coefficients(self.weights, self.mean_weight)

    @cached_property
    def clients_effective(self) -> float:
        """1 / sum w_i^2."""
        return 1 / math.fsum(w * w for w in self.weights.tolist())


def weigh(
    layers: Sequence[LayerUpdates],
    methods: Sequence[Method],
    examples: Sequence[float] | None,
    given: Sequence[float] | None,
    server_lr: float | str,
) -> list[list[Weighing]]:
    """Return what each method makes of each layer; of several, each falls back to the last before it within bounds.

    Parameters
    ----------
    layers : Sequence[LayerUpdates]
        All with inner products, or all with a sketch.
    methods : Sequence[Method]
        One, which is taken as it is, or candidates that differ in k and the coefficient. A candidate whose k is too
        much for a layer (it is not `stable`, does not `attract`, or 1 / sum w_i^2 < n / 2) gets the next k towards 0
        that is not, of those with its coefficient; the one nearest 0 on its side is taken as it is.
    examples : Sequence[float] | None
        (n,) n_i, in the order given.
    given : Sequence[float] | None
        (n,) u_i, the user's own weights, in the order given. One of 0 is not among the n clients of the bounds.
    server_lr : float | str
        alpha; "safe" is the most, up to 1, that stays within the bound.
    """

    def in_order(numbers: Sequence[float] | None, order: Sequence[int]) -> Sequence[float] | None:
        return None if numbers is None else [numbers[i] for i in order]

    weights = [
        [method.weights(layer, in_order(examples, layer.order), in_order(given, layer.order)) for method in methods]
        for layer in layers
    ]
    found, largest = _lambdas(layers, weights)
    means = [mean_weight(given, examples, method.examples_power) for method in methods]
    clients = None if given is None else sum(u > 0 for u in given)
    return [
        _within_bounds(methods, *each, server_lr, means, clients) for each in zip(weights, largest, found, strict=True)
    ]


def _lambdas(
    layers: Sequence[LayerUpdates], weights: Sequence[Sequence[Tensor]]
) -> tuple[Sequence[np.ndarray | None], list[list[float]]]:
    """Return each layer's cosines, None where it has a sketch, and its lambda_max with each of its weights."""
    grams = [layer.gram.cpu().numpy() for layer in layers if layer.gram is not None]
    if grams:
        found = cosines(np.stack(grams))
        each = np.array([[w.tolist() for w in own] for own in weights])
        return list(found), largest_eigenvalue(found[:, None], each).tolist()
    sketches = [layer.sketch for layer in layers if layer.sketch is not None]
    return [None] * len(layers), [
        [largest_of_sketch(sketch, w) for w in own] for sketch, own in zip(sketches, weights, strict=True)
    ]


def _within_bounds(
    methods: Sequence[Method],
    weights: Sequence[Tensor],
    largest: Sequence[float],
    cosines: np.ndarray | None,
    server_lr: float | str,
    means: Sequence[float],
    clients: int | None,
) -> list[Weighing]:
    """Return one layer's weighings, those that are out of bounds replaced by the next towards k = 0 that is not."""
    every: list[Weighing] = []
    within: list[bool] = []
    for method, w, lambda_max, mean in zip(methods, weights, largest, means, strict=True):
        n = len(w) if clients is None else clients
        alpha = safe_lr(method.k, lambda_max, n, method.step) if isinstance(server_lr, str) else server_lr
        weighing = Weighing(method, w, alpha, lambda_max, cosines, mean)
        every.append(weighing)
        is_steady = stable(alpha * method.step, method.k, lambda_max, n) and attracts(method.k, lambda_max, n)
        within.append(is_steady and weighing.clients_effective >= n / 2)

    def nearest(i: int) -> Weighing:
        side = math.copysign(1, methods[i].k)  # of 0 itself +, and it bounds either side
        alike = [j for j, m in enumerate(methods) if m.coefficient == methods[i].coefficient]
        nearer = [j for j in alike if 0 <= side * methods[j].k <= side * methods[i].k]
        falling = sorted(nearer, key=lambda j: -abs(methods[j].k))
        return every[next((j for j in falling if within[j]), falling[-1])]

    return [weighing if ok else nearest(i) for i, (weighing, ok) in enumerate(zip(every, within, strict=True))]


def once_each(weighings: Sequence[Weighing], merged: Callable[[Weighing], _T]) -> list[_T]:
    """Return merged(w) for each w; those that fell back on another share its result."""
    done: dict[int, _T] = {}
    return [done[id(w)] if id(w) in done else done.setdefault(id(w), merged(w)) for w in weighings]


def stable(server_lr: float, k: float, lambda_max: float, clients: int) -> bool:
    """Return whether alpha (1 + max(k, 0) lambda_max) < 2; one client alone has nobody to swing with.

    A method's own coefficient is to be multiplied into alpha.
    """
    # two opposed clients have lambda_max = 1 but for rounding
    return clients < 2 or lambda_max == 0 or server_lr * (1 + max(k, 0.0) * lambda_max) < 2 * (1 - 1e-6)


def attracts(k: float, lambda_max: float, clients: int) -> bool:
    """Return whether 1 + k lambda_max >= 0: below, rounds move towards the nearest client, not between them."""
    return clients < 2 or k >= 0 or k * lambda_max >= -1 - 1e-6


def safe_lr(k: float, lambda_max: float, clients: int, step: float = 1.0) -> float:
    """Return the most alpha, up to 1, that is stable by a margin; `step` is what a method multiplies the mean by."""
    most = step * (1 + max(k, 0.0) * lambda_max)
    return 1.0 if clients < 2 or lambda_max == 0 or most <= 2 * _MARGIN else 2 * _MARGIN / most


def largest_eigenvalue(cosines: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return lambda_max of sqrt(w_i w_j) cos(theta_i, theta_j); zero deltas count as orthogonal to all.

    Parameters
    ----------
    cosines : np.ndarray
        (..., n, n) float64.
    weights : np.ndarray
        (..., n) float64.

    Returns
    -------
    np.ndarray
        (...) float64.
    """
    root = np.sqrt(weights)
    return np.linalg.eigvalsh(root[..., :, None] * cosines * root[..., None, :])[..., -1].clip(0, 1)


def cosines(grams: np.ndarray) -> np.ndarray:
    """Return (..., n, n) float64 G_ij / sqrt(G_ii G_jj), in [-1, 1]; 0 where an update is zero."""
    squares = np.diagonal(grams, axis1=-2, axis2=-1)
    scale = np.zeros_like(squares)
    np.divide(1, np.sqrt(squares, where=squares > 0, out=np.ones_like(squares)), where=squares > 0, out=scale)
    found = grams * scale[..., :, None]
    found *= scale[..., None, :]
    found += found.swapaxes(-2, -1).copy()
    found *= 0.5
    return found.clip(-1, 1, out=found)
