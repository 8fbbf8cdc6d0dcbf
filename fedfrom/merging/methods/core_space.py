"""Core Space: TIES and DARE-TIES on small matrices, the updates in the singular directions that all of them have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedfrom.merging.linalg.directions import left_basis, triplets, with_fixed_signs
from fedfrom.merging.methods.base import ProductMethod
from fedfrom.merging.methods.dare import DareTies
from fedfrom.merging.methods.spectral import averaged
from fedfrom.merging.methods.ties import Ties
from fedfrom.merging.updates import Change, Cores, DenseChange, DenseUpdates, Destination, Updates

# An entry of a core at most this share of the client's norm is zero but for float64's rounding, and must not vote.
_ROUNDING = 1e-12


def core_space(updates: Updates, cores: Cores) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return (U, [M_i], V): theta_i = U M_i V^T, with bases that come from the updates alone.

    Parameters
    ----------
    updates : Updates
        theta_i, at least one of them not zero.
    cores : Cores
        Theirs, in any bases.

    Returns
    -------
    tuple[Tensor, list[Tensor], Tensor]
        U (p, a) and V (q, b), float64, in the coordinates of the cores: the left singular vectors of
        [theta_1 ... theta_n] and those of [theta_1^T ... theta_n^T], by descending singular value, without those that
        are rounding in the inputs' dtype, each with its largest entry in the layer's coordinates positive. M_i (a, b).
        Where singular values tie their vectors are any of the same span.
    """
    products = updates.products
    sides: list[list[Tensor]] = [[], []]
    for i, M in enumerate(cores.matrices):
        if products is None:
            found = M, M.T
        else:  # as wide as theta_i's rank in place of the stack's
            U, S, Vh = triplets(M, _ROUNDING, products[i].rank)
            found = U * S, Vh.T * S
        for side, part in zip(sides, found, strict=True):
            side.append(part)
    U, V = (_basis(side, updates.tolerance, lift) for side, lift in zip(sides, (cores.left, cores.right), strict=True))
    merged = [U.T @ M.to(U.dtype) @ V for M in cores.matrices]
    for M in merged:
        M[M.abs() <= _ROUNDING * torch.linalg.vector_norm(M)] = 0
    return U, merged, V


def _basis(matrices: Sequence[Tensor], tolerance: float, lift: Callable[[Tensor], Tensor]) -> Tensor:
    basis = left_basis(matrices, tolerance)
    return with_fixed_signs(basis, lift(basis))


class InCoreSpace(ProductMethod):
    """Merges the cores M_i by the method that it is mixed into; what is no weight of a linear layer is averaged.

    The paper takes U from the factors B side by side and V from the A, so that its M_i depend on which factors a
    product was sent in, and on alpha. Here they come from the products. Of a LoRA module nothing dense is formed. A
    plain matrix, which the paper does not merge, gets its bases from the clients' matrices: all of them are held at
    once, and time is that of an eigendecomposition of each side, O(d_out^3 + d_in^3).
    """

    def change(self, updates: Updates, coefficients: Tensor, destination: Destination) -> Change:
        """Return theta* = U M V^T, M the merged M_i."""
        cores = updates.cores() if updates.is_linear else None
        if cores is None:
            return averaged(updates, coefficients, float(self.coefficient))
        if not any(updates.sizes):
            return updates.sum(coefficients)
        U, merged, V = core_space(updates, cores)
        # by norm, since the order of the updates depends on the factors they came in, and DARE's draws on the order
        order = sorted(range(len(merged)), key=updates.sizes.__getitem__)
        M = super().change(DenseUpdates([merged[i] for i in order], updates.name), coefficients[order], destination)
        assert isinstance(M, DenseChange)  # as `DenseUpdates` give it
        return cores.lift((U @ M.tensor @ V.T).to(cores.matrices[0].dtype))


@dataclass(frozen=True, kw_only=True)
class CoreTies(InCoreSpace, Ties):
    """Core Space (Panariello et al., 2025, arXiv 2509.17786), then TIES on the cores: see `InCoreSpace`.

    An update that is the others' but for rounding in the inputs' dtype adds no direction. Clients send nothing more
    than their state.

    Parameters
    ----------
    density, majority, coefficient, examples_power, validate, search, rank, solver, iterations, tolerance, seed, gauge
        See `Ties`; entries are trimmed by layer, since cores are not comparable between layers.
    scope : str (default: "layer")
        That, and nothing else.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope != "layer":
            raise ValueError(f"scope: expected layer for Core Space, found {self.scope!r}")


@dataclass(frozen=True, kw_only=True)
class CoreDareTies(InCoreSpace, DareTies):
    """Core Space, then DARE and TIES' election on the cores: see `InCoreSpace`.

    Parameters
    ----------
    density, majority, coefficient, form, examples_power, validate, search
    rank, solver, iterations, tolerance, seed, gauge
        See `DareTies`.
    """
