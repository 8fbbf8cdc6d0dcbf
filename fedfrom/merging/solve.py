"""Eq. 6: the adapter of a given rank that is closest to the merged update, exactly or by Algorithm 1.

With the weights fixed, Eq. 6, min over B, A of sum_i w_i ||BA - T_i||_F^2 with T_i = W + alpha theta_i, differs from
||BA - T||_F^2, T = sum_i w_i T_i, by a constant. So its global optimum is T's truncated SVD (Eckart & Young, 1936), and
Algorithm 1, which alternates Eq. 7 and Eq. 8, is subspace iteration towards it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedfrom.merging.linalg.gauges import GAUGES
from fedfrom.merging.linalg.krylov import Triplets, krylov_svd
from fedfrom.merging.linalg.leading import columns_of, leading_svd, takes_few
from fedfrom.merging.linalg.lowrank import LowRank, gauge, random_normal
from fedfrom.merging.linalg.stack import Stack
from fedfrom.numeric import is_number, is_whole

SOLVERS = ("svd", "alternating")
# a Solver's options that concern adapters alone; the seed is also that of methods that draw
RANK_OPTIONS = ("rank", "solver", "iterations", "tolerance", "gauge")
# Float32 is not taken for a sum with less than this share of its parts' energy, nor for updates with less than this
# share of W's energy.
_CANCELLED, _DWARFED = 1e-2, 1e-1


@dataclass(frozen=True)
class Solution:
    """The factors that solve Eq. 6 for one layer, and how well.

    Attributes
    ----------
    matrix : LowRank
        BA in the gauge, float64.
    rank : int
        What Eq. 6 was solved at; the factors may have more rows and columns.
    residual : float
        ||BA - T||_F^2.
    optimum : float
        The least residual any matrix of this rank can have: the sum of T's squared singular values beyond it.
    energy : float
        ||T||_F^2.
    iterations : int
        Of Algorithm 1; 0 for the exact solver.
    """

    matrix: LowRank
    rank: int
    residual: float
    optimum: float
    energy: float
    iterations: int


@dataclass(frozen=True, kw_only=True)
class Solver:
    """How Eq. 6 is solved: the settings that every method that merges adapters shares.

    Parameters
    ----------
    rank : int | float | None (default: None)
        Rank of the merged adapter: an int >= 1; a fraction, 0 < rank < 1, of the squared singular values to keep, in
        each layer; None for the rank of the reference, or of the largest client where there is none.
    solver : str (default: "svd")
        "svd", the global optimum, or "alternating", the paper's Algorithm 1.
    iterations : int (default: 10000)
        Algorithm 1 stops after so many iterations. They run in the stack's small core; hundreds are usual.
    tolerance : float (default: 1e-9)
        Algorithm 1 stops when an iteration lowers the objective by less than this share of sum_i w_i ||theta_i||^2.
    seed : int (default: 0)
        Of Algorithm 1's random A_0.
    gauge : str (default: "orthonormal")
        How the product's size is split between its factors, which training goes on from: "orthonormal", all of it in B,
        or "balanced", in both alike: see `fedfrom.merging.linalg.gauges.gauged`.
    """

    rank: int | float | None = None
    solver: str = "svd"
    iterations: int = 10_000
    tolerance: float = 1e-9
    seed: int = 0
    gauge: str = "orthonormal"

    def __post_init__(self) -> None:
        is_fraction = isinstance(self.rank, float) and 0 < self.rank < 1
        if self.rank is not None and not is_fraction and not (is_whole(self.rank) and self.rank >= 1):
            raise ValueError(f"rank: expected an int >= 1, a fraction in (0, 1) or None, found {self.rank!r}")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, found {self.solver!r}")
        if self.gauge not in GAUGES:
            raise ValueError(f"gauge: expected one of {', '.join(GAUGES)}, found {self.gauge!r}")
        if not is_whole(self.iterations) or self.iterations < 1:
            raise ValueError(f"iterations: expected a whole number >= 1, found {self.iterations!r}")
        if not is_number(self.tolerance) or not self.tolerance >= 0:
            raise ValueError(f"tolerance: expected a number >= 0, found {self.tolerance!r}")

    def solve(
        self,
        target: LowRank,
        rank: int | float,
        name: str = "",
        scale: float = 1.0,
        rows: int | None = None,
        stack: Stack | None = None,
        energy_apart: float = 0.0,
    ) -> Solution:
        """Solve Eq. 6 for one layer.

        Parameters
        ----------
        target : LowRank
            T = W + alpha theta*, (d_out, d_in).
        rank : int | float
            r, at least 1, or a fraction of the energy to keep.
        name : str (default: "")
            The layer's name: with the seed it fixes A_0 and the gauge's completion.
        scale : float (default: 1.0)
            sum_i w_i ||theta_i||^2, what the tolerance is relative to.
        rows : int | None (default: None)
            Rows of the A that comes out, at least r: the gauge fills those beyond r. None is r.
        stack : Stack | None (default: None)
            See `LowRank.core`.
        energy_apart : float (default: 0.0)
            What ||T||_F^2 would be if T's parts, W and the clients' shares, were orthogonal. Where it is far less, the
            parts cancel.
        """
        if self.solver == "svd" and isinstance(rank, int) and takes_few(target.shape, rank):
            found = _by_products(target, rank, scale, stack, energy_apart)
            if found is not None:
                matrix = gauge(found.U, found.S, found.Vh, rank=rows or rank, name=name)
                beyond = max(0.0, found.energy - float(found.S.square().sum()))
                return Solution(matrix, rank, beyond, beyond, found.energy, 0)
        left, C, right = target.core(stack)
        energy = float(torch.linalg.matrix_norm(C)) ** 2
        few = self._few(C, rank, scale, energy, narrow=all(B.dtype != torch.float64 for _, B, _ in target.terms))
        U, S, Vh = few or torch.linalg.svd(C, full_matrices=False)
        beyond = max(0.0, energy - float(S.square().sum())) if few else 0.0
        # tail[r] = sum over j >= r
        tail = torch.cat([S.square(), S.new_tensor([beyond])]).flip(0).cumsum(0).flip(0)
        if isinstance(rank, float):
            # rounding of the tail's sums must not ask for one more
            rank = max(1, int((tail > (1 - rank) * energy * (1 + 1e-12)).sum()))
            rank = rank if rows is None else min(rank, rows)
        optimum = residual = float(tail[min(rank, len(S))])
        iterations = 0
        if self.solver == "alternating" and energy > 0:
            A_0 = random_normal(rank, target.shape[1], f"{self.seed}:{name}").to(C.device)
            least = self.tolerance * scale
            B, A, residual, iterations = algorithm_1(C, right.project(A_0.T).T, least, self.iterations)
            small, S, Vh = torch.linalg.svd(A, full_matrices=False)
            U = B @ small
        U, Vh = left.lift(U[:, :rank]), right.lift(Vh[:rank].T).T
        matrix = gauge(U, S[:rank], Vh, rank=rows or rank, name=name)
        return Solution(matrix, rank, residual, optimum, energy, iterations)

    def _few(
        self, C: Tensor, rank: int | float, scale: float, energy: float, narrow: bool
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the leading triplets where they are all that is needed and there is a faster way to them."""
        if self.solver != "svd" or isinstance(rank, float) or not takes_few(C.shape, rank):
            return None
        # a tenth and less of what factors in float32 or less, or in float64, can tell apart
        most_lost, most_turned = (1e-10, 1e-7) if narrow else (1e-14, 1e-12)
        start = random_normal(C.shape[1], columns_of(rank), "leading").to(C.device)
        return leading_svd(C, rank, most_lost * scale + 1e-16 * energy, most_turned, start)


def _by_products(target: LowRank, rank: int, scale: float, stack: Stack | None, energy_apart: float) -> Triplets | None:
    """Return T's leading triplets by products with it, where there are so many factors that this costs less."""
    columns, width = columns_of(rank), target.shape[1]
    if stack is None or not stack.holds(target.terms):
        stack = Stack([target.terms])
    narrow = stack.is_narrow and scale >= _DWARFED * energy_apart
    for dtype in (torch.float32, torch.float64)[0 if narrow else 1 :]:
        T = stack.operator(target.terms, columns, dtype)
        if T is None:
            return None
        single = dtype == torch.float32
        # a third and less of what factors in float32 may be off, what is found being bounded, and see `Solver._few`
        most_lost, most_turned = (3e-10, 1e-6) if single else (1e-14, 1e-12)
        start = random_normal(width, columns, "leading").to(stack.left.device)
        found = krylov_svd(T, rank, most_lost * scale, most_turned, start, energy_probes(width).to(start.device))
        # where T's parts cancel, float32's rounding of them is no longer small beside what they leave
        if found is None or not single or found.energy >= _CANCELLED * energy_apart:
            return found
    return None


def energy_probes(width: int) -> Tensor:
    """Return (width, 64) standard normal columns that energies are estimated from: see `krylov.energy_of`."""
    return random_normal(width, 64, "energy")


def algorithm_1(T: Tensor, A_0: Tensor, least: float, iterations: int) -> tuple[Tensor, Tensor, float, int]:
    """Return Algorithm 1's (B, A, ||BA - T||_F^2, iterations): B by Eq. 7, then A by Eq. 8, until nothing is gained.

    The paper's stopping rule: an iteration that lowers the objective by no more than a tolerance is the last. The best
    iterate is returned, not a worse one after it.

    Parameters
    ----------
    T : Tensor
        (p, q), the target or its core Q_B^T T Q_A (every iterate lies in T's row and column spaces).
    A_0 : Tensor
        (r, q), the start, or its core A_0 Q_A.
    least : float
        The tolerance: what an iteration has to gain, in the unit of ||T||_F^2.
    iterations : int
        At most that many, at least 1.
    """
    B, A, objective = half_steps(T, A_0)
    for done in range(2, iterations + 1):
        after = half_steps(T, A)
        gain = objective - after[2]
        if gain > 0:
            B, A, objective = after
        if gain <= least:
            return B, A, objective, done
    return B, A, objective, iterations


def half_steps(T: Tensor, A: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return (B, A, ||BA - T||_F^2) after one iteration of Algorithm 1 from A: Eq. 7, then Eq. 8.

    Eq. 7 is B = T A^T (A A^T)^-1 and Eq. 8 is A = (B^T B)^-1 B^T T. Only the spans of A's rows and B's columns enter
    the product BA, so each half-step takes an orthonormal basis of that span by QR, in place of the normal equations,
    which square its condition number: BA is the same, B comes out with orthonormal columns.
    """
    B = torch.linalg.qr(T @ _orthonormal_rows(A).T).Q  # Eq. 7
    A = B.T @ T  # Eq. 8
    return B, A, float(torch.linalg.matrix_norm(B @ A - T)) ** 2


def _orthonormal_rows(A: Tensor) -> Tensor:
    return torch.linalg.qr(A.T).Q.T
