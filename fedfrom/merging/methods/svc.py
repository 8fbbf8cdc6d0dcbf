"""SVC: another method's result with its singular values calibrated, so that what clients share is counted once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedfrom.merging.linalg.lowrank import LowRank
from fedfrom.merging.methods.wrapping import Wrapper
from fedfrom.merging.updates import Change, Destination, Updates
from fedfrom.numeric import is_number


@dataclass(frozen=True, kw_only=True)
class SVC(Wrapper):
    """Singular Value Calibration (Li et al., 2026, arXiv 2602.05536) of the theta* of any method on products.

    theta* = sum_r sigma_r u_r v_r^T becomes sum_r gamma_r sigma_r u_r v_r^T, gamma_r = n / sum_i max(floor, s_ir),
    s_ir = <u_r^T theta*, u_r^T theta_i> / ||u_r^T theta_i||^2: how many times client i's response along u_r the merge
    has. n equal updates that were summed come out as one. The equations are those of the authors' released code
    (github.com/lyymuwu/SVC), whose alpha is `floor`.

    It departs from that code in three points. Where u_r^T theta_i is rounding, s_ir is 0: there the code divides by at
    least 1e-12, which depends on the unit of theta. Clients of weight 0 are not among the n; all others count alike, so
    that a client of weight 2 is not that client twice. Embedding tables, and what is no matrix, are as `inner` makes
    them in both; in the code CLIP's text_projection is too. From the factors of LoRA modules: O((d_out + d_in) R^2),
    nothing dense unless `inner` is.

    Parameters
    ----------
    inner, inner_options
        The method whose result is calibrated: see `Wrapper`.
    floor : float (default: 1.0)
        Above 0. 1, also the released program's default, never enlarges a singular value; below it, those that the merge
        has shrunk may grow. Its script takes 1 around TSV-M and 1 / n around all others.
    examples_power, rank, solver, iterations, tolerance, seed, gauge
        See `Wrapper`.
    """

    floor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.floor) or not 0 < self.floor < math.inf:
            raise ValueError(f"floor: expected a finite number > 0, found {self.floor!r}")

    def change(self, updates: Updates, coefficients: Tensor, destination: Destination) -> Change:
        """Return the calibrated theta*."""
        change = self._inner.change(updates, coefficients, destination)
        if not updates.is_linear or not any(updates.sizes):
            return change
        found = updates.settled(change)
        U, S, Vh = found.svd() if isinstance(found, LowRank) else torch.linalg.svd(found, full_matrices=False)
        kept = torch.finfo(S.dtype).eps * max(updates.shape) * S[0] < S
        if not kept.any():
            return change
        U, S, Vh = U[:, kept], S[kept], Vh[kept]
        S = S / self._times(updates, coefficients, U, S, Vh)
        return updates.formed(LowRank(U * S, Vh) if isinstance(found, LowRank) else (U * S) @ Vh)

    def _times(self, updates: Updates, coefficients: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
        """Return (m,) 1 / gamma_r: the mean over clients of max(floor, s_ir)."""
        thetas: Sequence[Tensor | LowRank] = updates.matrices() if updates.products is None else updates.products
        rounding = max(updates.tolerance, 64 * torch.finfo(updates.dtype).eps)
        total, counted = torch.zeros_like(S), 0
        weighs = (coefficients != 0).tolist()
        for theta, size, counts in zip(thetas, updates.sizes, weighs, strict=True):
            if not counts and any(weighs):
                continue
            if isinstance(theta, LowRank):
                response = (U.T @ theta.B) @ theta.A
            else:
                response, size = U.T @ theta, float(torch.linalg.vector_norm(theta))  # `sizes` are in another unit
            length = torch.linalg.vector_norm(response, dim=1)
            heard = length > rounding * size
            length = torch.where(heard, length, 1.0)
            share = (S / length) * ((response / length[:, None]) * Vh).sum(dim=1)  # no square leaves the range
            total += torch.where(heard, share, 0.0).clamp_min(self.floor)
            counted += 1
        return total / counted
