"""A LoRA factor that no client changed: the merged adapter keeps it to the bit, and the other factor is solved for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedfrom.merging.linalg.lowrank import LowRank
from fedfrom.merging.linalg.rounding import rank_tolerance, rescaled
from fedfrom.merging.solve import Solution


def keep_unchanged(
    W: LowRank | None,
    products: Sequence[LowRank],
    target: LowRank,
    change: LowRank,
    server_lr: float,
    rank: int | float,
    unit: float,
    scaling: float,
) -> Solution | None:
    """Return T in the factor that every client left as it was, or None where there is none that T lies in.

    Where all A are W's A and the rows of T lie in their span, A stays and B = T A^+. Where all B are W's B and the
    columns of T lie in their span, B stays and A = B^+ T. T always lies there for methods whose theta* is a weighted
    sum of the updates, and for others where it happens to. What is lost is at most rounding in the factors' dtype, so
    this is Eq. 6's optimum too.

    Parameters
    ----------
    W : LowRank | None
        One product: what the server had. None is zero.
    products : Sequence[LowRank]
        W_i, one product each: what the clients sent.
    target, change : LowRank
        T = W + alpha theta* and theta*, divided by the unit.
    server_lr : float
        alpha.
    rank : int | float
        Asked for. Only the factor's own rank leaves it as it is.
    unit : float
        A power of two.
    scaling : float
        s that the result's B will be divided by: see `layers.write_adapter`.
    """
    if len(products) + (W is not None) < 2:
        return None
    (_, B, A) = (products[0] if W is None else W).terms[0]
    if rank != len(A):
        return None
    if all(torch.equal(product.terms[0].A, A) for product in products):
        found = _other_factor(A, W, target, change, server_lr, unit)
        if found is not None:
            return _solution(LowRank(found[0], A.to(torch.float64)), found[1])
    if _keep_B(W, products):
        found = _other_factor(B.T, None if W is None else W.T, target.T, change.T, server_lr, unit)
        if found is not None:
            # all of the size is in A, but for what B will be divided by and the result multiplied by
            return _solution(LowRank(B.to(torch.float64), found[0].T * (unit / scaling), scaling / unit), found[1])
    return None


def _keep_B(W: LowRank | None, products: Sequence[LowRank]) -> bool:
    """Return whether every client sent the B that it started from, in its own scaling."""
    scaling, B, _ = (products[0] if W is None else W).terms[0]
    if W is None:  # of B = 0 nothing would be left of A
        return bool(B.any()) and all(torch.equal(product.terms[0].B, B) for product in products)
    return all(torch.equal(B_i, rescaled(B, scaling / s)) for ((s, B_i, _),) in (p.terms for p in products))


def _other_factor(
    A: Tensor, W: LowRank | None, target: LowRank, change: LowRank, server_lr: float, unit: float
) -> tuple[Tensor, float] | None:
    """Return (X, ||X A - T||^2) with X A = T, or None where T's rows do not lie in the span of A's; A is W's A too.

    Where every term of T has that A, as in a weighted sum of updates, X is the sum of the terms' B and the residual 0.
    """
    if all(torch.equal(term.A, A) for term in target.terms):
        return torch.stack([B.to(torch.float64) * c for c, B, _ in target.terms]).sum(dim=0), 0.0
    inverse = torch.linalg.pinv(A.to(torch.float64))
    inside = [A_t.to(torch.float64) @ inverse for _, _, A_t in change.terms]
    own = A.to(torch.float64)
    outside = LowRank.sum(
        [LowRank(B, A_t.to(torch.float64) - x @ own, c) for (c, B, A_t), x in zip(change.terms, inside, strict=True)]
    )
    left = outside.norm()
    if left > rank_tolerance(A.dtype) * change.norm():
        return None
    X = torch.stack([c * (B.to(torch.float64) @ x) for (c, B, _), x in zip(change.terms, inside, strict=True)])
    X = X.sum(dim=0) * server_lr
    if W is not None:
        s, B, _ = W.terms[0]
        X = X + B.to(torch.float64) * (s / unit)
    return X, (server_lr * left) ** 2


def _solution(matrix: LowRank, residual: float) -> Solution:
    return Solution(matrix, matrix.rank, residual, residual, matrix.norm() ** 2, 0)
