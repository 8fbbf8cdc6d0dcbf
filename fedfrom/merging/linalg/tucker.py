"""The two subspaces that keep most of several matrices: the Tucker-2 decomposition, by HOSVD and HOOI."""

from __future__ import annotations

import torch
from torch import Tensor

from fedfrom.merging.linalg.directions import left_basis


def tucker2(X: Tensor, rank: int, least: float, iterations: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return U and V, for which sum_i ||U^T X_i V||_F^2 is as large as alternating between the two makes it.

    max over U, V of sum_i ||U^T X_i V||^2 is min over U, V and O_i of sum_i ||X_i - U O_i V^T||^2. Given V, U is the
    leading left singular vectors of [X_1 V ... X_n V]; given U, V is those of [X_1^T U ... X_n^T U] (higher-order
    orthogonal iteration, De Lathauwer, De Moor & Vandewalle, 2000b). It starts from the leading right singular vectors
    of the X_i on top of each other (HOSVD), and ends in a stationary point, which need not be the best one.

    Parameters
    ----------
    X : Tensor
        (n, a, b) float64, not all zero, in coordinates whose axes are its own directions: sum_i X_i^T X_i is diagonal
        and descending. Not changed.
    rank : int
        r >= 1.
    least : float
        The iteration ends when a step gains no more than this share of sum_i ||X_i||_F^2.
    iterations : int
        At most so many steps, at least 1.
    tolerance : float
        Directions at and below this share of the largest are left out, 0 <= tolerance < 1.

    Returns
    -------
    tuple[Tensor, Tensor]
        U (a, at most r) and V (b, at most r), orthonormal columns, by descending singular value, signs open.
    """
    V = torch.eye(X.shape[2], dtype=X.dtype, device=X.device)[:, :rank]
    energy, held = float(X.square().sum()), 0.0
    for _ in range(iterations):
        U = left_basis(list(X @ V), tolerance)[:, :rank]
        V = left_basis(list(X.mT @ U), tolerance)[:, :rank]
        before, held = held, float((U.T @ X @ V).square().sum())
        if held - before <= least * energy:
            break
    return U, V
