"""ACTMat: RegMean with each client's own update in the place of the Gram matrix of its inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedfrom.merging.methods.base import ProductMethod
from fedfrom.merging.updates import Change, Destination, Updates
from fedfrom.numeric import is_number

_EPSILONS = 2  # of the largest singular value, of a plain tensor: directions up to it are rounding


@dataclass(frozen=True, kw_only=True)
class ACTMat(ProductMethod):
    """theta* = (sum_t w_t theta_t C_t)(sum_t w_t C_t)^+, C_t = theta_t^T theta_t (arXiv 2604.01329).

    Here C_t = (1 - rho) theta_t^T theta_t + rho ||theta_t||^2 / d_in I, the paper's at rho = 0. rho = 1 is FroM at
    k = 2: a matrix weight and a scalar weight are the two ends of one line. w_t, proportional to n_t^p, is not in
    the paper: with p = 0 it cancels. At rho = 0 the equation is the released code's (github.com/marawangamal/actmat),
    which takes the pseudoinverse of sum_t C_t itself, cut at the rounding of its arithmetic.

    LoRA modules go by cores, theta_t = U M_t V^T, M_t (p, q): sum_t w_t C_t is V K V^T on the span of V, K = sum_t w_t
    ((1 - rho) M_t^T M_t + rho ||theta_t||^2 / d_in I_q), and a multiple of the identity beyond it, where no theta_t has
    anything. So theta* = U (sum_t w_t M_t C'_t) K^+ V^T is exact, with the layer's d_in and not q. Directions that are
    rounding in the inputs' dtype are left out of K^+. A plain matrix takes an SVD of its n updates on top of each
    other: O(n d_out d_in min(n d_out, d_in)), in float64. Tables of embeddings, and what is no matrix, are averaged.

    Where the updates' row spaces are independent and rho is 0, theta* does on each of them what that theta_t does: it
    interpolates. Where they are also close to each other, as in every round of a federation, it is many times as long
    as all updates, and the merge is refused.

    Parameters
    ----------
    rho : float (default: 0.0)
        0 to 1.
    examples_power, rank, solver, iterations, tolerance, seed, gauge
        See `ProductMethod`.
    """

    rho: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.rho) or not 0 <= self.rho <= 1:
            raise ValueError(f"rho: expected 0 to 1, found {self.rho!r}")

    def change(self, updates: Updates, coefficients: Tensor, destination: Destination) -> Change:
        """Return theta*, or raise ValueError naming the layer where it is longer than sqrt(T) rms ||theta_t||."""
        cores = updates.cores() if updates.is_linear else None
        if cores is None or not any(updates.sizes):
            return updates.sum(coefficients)
        M = torch.stack([core.to(torch.float64) for core in cores.matrices])
        norms = torch.linalg.matrix_norm(M)
        unit = float(norms.max())  # so that no third power leaves the range
        M, norms = M / unit, norms / unit
        core = self._merged(M, coefficients.to(M), updates)
        heard = norms[coefficients.to(M) > 0]
        size, most = float(torch.linalg.matrix_norm(core)), float(torch.linalg.vector_norm(heard))
        if size > most * (1 + 1e-6):
            raise ValueError(
                f"{updates.name!r}: expected a merged update of at most sqrt(T) = {math.sqrt(len(heard)):.3g} times "
                f"the root mean square of the T = {len(heard)} clients' norms, found {size / most:.3g} times that: the "
                "updates' row spaces are independent, or nearly so, and ACTMat interpolates there; take rho "
                "nearer 1 (rho = 1 is FroM at k = 2), or another method"
            )
        return cores.lift((core * unit).to(cores.matrices[0].dtype))

    def _merged(self, M: Tensor, w: Tensor, updates: Updates) -> Tensor:
        """Return the core (p, q) of theta* from (n, p, q) cores of the updates."""
        n, p, q = M.shape
        rho, energies = self.rho, M.square().sum(dim=(1, 2)) / updates.shape[1]
        # with sqrt(w_t) M_t = P_t S Q^T of one SVD, K is Q ((1 - rho) S^2 + rho sum w_t energy_t) Q^T: nothing squared
        # is decomposed, so that small directions keep their digits
        P, S, Qh = torch.linalg.svd((M * w.sqrt()[:, None, None]).reshape(n * p, q), full_matrices=False)
        least = max(updates.tolerance, _EPSILONS * torch.finfo(updates.dtype).eps) * S[0]
        kept = least < S
        P, S, Qh = P[:, kept].reshape(n, p, -1), S[kept], Qh[kept]
        total = torch.zeros(p, len(S), dtype=M.dtype, device=M.device)
        for P_t, w_t, energy in zip(P, w.tolist(), energies.tolist(), strict=True):
            if w_t > 0:
                # sqrt(w_t) P_t S (C_t in the basis Q), C_t = (1 - rho) S P_t^T P_t S / w_t + rho energy I
                own = P_t * S
                total += ((1 - rho) * (own @ (own.T @ own)) / w_t + rho * energy * own) * math.sqrt(w_t)
        weight = (1 - rho) * S.square() + rho * float((w * energies).sum())
        return (total / weight) @ Qh
