"""LoRM: the adapter whose outputs on all clients' inputs are closest to theirs, factor by factor in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedfrom.merging.linalg.lowrank import LowRank, random_normal
from fedfrom.merging.methods.regmean import RegMean
from fedfrom.merging.updates import Change, Destination, Updates


@dataclass(frozen=True, kw_only=True)
class LoRM(RegMean):
    """min over B, A of sum_i w_i ||(BA - T_i) G_i^1/2||_F^2, by alternating closed forms (arXiv 2410.17961).

    T_i = W + alpha theta_i, as in Eq. 6. Given A, B = (sum_i w_i T_i G_i A^T)(A sum_i w_i G_i A^T)^+; given B, A =
    B^+ (sum_i w_i T_i G_i)(sum_i w_i G_i)^-1, which is B^+ times RegMean's solution. FroM's Algorithm 1 is this with
    G_i = ||theta_i||^k I. LoRM holds one factor fixed in each round and trains the other; here both are merged, the
    one after the other, until the product settles. Needs `fedfrom.client.gram`; plain tensors go by RegMean.

    Parameters
    ----------
    off_diagonal, examples_power, rank, solver, seed, gauge
        See `RegMean`. A fraction as rank is RegMean, cut by Eq. 6: LoRM needs to know its rank beforehand.
    iterations : int (default: 10000)
        At most so many alternations.
    tolerance : float (default: 1e-9)
        They end when the product moves by less than this share of its norm.
    """

    def change(self, updates: Updates, coefficients: Tensor, destination: Destination) -> Change:
        """Return the theta* with which W + alpha theta* is BA: cut to its rank once, in the metric of the inputs."""
        grams, W, alpha = updates.statistics("gram"), destination.base, destination.server_lr
        if updates.products is None or grams is None or not isinstance(destination.rank, int) or alpha == 0:
            return super().change(updates, coefficients, destination)
        solution, metric = self.regressed(updates.products, grams, coefficients)
        T = solution * alpha if W is None else LowRank.sum([W, solution], [1.0, alpha])
        merged = self._alternate(T, metric, min(destination.rank, *T.shape, T.rank), updates.name)
        return updates.formed(merged * (1 / alpha) if W is None else LowRank.sum([merged, W], [1 / alpha, -1 / alpha]))

    def _alternate(self, T: LowRank, metric: Tensor, rank: int, name: str) -> LowRank:
        """Return the product BA of that rank that is closest to T in the metric (d_in, d_in)."""
        # every A but the first lies in the target's row space: all of it runs in the target's small core
        left, C, right = T.core()
        M = right.project(right.project(metric).T)
        A = random_normal(rank, C.shape[1], f"{self.seed}:{name}").to(C.device)
        result = torch.zeros_like(C)
        for _ in range(self.iterations):
            A = torch.linalg.qr(A.T).Q.T  # its span is all that counts
            B = C @ (M @ A.T) @ torch.linalg.pinv(A @ M @ A.T, hermitian=True)
            A = torch.linalg.pinv(B) @ C
            before, result = result, B @ A
            if torch.linalg.matrix_norm(result - before) <= self.tolerance * torch.linalg.matrix_norm(result):
                break
        return LowRank(left.lift(B), right.lift(A.T).T)
