"""RegMean: the linear layer whose outputs on all clients' inputs are closest to their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedfrom.merging.linalg.lowrank import LowRank
from fedfrom.merging.linalg.rounding import rank_tolerance
from fedfrom.merging.methods.base import Context, ProductMethod


def shrink(gram: Tensor, off_diagonal: float) -> Tensor:
    """Return a (d, d) Gram matrix with its off-diagonal entries multiplied by `off_diagonal`; float64, new memory."""
    result = gram.to(torch.float64) * off_diagonal
    result.diagonal().copy_(gram.diagonal())
    return result


# A column of a Gram matrix with at least this share of its square beyond the span of the columns before it is no
# combination of them: at least this, or so many epsilons of the dtype that the matrix came in.
_APART, _EPSILONS = 1e-3, 32


def divide(rows: Tensor, gram: Tensor, dtype: torch.dtype = torch.float64, is_shrunk: bool = False) -> Tensor:
    """Return rows @ gram^+, in which directions that no input has are 0.

    By Cholesky, some ten times faster than the pseudo-inverse by eigenvalues, where no column of the Gram matrix is
    near to a combination of others. Off-diagonals that are shrunk see to that. Else the pseudo-inverse leaves out the
    eigenvalues that are rounding in the dtype that the matrix came in: with fewer inputs than d_in those would be
    inverted, and rounding would outweigh the update.

    Parameters
    ----------
    rows : Tensor
        (any, d) float64.
    gram : Tensor
        (d, d) float64, positive semidefinite but for rounding.
    dtype : torch.dtype (default: torch.float64)
        That the Gram matrices came in.
    is_shrunk : bool (default: False)
        Whether its off-diagonals were multiplied by 0.999 or less, so that it has a Cholesky factor.
    """
    kept = gram.diagonal() > 0  # without inputs a column is zero, and so is its row
    if not bool(kept.all()):
        result = torch.zeros_like(rows)
        if bool(kept.any()):
            result[:, kept] = divide(rows[:, kept], gram[kept][:, kept], dtype, is_shrunk)
        return result
    factor, failed = torch.linalg.cholesky_ex(gram)
    apart = 0.0 if is_shrunk else max(_APART, _EPSILONS * torch.finfo(dtype).eps)
    if not failed and bool((factor.diagonal().square() > apart * gram.diagonal()).all()):
        return torch.cholesky_solve(rows.T, factor).T
    return rows @ torch.linalg.pinv(gram, rtol=rank_tolerance(dtype), hermitian=True)


def widest_rounding(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype, of those that the tensors have, that rounds the most."""
    return max((tensor.dtype for tensor in tensors), key=lambda dtype: torch.finfo(dtype).eps)


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
    rank, solver, iterations, tolerance, seed
        See `Solver`.
    """

    linear: ClassVar[bool] = False
    needs: ClassVar[str | None] = "gram"

    off_diagonal: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.off_diagonal <= 1:
            raise ValueError(f"off_diagonal: expected 0 to 1, found {self.off_diagonal}")

    def statistics_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return (d_in, d_in)."""
        return (shape[-1], shape[-1]) if shape else ()

    def regress(self, rows: Sequence[Tensor], grams: Sequence[Tensor], weights: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return ([X_i w_i G_i], sum_i w_i G_i), float64; holds one Gram matrix beside the sum.

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
        return products, total

    def combine(self, deltas: list[Tensor], coefficients: Tensor, context: Context) -> Tensor:
        """Return theta* of (d_out, d_in) weights; without statistics their mean."""
        if context.statistics is None:
            return super().combine(deltas, coefficients, context)
        products, total = self.regress(deltas, context.statistics, coefficients)
        return self._divide(torch.stack(products).sum(dim=0), total, context.statistics).to(deltas[0].dtype)

    def combine_products(self, deltas: list[LowRank], coefficients: Tensor, context: Context) -> LowRank:
        """Return theta* of a LoRA module: the factors A_i G_i (sum G)^-1 in place of A_i."""
        if context.statistics is None:
            return LowRank.sum(deltas, coefficients.tolist())
        return self.regressed(deltas, context.statistics, coefficients)[0]

    def regressed(self, deltas: list[LowRank], grams: list[Tensor], weights: Tensor) -> tuple[LowRank, Tensor]:
        """Return theta* of a LoRA module, and sum_i w_i G_i.

        Parameters
        ----------
        deltas : list[LowRank]
            theta_i as one product each.
        grams, weights
            See `regress`.
        """
        products, total = self.regress([delta.A for delta in deltas], grams, weights)
        rows = self._divide(torch.cat(products), total, grams).split([len(x) for x in products])
        return LowRank.sum([LowRank(d.B, x) for d, x in zip(deltas, rows, strict=True)]), total

    def _divide(self, rows: Tensor, total: Tensor, grams: Sequence[Tensor]) -> Tensor:
        """Return rows @ total^+, total being the weighted sum of these Gram matrices."""
        return divide(rows, total, widest_rounding(grams), is_shrunk=1 - self.off_diagonal >= _APART)
