"""How the size of a product BA is split between its factors: the gauge, which Eq. 6 leaves open."""

from __future__ import annotations

import torch
from torch import Tensor

from fedfrom.merging.linalg.lowrank import LowRank

GAUGES = ("orthonormal", "balanced")
_LINEAR = 3**-0.5  # norm of a row of PEFT's fresh A, whose entries are uniform with the variance 1 / (3 d_in)


def gauged(matrix: LowRank, gauge: str, scale: float, dtype: torch.dtype, embedding: bool) -> LowRank:
    """Return a product in a gauge: row j of A times t_j > 0, column j of B divided by it.

    The product stays, and so does the order of its rows: the leading ones are the best approximation of lower rank.

    Parameters
    ----------
    matrix : LowRank
        BA, one product, float64: A's rows have norm 1, B's columns are orthogonal, see `lowrank.gauge`.
    gauge : str
        "orthonormal": A's rows keep norm 1, and B carries all of the size. "balanced": row j of A is as long as column
        j of B, as both will be stored, and no shorter than a row of a fresh LoRA's A; rows without a column leave as
        long as a fresh one. AdamW's steps do not depend on the factors' sizes: from balanced factors they change BA
        less than from a large B.
    scale : float
        What B will be multiplied by before it is stored.
    dtype : torch.dtype
        In which the factors are stored. In float16 a row may be shorter than a fresh one, so that its column of B keeps
        its digits.
    embedding : bool
        Of LoRA on an embedding table, whose A (PEFT's embedding_B) starts as standard normal: in either gauge its rows
        are at least as long as fresh ones.
    """
    if gauge == "orthonormal" and not embedding:
        return matrix
    ((c, B, A),) = matrix.terms
    fresh = A.shape[1] ** 0.5 if embedding else _LINEAR
    t = torch.full_like(A[:, 0], fresh)
    if gauge == "balanced":
        sizes = torch.linalg.vector_norm(B, dim=0) * scale
        t = torch.maximum(sizes.sqrt(), _shortest(sizes, fresh, len(B), dtype))
    return LowRank(B / t, A * t[:, None], c)


def _shortest(sizes: Tensor, fresh: float, rows: int, dtype: torch.dtype) -> Tensor:
    """Return (r,) the least norm of A's rows: a fresh row's, or less where B's entries were subnormal in float16."""
    least = torch.full_like(sizes, fresh)
    if dtype != torch.float16:
        return least
    normal = 4 * torch.finfo(dtype).tiny * rows**0.5  # norm of a column whose entries are well above the subnormal ones
    return torch.where(sizes > 0, torch.minimum(least, sizes / normal), least)
