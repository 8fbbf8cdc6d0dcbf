"""Singular directions of several matrices, cut where they are rounding: triplets, common bases, polar factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedfrom.merging.linalg.lowrank import random_normal

# Where directions below this share of the largest singular value are rounding anyway, a Gram matrix, which squares the
# condition, gives those above to at least half of their digits, and costs a third and less of an SVD.
_SQUARED = 1e-7
# A matrix with at least so many times the columns of its rank is multiplied by random ones first, a few more than that.
_FEW, _MORE = 4, 8


class Triplets(NamedTuple):
    """The leading singular triplets of a (p, q) matrix: U (p, k), S (k,) descending, Vh (k, q), float64."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def triplets(matrix: Tensor, tolerance: float, bound: int | None = None) -> Triplets:
    """Return the singular triplets whose singular value is above `tolerance` times the largest; none of zeros.

    Parameters
    ----------
    matrix : Tensor
        (p, q), floating point; not changed.
    tolerance : float
        0 <= tolerance < 1.
    bound : int | None (default: None)
        What the matrix's rank is at most, where that is known: with few of many columns the SVD is of a product with
        random ones, whose columns span the matrix's (Halko, Martinsson & Tropp, 2011, exact at the full rank).

    Returns
    -------
    Triplets
        New memory. k is the numerical rank.
    """
    M = matrix.to(torch.float64)
    if bound is not None and _FEW * (bound + _MORE) <= min(M.shape):
        Q = torch.linalg.qr(M @ random_normal(M.shape[1], bound + _MORE, "range").to(M.device)).Q
        U, S, Vh = torch.linalg.svd(Q.T @ M, full_matrices=False)
        U = Q @ U
    else:
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    k = int((tolerance * S[0] < S).sum())
    return Triplets(U[:, :k], S[:k], Vh[:k])


def left_basis(matrices: Sequence[Tensor], tolerance: float) -> Tensor:
    """Return the left singular vectors of [X_1 ... X_n] whose singular value is above `tolerance` times the largest.

    Parameters
    ----------
    matrices : Sequence[Tensor]
        X_i (p, any), at least one of them, floating point; not changed.
    tolerance : float
        0 <= tolerance < 1.

    Returns
    -------
    Tensor
        (p, m) float64, orthonormal columns, by descending singular value, signs open; m = 0 where all X_i are zero.

    Notes
    -----
    Where there are at least p columns in all, and the tolerance is that of float32 or less, from the eigenvectors of
    sum_i X_i X_i^T: O(p^2) memory, one X_i in float64 at a time. Else from the SVD of all side by side.
    """
    if tolerance >= _SQUARED and sum(X.shape[1] for X in matrices) >= len(matrices[0]):
        gram = matrices[0].new_zeros(len(matrices[0]), len(matrices[0]), dtype=torch.float64)
        for X in matrices:
            X = X.to(torch.float64)
            gram.addmm_(X, X.T)
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values.flip(0), vectors.flip(1)
        return vectors[:, values > tolerance**2 * values[0]]
    X = torch.cat([X.to(torch.float64) for X in matrices], dim=1)
    if X.shape[1] > X.shape[0]:  # the long side goes by QR
        X = torch.linalg.qr(X.T, mode="r").R.T
    U, S, _ = torch.linalg.svd(X, full_matrices=False)
    return U[:, tolerance * S[0] < S]


def polar(columns: Tensor, sizes: Tensor, tolerance: float) -> Tensor:
    """Return P Q^T of the SVD X = P diag(s) Q^T, over the directions of X's columns that are not rounding.

    The orthonormal columns closest to X where X has full rank (Schönemann, 1966), else a partial isometry: its singular
    values are 1 and 0. Without the cut a direction that two columns share but for rounding would leave their difference
    as a direction of its own, with the full singular value of 1.

    Parameters
    ----------
    columns : Tensor
        X (p, m) float64: m singular vectors of several matrices.
    sizes : Tensor
        (m,) float64 > 0: each column's singular value as a share of its own matrix's largest.
    tolerance : float
        What is rounding, as a share of the largest singular value. X diag(sizes) tells it, since rounding turns a
        singular vector by 1 / its size, and turns those of about one size into each other; X alone tells neither.

    Returns
    -------
    Tensor
        (p, m) float64, new memory.
    """
    basis = left_basis([columns * sizes], tolerance)
    P, S, Qh = torch.linalg.svd(basis.T @ columns, full_matrices=False)
    kept = tolerance * S[0] < S
    return basis @ (P[:, kept] @ Qh[kept])


def with_fixed_signs(vectors: Tensor, like: Tensor) -> Tensor:
    """Return (p, m) vectors, each negated where its largest entry in `like` is negative.

    `like` (d, m) has the same vectors in other coordinates. Of entries that are equally large but for rounding the
    first decides.
    """
    sizes = like.abs()
    first = (sizes >= (1 - 1e-6) * sizes.amax(dim=0)).to(torch.int8).argmax(dim=0, keepdim=True)
    return vectors * torch.where(like.gather(0, first) < 0, -1.0, 1.0)
