"""TSV-M: the leading singular vectors of all updates, made orthonormal, with the singular values that they had."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedfrom.merging.linalg.directions import polar
from fedfrom.merging.methods.spectral import Spectral, Tasks


@dataclass(frozen=True, kw_only=True)
class TSV(Spectral):
    """Task Singular Vectors, TSV-Merge (Gargiulo et al., 2025, arXiv 2412.00081).

    Of each update the top k = min(rank_t, floor(min(d_out, d_in) / T)) singular triplets, side by side as U, S and V;
    theta* = coefficient polar(U) diag(S) polar(V)^T. ||theta*||_F is at most coefficient sqrt(T) times the norm of the
    longest theta_t.

    Departures. polar(X) is P Q^T over the directions that are not rounding in the inputs' dtype. In the paper it is
    over all, which leaves it undefined where updates share directions: two copies of an update that differ in their
    last places would add a second one of noise. With the cut, identical updates of rank k give back that update, times
    the coefficient. k ends at rank_t, where the released code (github.com/AntoAndGar/task_singular_vectors) also takes
    vectors of singular value 0, any of their span, which turn the others in its polar step: of LoRA most. k is at least
    1, where the paper's is 0 for more clients than the smaller side has rows. Where singular values k and k + 1 of an
    update are equal, rounding decides which of its directions stay. The code merges embedding tables like other
    matrices.

    Time is that of T SVDs of the cores, and of two whose side is that of all triplets side by side.

    Parameters
    ----------
    coefficient : float | str (default: 1.0)
        The paper's alpha, which the released code searches from 0.1 to 3. See `Spectral`.
    examples_power, validate, search, rank, solver, iterations, tolerance, seed, gauge
        See `Spectral`, which says too what is averaged.
    """

    def merged(self, tasks: Tasks) -> Tensor:
        """Return polar(U) diag(S) polar(V)^T."""
        k = max(1, tasks.side // len(tasks.cores))
        parts = [(U[:, :k], S[:k], Vh[:k]) for U, S, Vh in tasks.triplets()]
        U, Vh = torch.cat([U for U, _, _ in parts], dim=1), torch.cat([Vh for _, _, Vh in parts])
        S = torch.cat([scale * S for scale, (_, S, _) in zip(tasks.scales, parts, strict=True)])
        sizes = torch.cat([S / S[0] for _, S, _ in parts])
        return polar(U, sizes, tasks.tolerance) * S @ polar(Vh.T, sizes, tasks.tolerance).T
