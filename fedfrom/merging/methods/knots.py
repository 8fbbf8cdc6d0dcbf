"""KnOTS: the updates in one shared basis, so that what is merged there is aligned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fedfrom.merging.linalg.lowrank import LowRank
from fedfrom.merging.methods.base import ProductMethod
from fedfrom.merging.methods.dare import DareTies
from fedfrom.merging.methods.task_arithmetic import TaskArithmetic
from fedfrom.merging.methods.ties import Ties
from fedfrom.merging.updates import Change, DenseChange, DenseUpdates, Destination, Updates


def align(deltas: Sequence[LowRank], tolerance: float = 1e-12) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return (U, S, [V_i]): the SVD of the updates side by side, [theta_1 ... theta_n] = U diag(S) [V_1 ... V_n].

    Parameters
    ----------
    deltas : Sequence[LowRank]
        n of one shape (d_out, d_in), with R columns of factors in all.
    tolerance : float (default: 1e-12)
        Directions whose singular value is at most this share of the largest are left out, as rounding: their rows of V
        would count as much as all others.

    Returns
    -------
    tuple[Tensor, Tensor, list[Tensor]]
        U (d_out, m), S (m,) descending, V_i (m, d_in), float64, m <= min(R, d_out) the numerical rank; each row of
        [V_1 ... V_n] with its largest entry positive.

    Notes
    -----
    From the factors: QR of the B's side by side, then of what is left of each A^T: O((d_out + n d_in) R^2) time and
    n R d_in numbers of memory; no d_out x d_in matrix.
    """
    # what all updates share (the global B that each is taken from) enters once
    distinct = {id(term.B): term.B.to(torch.float64) for delta in deltas for term in delta.terms}
    B = torch.cat(list(distinct.values()), dim=1)
    Q, R = (None, B) if B.shape[1] >= B.shape[0] else torch.linalg.qr(B)
    parts = dict(zip(distinct, R.split([each.shape[1] for each in distinct.values()], dim=1), strict=True))
    side_by_side = torch.cat(
        [sum((c * parts[id(B_i)]) @ A_i.to(torch.float64) for c, B_i, A_i in delta.terms) for delta in deltas],
        dim=1,
    )
    # the long side goes by QR, the SVD is of the small square that is left
    V, small = torch.linalg.qr(side_by_side.T)
    del side_by_side  # as large as what follows
    U, S, W = torch.linalg.svd(small.T, full_matrices=False)
    kept = max(1, int((tolerance * S[0] < S).sum()))
    Vh = W[:kept] @ V.T
    del V
    # what is zero but for rounding (a client that trained nothing, a column none of it touches) must not vote
    Vh[Vh.abs() <= (64 * torch.finfo(S.dtype).eps * S[0] / S[:kept].clamp_min(torch.finfo(S.dtype).tiny))[:, None]] = 0
    # an SVD leaves the signs open, and where an election of signs is even they decide
    signs = torch.sign(Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True)))
    left = U[:, :kept] if Q is None else Q @ U[:, :kept]
    return left * signs.T, S[:kept], list(Vh.mul_(signs).split(deltas[0].shape[1], dim=1))


class Aligned(ProductMethod):
    """Merges the V_i of LoRA modules by the method that it is mixed into, which gets plain tensors as they are."""

    def change(self, updates: Updates, coefficients: Tensor, destination: Destination) -> Change:
        """Return theta* = U diag(S) V, V the merged V_i."""
        if updates.products is None:
            return super().change(updates, coefficients, destination)
        U, S, V_i = updates.once("knots", partial(self._aligned, updates))  # for all candidates of other coefficients
        V = super().change(V_i, coefficients, destination)
        assert isinstance(V, DenseChange)  # as `DenseUpdates` give it
        return updates.formed(LowRank(U * S, V.tensor), V.coefficients)

    def _aligned(self, updates: Updates) -> tuple[Tensor, Tensor, DenseUpdates]:
        """Return U, S and the V_i as updates."""
        assert updates.products is not None
        U, S, parts = align(updates.products, updates.tolerance)
        return U, S, DenseUpdates(parts, updates.name)


@dataclass(frozen=True, kw_only=True)
class KnotsTA(Aligned, TaskArithmetic):
    """KnOTS (Stoica et al., 2025, arXiv 2410.19735), then Task Arithmetic: the same as Task Arithmetic, by way of V.

    The V_i are merged without the singular values and trimmed layer by layer, as the paper's text has it. The released
    code (github.com/gstoica27/KnOTS) multiplies V by S before it is merged, trims over all layers at once, and drops
    directions with S <= 1e-5, so its TIES keeps other entries than this one. Here a direction is dropped where it is
    rounding in the inputs' dtype: see `rounding.rank_tolerance`. Nothing dense: see `align`. Clients send nothing more
    than their state.

    Parameters
    ----------
    coefficient, form, examples_power, validate, search, rank, solver, iterations, tolerance, seed
        See `TaskArithmetic`.
    """


@dataclass(frozen=True, kw_only=True)
class KnotsTies(Aligned, Ties):
    """KnOTS, then TIES on the V parts.

    Parameters
    ----------
    density, majority, coefficient, examples_power, validate, search, rank, solver, iterations, tolerance, seed
        See `Ties`; entries are trimmed by layer, since V's are not comparable between layers.
    scope : str (default: "layer")
        That, and nothing else.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope != "layer":
            raise ValueError(f"scope: expected layer for KnOTS, found {self.scope!r}")


@dataclass(frozen=True, kw_only=True)
class KnotsDareTies(Aligned, DareTies):
    """KnOTS, then DARE and TIES' election on the V parts.

    Parameters
    ----------
    density, majority, coefficient, form, examples_power, validate, search, rank, solver, iterations, tolerance, seed
        See `DareTies`.
    """
