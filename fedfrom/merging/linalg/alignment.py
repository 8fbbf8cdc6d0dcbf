"""One basis for the updates of all clients: the singular value decomposition of the updates side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedfrom.merging.linalg.lowrank import LowRank


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
