"""RegMean: the linear layer whose outputs on all clients' inputs are closest to their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedfrom.merging.linalg.lowrank import LowRank
from fedfrom.merging.methods.base import ProductMethod
from fedfrom.merging.updates import Change, Destination, Updates
from fedfrom.numeric import is_number


def shrink(gram: Tensor, off_diagonal: float) -> Tensor:
    """Return a (d, d) Gram matrix with its off-diagonal entries multiplied by `off_diagonal`; float64, new memory."""
    result = gram.to(torch.float64) * off_diagonal
    result.diagonal().copy_(gram.diagonal())
    return result


# a factor's pivots closer than this (squared) are those of a matrix that is safely invertible in float64
_CONDITION = 1e-10
# A column of a Gram matrix with at least this share of its square beyond the span of the columns before it is no
# combination of them: at least this, or so many epsilons of the dtype that the matrix came in.
_APART, _EPSILONS = 1e-3, 32
# Eigenvalues up to so many epsilons of the largest are rounding: up to 0.8 are seen in float32 sums.
_ROUNDING = 2


def divide(rows: Tensor, gram: Tensor) -> Tensor:
    """Return rows @ gram^+ of (any, d) rows and a (d, d) Gram matrix: 0 where no client has inputs.

    By Cholesky, some ten times faster than the pseudo-inverse by eigenvalues, where the matrix is far from singular,
    as off-diagonals that are shrunk make it.
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal()
    if not failed and pivots.min() ** 2 > _CONDITION * pivots.max() ** 2:
        return torch.cholesky_solve(rows.T, factor).T
    return rows @ torch.linalg.pinv(gram, hermitian=True)


def without_rounding(gram: Tensor, grams: Sequence[Tensor]) -> Tensor:
    """Return a sum of Gram matrices without the directions that are rounding in the dtype that these came in.

    With fewer inputs than d_in the sum has eigenvalues of rounding. An inverse would enlarge them until they outweigh
    the update. Rounding is relative to each entry, so it is told from inputs on features of length 1: otherwise one
    feature that is far larger than the others would make all of them count as rounding.

    Parameters
    ----------
    gram : Tensor
        (d, d) float64; not changed.
    grams : Sequence[Tensor]
        What it is the sum of. A float64 matrix counts as float32: clients sum theirs in float32.

    Returns
    -------
    Tensor
        (d, d) float64: the matrix itself where every direction counts.
    """
    eps = max(torch.finfo(torch.float32).eps, *(torch.finfo(each.dtype).eps for each in grams))
    lengths = gram.diagonal().clamp_min(0).sqrt()
    scale = torch.where(lengths > 0, 1 / lengths, 0)
    alike = gram * scale * scale[:, None]
    factor, failed = torch.linalg.cholesky_ex(alike)
    if not failed and bool((factor.diagonal().square() > max(_APART, _EPSILONS * eps)).all()):
        return gram
    values, vectors = torch.linalg.eigh(alike)
    kept = values > _ROUNDING * eps * values[-1]
    half = lengths[:, None] * vectors[:, kept]
    return (half * values[kept]) @ half.T


@dataclass(frozen=True, kw_only=True)
class RegMean(ProductMethod):
    """theta* = (sum_i w_i theta_i G_i)(sum_i w_i G_i)^-1 (Jin et al., 2023, arXiv 2212.09849, Eq. 2, for W (out x in)).

    G_i = mean X^T X of the layer's inputs at client i, off-diagonals multiplied by a. On W_i = W + theta_i the formula
    gives W + theta*, so that the base model cancels: the deltas are enough, for LoRA as for full weights. Needs
    `fedfrom.client.gram` from every client; layers without a G (embeddings, biases, norms) are averaged, as in the
    paper. Time O(d_in^3) a layer, memory of a few d_in^2 beside what clients sent; no d_out x d_in for adapters.

    Parameters
    ----------
    off_diagonal : float (default: 0.9)
        a, 0 <= a <= 1: 0.9 in the paper, 0.1 for T5.
    examples_power : float (default: 0.0)
        p: w_i proportional to n_i^p.
    rank, solver, iterations, tolerance, seed, gauge
        See `Solver`.
    """

    needs: ClassVar[str | None] = "gram"

    off_diagonal: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.off_diagonal) or not 0 <= self.off_diagonal <= 1:
            raise ValueError(f"off_diagonal: expected 0 to 1, found {self.off_diagonal!r}")

    def regress(self, rows: Sequence[Tensor], grams: Sequence[Tensor], weights: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return ([X_i w_i G_i], sum_i w_i G_i without rounding), float64; holds one Gram matrix beside the sum.

        Parameters
        ----------
        rows : Sequence[Tensor]
            X_i (any, d_in): weights, or the factors A.
        grams : Sequence[Tensor]
            G_i (d_in, d_in), of the clients' inputs.
        weights : Tensor
            (n,) w_i.
        """
        products, total = [], torch.zeros(grams[0].shape, dtype=torch.float64, device=grams[0].device)
        for w, x, gram in zip(weights.tolist(), rows, grams, strict=True):
            weighted = shrink(gram, self.off_diagonal).mul_(w)
            products.append(x.to(torch.float64) @ weighted)
            total += weighted
        # shrunk off-diagonals keep the columns apart
        return products, without_rounding(total, grams) if 1 - self.off_diagonal < _APART else total

    def change(self, updates: Updates, coefficients: Tensor, destination: Destination) -> Change:
        """Return theta* (Eq. 2), of a LoRA module as factors A_i G_i (sum G)^-1 in place of A_i; else the mean."""
        grams = updates.statistics("gram")
        if grams is None:
            return updates.sum(coefficients)
        if updates.products is not None:
            return updates.formed(self.regressed(updates.products, grams, coefficients)[0])
        products, total = self.regress(updates.matrices(), grams, coefficients)
        return updates.formed(divide(torch.stack(products).sum(dim=0), total).to(updates.dtype))

    def regressed(self, deltas: Sequence[LowRank], grams: Sequence[Tensor], weights: Tensor) -> tuple[LowRank, Tensor]:
        """Return theta* of a LoRA module, and sum_i w_i G_i.

        Parameters
        ----------
        deltas : Sequence[LowRank]
            theta_i as one product each.
        grams, weights
            See `regress`.
        """
        products, total = self.regress([delta.A for delta in deltas], grams, weights)
        rows = divide(torch.cat(products), total).split([len(x) for x in products])
        return LowRank.sum([LowRank(d.B, x) for d, x in zip(deltas, rows, strict=True)]), total
