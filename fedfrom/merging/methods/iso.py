"""Iso-C and Iso-CTS: the sum of the updates with all its singular values made equal."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedfrom.merging.linalg.directions import polar, triplets
from fedfrom.merging.methods.spectral import Spectral, Tasks
from fedfrom.numeric import is_number

# Of equal singular values those that a cut to the rank is to keep are larger by this share: far more than rounding,
# which would choose among them, far less than counts.
_AHEAD = 2e-11


def flat(left: Tensor, mean: Tensor, right: Tensor, rank: int | float) -> Tensor:
    """Return mean * left @ right, whose cut to the rank keeps the columns that come first.

    Parameters
    ----------
    left, right : Tensor
        (p, m) and (m, q) float64, orthonormal columns and rows.
    mean : Tensor
        () float64.
    rank : int | float
        Of the cut: see `Destination`. Where it is a share of the energy no column comes before another.
    """
    S = mean.repeat(left.shape[1])
    if isinstance(rank, int):
        S[:rank] *= 1 + _AHEAD
    return left * S @ right


@dataclass(frozen=True, kw_only=True)
class Iso(Spectral):
    """Iso-C, isotropic merging in the common subspace (Marczak et al., 2025, arXiv 2502.04959).

    theta* = coefficient mean(S) U V^T, where U S V^T is the SVD of sum_t theta_t. The coefficient 1 scales the sum, as
    in Task Arithmetic, not the mean: for updates that agree theta* is about T times as long as one of them, and up to
    T times in any case. One model alone does not give itself back, but a model with equal singular values.

    Departures. The mean is over the numerical rank of the sum. The paper's is over min(d_out, d_in), and for LoRA most
    of those singular values are the zeros of a low-rank sum: mean and directions beyond the rank would be arbitrary.
    Where a LoRA module is cut to its rank, the sum's leading directions stay: theta* itself has none. The cut loses
    1 - rank / (rank of the sum) of the energy; a `rank` of T times the clients', or a share such as 0.99, loses none.
    Embedding tables are averaged; the released code merges them like other matrices, and averages CLIP's
    text_projection.

    Parameters
    ----------
    coefficient : float | str (default: 1.0)
        The paper's alpha, which the released code searches from 0.1 to 3. See `Spectral`.
    examples_power, validate, search, rank, solver, iterations, tolerance, seed, gauge
        See `Spectral`, which says too what is averaged.
    """

    def merged(self, tasks: Tasks) -> Tensor:
        """Return mean(S) U V^T."""
        total = tasks.sum()
        U, S, Vh = triplets(total, tasks.tolerance)
        return flat(U, S.mean(), Vh, tasks.rank) if len(S) else total


@dataclass(frozen=True, kw_only=True)
class IsoCTS(Iso):
    """Iso-CTS, isotropic merging in common and task-specific subspaces (Marczak et al., 2025, arXiv 2502.04959).

    Of the r singular directions of sum_t theta_t the first k are common. Each update adds its s = (r - k) / T leading
    directions of what these do not span, theta_t - U_k U_k^T theta_t. All of them side by side are U, S and V:
    theta* = coefficient mean(S) polar(U) polar(V)^T.

    Where the paper leaves it open this follows the released code (github.com/danielm1405/iso-merging): the common
    directions are taken out of an update on the left alone, s is (1 - common_space_fraction) r / T rounded to a whole
    number, k = r - T s, and mean(S) is that of the combined singular values, from before the polar step. Departures: r
    is the numerical rank of the sum, see `Iso`; polar leaves out what is rounding, see `TSV`; an update with fewer than
    s directions left adds those that it has, and the mean is over the directions that there are.

    Parameters
    ----------
    common_space_fraction : float (default: 0.8)
        k / r before rounding, 0 to 1. Where the rest has less than half a direction for each update s is 0, and the
        result Iso-C's.
    coefficient, examples_power, validate, search, rank, solver, iterations, tolerance, seed, gauge
        See `Iso`.
    """

    common_space_fraction: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.common_space_fraction) or not 0 <= self.common_space_fraction <= 1:
            raise ValueError(f"common_space_fraction: expected 0 to 1, found {self.common_space_fraction!r}")

    def merged(self, tasks: Tasks) -> Tensor:
        """Return mean(S) polar(U) polar(V)^T."""
        total, T = tasks.sum(), len(tasks.cores)
        U, S, Vh = triplets(total, tasks.tolerance)
        r = len(S)
        s = min(r // T, round((r - int(r * self.common_space_fraction)) / T))
        if s == 0:
            return flat(U, S.mean(), Vh, tasks.rank) if r else total
        k = r - T * s
        parts, sizes = [(U[:, :k], S[:k], Vh[:k])], [S[:k] / S[0]]
        for scale, (U_t, S_t, Vh_t) in zip(tasks.scales, tasks.triplets(), strict=True):
            # theta_t - U_k U_k^T theta_t, as wide as theta_t's rank
            own, values, mixed = torch.linalg.svd((U_t - U[:, :k] @ (U[:, :k].T @ U_t)) * S_t, full_matrices=False)
            kept = min(s, int((tasks.tolerance * S_t[0] < values).sum()))
            parts.append((own[:, :kept] * math.copysign(1, scale), abs(scale) * values[:kept], mixed[:kept] @ Vh_t))
            sizes.append(values[:kept] / S_t[0])
        left, right = torch.cat([p[0] for p in parts], dim=1), torch.cat([p[2] for p in parts])
        share = torch.cat(sizes)
        left, right = (polar(X, share, tasks.tolerance) for X in (left, right.T))
        return flat(left, torch.cat([p[1] for p in parts]).mean(), right.T, tasks.rank)
