"""The leading singular triplets of a matrix, where few of many are asked for: subspace iteration by polynomials."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Below this many rows or columns, or above this share of them asked for, the full SVD is as fast.
_SMALL = 160
_SHARE = 1 / 12
# A polynomial may lift the first direction above the last by this, so that rounding does not swallow the last.
_LIFT = 1e10
_DEGREE = 30
_ROUNDS = 8
# C^T C is formed where C has at most so many times the columns that are held.
_FORMED = 64


def leading_svd(
    C: Tensor, rank: int, tolerance: float, near: float, start: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the first `rank` singular triplets (U, S, Vh) of C; None where the full SVD is the way to them.

    Algorithm 1 is subspace iteration: C^T C once in each step. Here each step is a Chebyshev polynomial of C^T C, small
    on [0, c] and steep above, c the least eigenvalue of the columns held, which are more than those asked for. What is
    found is checked: with rho_i = ||C^T C v_i - S_i^2 v_i||, sum_j S_j^2 is below the optimum by at most the sum of
    rho_i^2 / (S_i^2 - c), or of rho_i. Where that stays too large (many equal singular values), None.

    Parameters
    ----------
    C : Tensor
        (m_out, m_in) float64.
    rank : int
        r >= 1.
    tolerance : float
        How far ||C - U diag(S) Vh||_F^2 may be above its least.
    near : float
        How far the triplets may be turned, rho_i / (S_i^2 - c), where S_r and S_(r+1) are more than 1 % apart, so that
        they are determined.
    start : Tensor
        (m_in, columns), random: at least `columns_of(rank)`.

    Notes
    -----
    Rutishauser (1969), Zhou & Saad (2007). The degree is bounded so that the columns stay independent.
    """
    if not takes_few(C.shape, rank):
        return None
    V = C.T @ (C @ start)
    # formed, C^T C takes one product a degree in place of two
    H = C.T @ C if C.shape[1] <= _FORMED * start.shape[1] else None
    for _ in range(_ROUNDS):
        V = torch.linalg.qr(V).Q
        U, S, W = torch.linalg.svd(C @ V, full_matrices=False)
        V, squares = V @ W.T, S.square()
        image = C.T @ (U * S)
        rho = torch.linalg.vector_norm(image - V * squares, dim=0)[:rank]
        cut, most = float(squares[-1]), float(squares[0])
        gaps = squares[:rank] - cut
        lost = float(torch.minimum(rho.square() / gaps.clamp_min(1e-300), rho).sum())
        apart = float(S[rank]) < 0.99 * float(S[rank - 1])
        if lost <= tolerance and (not apart or bool((rho <= near * gaps + 1e-14 * most).all())):
            return U[:, :rank], S[:rank], V[:, :rank].T
        if not cut > 1e-12 * most:  # the columns hold all there is, but for rounding
            return None
        lift = math.acosh(max(2 * most / cut - 1, 1 + 1e-6))
        before, V = V, image * (2 / cut) - V
        for _ in range(min(_DEGREE, int(math.log(_LIFT) / lift)) - 1):
            image = C.T @ (C @ V) if H is None else H @ V
            before, V = V, image.mul_(4 / cut).sub_(V, alpha=2).sub_(before)
    return None


def takes_few(shape: Sequence[int], rank: int) -> bool:
    """Return whether so few triplets are asked for that iterating is worth a try."""
    return min(shape) >= _SMALL and rank <= _SHARE * min(shape)


def columns_of(rank: int) -> int:
    """Return how many columns the iteration holds: the more there are, the steeper its polynomials."""
    return rank + max(8, rank // 2)
