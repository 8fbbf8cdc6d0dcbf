"""The updates of one layer in two bases that all of them share: small matrices that another method merges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedfrom.merging.linalg.directions import left_basis, triplets, with_fixed_signs
from fedfrom.merging.updates import Change, Cores, DenseUpdates, Destination, Updates

Merge = Callable[[Updates, Tensor, Destination], Change]
# An entry of a core at most this share of the client's norm is zero but for float64's rounding, and must not vote.
_ROUNDING = 1e-12


class Space(NamedTuple):
    """Two bases that all updates share, and the updates in them.

    Attributes
    ----------
    left, right : Tensor
        U (p, a) and V (q, b), float64, orthonormal columns, in the coordinates of the cores.
    coordinates : DenseUpdates
        U^T M_i V (a, b), from the shortest update to the longest: the order of the updates depends on the factors they
        came in, and what a method draws on the order.
    order : list[int]
        The place of each of them among the updates.
    cores : Cores
        theta_i, which they came from.
    """

    left: Tensor
    right: Tensor
    coordinates: DenseUpdates
    order: list[int]
    cores: Cores

    def merged(self, change: Merge, coefficients: Tensor, destination: Destination, times: float = 1.0) -> Change:
        """Return theta* = times U M V^T, M what `Method.change` of some method makes of the coordinates."""
        M = self.coordinates.settled(change(self.coordinates, coefficients[self.order], destination))
        return self.cores.lift((times * self.left @ M @ self.right.T).to(self.cores.matrices[0].dtype))


def space(updates: Updates, cores: Cores, left: Tensor, right: Tensor) -> Space:
    """Return the updates in the bases U (p, a) and V (q, b), their signs fixed.

    Each vector's largest entry in the layer's coordinates is positive.
    """
    U, V = with_fixed_signs(left, cores.left(left)), with_fixed_signs(right, cores.right(right))
    found = [U.T @ M.to(U.dtype) @ V for M in cores.matrices]
    for M in found:
        M[M.abs() <= _ROUNDING * torch.linalg.vector_norm(M)] = 0
    order = sorted(range(len(found)), key=updates.sizes.__getitem__)
    return Space(U, V, DenseUpdates([found[i] for i in order], updates.name, updates.tolerance), order, cores)


def bases(updates: Updates, cores: Cores, scales: Sequence[float] | None = None) -> tuple[Tensor, Tensor]:
    """Return the directions of all updates, on the left and on the right.

    Parameters
    ----------
    updates : Updates
        theta_i, at least one of them not zero.
    cores : Cores
        Theirs, in any bases.
    scales : Sequence[float] | None (default: None)
        (n,) s_i, not all 0, what theta_i is multiplied by here; None is 1 each.

    Returns
    -------
    tuple[Tensor, Tensor]
        U (p, a) and V (q, b), float64, in the coordinates of the cores: the left singular vectors of
        [s_1 theta_1 ... s_n theta_n] and those of [s_1 theta_1^T ... s_n theta_n^T], by descending singular value,
        without those that are rounding in the inputs' dtype. Where singular values tie their vectors are any of the
        same span.
    """
    products = updates.products
    sides: list[list[Tensor]] = [[], []]
    for i, M in enumerate(cores.matrices):
        scale = 1.0 if scales is None else scales[i]
        if products is None:
            found = M * scale, M.T * scale
        else:  # as wide as theta_i's rank in place of the stack's
            U, S, Vh = triplets(M, _ROUNDING, products[i].rank)
            found = U * (S * scale), Vh.T * (S * scale)
        for side, part in zip(sides, found, strict=True):
            side.append(part)
    return left_basis(sides[0], updates.tolerance), left_basis(sides[1], updates.tolerance)
