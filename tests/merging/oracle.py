"""The paper's equations on dense float64 matrices, written from the paper (arXiv 2506.02478), not from fedfrom.

Nothing here imports fedfrom. Everything is formed in full: slow, and plain enough to be checked by eye.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def scaling(r: int, lora_alpha: float, use_rslora: bool = False) -> float:
    """s: lora_alpha / r, with rsLoRA lora_alpha / sqrt(r)."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def product(B: Tensor, A: Tensor, s: float = 1.0) -> Tensor:
    """s B A in float64."""
    return s * (B.double() @ A.double())


def weights(
    norms: Sequence[float],
    k: float,
    examples: Sequence[float] | None = None,
    p: float = 0.0,
    given: Sequence[float] | None = None,
) -> list[float]:
    """w_i = u_i n_i^p ||theta_i||^k / sum, in extended precision; k = infinity by its limit. Eq. 1 has k alone."""
    share = np.array([1.0] * len(norms) if examples is None else examples, dtype=np.longdouble) ** np.longdouble(p)
    u = np.array([1.0] * len(norms) if given is None else given, dtype=np.longdouble)
    share, norms = share * u, [norm if own > 0 else 0.0 for norm, own in zip(norms, u, strict=True)]
    largest = max(norms)
    if largest > 0 and k < 0:
        smallest = np.longdouble(min(norm for norm in norms if norm > 0))
        share = share * np.array([(norm / smallest) ** np.longdouble(k) if norm > 0 else 0 for norm in norms])
    if largest > 0 and k > 0:
        relative = np.array(norms, dtype=np.longdouble) / np.longdouble(largest)
        share = share * ((relative >= 1 - 1e-6) if math.isinf(k) else relative ** np.longdouble(k))
    return [float(w) for w in share / share.sum()]


@dataclass(frozen=True)
class Layer:
    """One layer of n clients, dense: what each sent, was sent, and the global W (zeros where there is none)."""

    sent: list[Tensor]
    received: list[Tensor]
    W: Tensor

    @property
    def deltas(self) -> list[Tensor]:
        """theta_i = W_i - ref_i."""
        return [sent.double() - ref.double() for sent, ref in zip(self.sent, self.received, strict=True)]

    @property
    def norms(self) -> list[float]:
        """||theta_i||_F."""
        return [float(delta.norm()) for delta in self.deltas]

    def weights(
        self, k: float, examples: Sequence[float] | None = None, p: float = 0.0, given: Sequence[float] | None = None
    ) -> list[float]:
        """Eq. 1."""
        return weights(self.norms, k, examples, p, given)

    def update(self, w: Sequence[float]) -> Tensor:
        """theta* = sum_i w_i theta_i (Eq. 5)."""
        return torch.stack([w_i * delta for w_i, delta in zip(w, self.deltas, strict=True)]).sum(0)

    def target(self, w: Sequence[float], server_lr: float = 1.0) -> Tensor:
        """T = W + alpha theta*."""
        return self.W.double() + server_lr * self.update(w)

    def objective(self, merged: Tensor, w: Sequence[float], server_lr: float = 1.0) -> float:
        """Eq. 6: sum_i w_i ||merged - T_i||_F^2, T_i = W + alpha theta_i, the sum over clients taken literally."""
        total = 0.0
        for w_i, delta in zip(w, self.deltas, strict=True):
            total += w_i * float((merged.double() - (self.W.double() + server_lr * delta)).square().sum())
        return total

    def size(self, w: Sequence[float]) -> float:
        """sum_i w_i ||theta_i||_F^2, what objectives are compared relative to."""
        return sum(w_i * norm**2 for w_i, norm in zip(w, self.norms, strict=True))

    def lambda_max(self, w: Sequence[float]) -> float:
        """Largest eigenvalue of sqrt(w_i w_j) cos(theta_i, theta_j); a zero delta is orthogonal to all."""
        n, deltas, norms = len(w), self.deltas, self.norms
        matrix = np.zeros((n, n))
        for i in range(n):
            for j in range(n):
                if norms[i] > 0 and norms[j] > 0:
                    cosine = float(((deltas[i] / norms[i]) * (deltas[j] / norms[j])).sum())
                    matrix[i, j] = math.sqrt(w[i] * w[j]) * cosine
        return float(np.linalg.eigvalsh(matrix).max())


def truncated(T: Tensor, rank: int) -> Tensor:
    """The closest matrix of at most that rank: T's truncated SVD (Eckart & Young, 1936)."""
    U, S, Vh = torch.linalg.svd(T.double(), full_matrices=False)
    return U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank]


def singular_values(T: Tensor) -> Tensor:
    """Descending."""
    return torch.linalg.svdvals(T.double())


def is_separated(T: Tensor, rank: int, by: float = 0.01) -> bool:
    """Whether sigma_r and sigma_{r+1} differ by more than 1 %, so that the optimal matrix is well defined."""
    S = singular_values(T)
    return rank >= len(S) or bool(S[rank - 1] * (1 - by) > S[rank])


def algorithm_1(T: Tensor, A_0: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield Algorithm 1's iterates (B, A): Eq. 7, B = T A^T (A A^T)^-1, then Eq. 8, A = (B^T B)^-1 B^T T."""
    A = A_0.double()
    while True:
        B = torch.linalg.solve(A @ A.T, A @ T.T).T
        A = torch.linalg.solve(B.T @ B, B.T @ T)
        yield B, A


def relative_error(found: Tensor, expected: Tensor, size: float | None = None) -> float:
    """||found - expected||_F relative to ||expected||_F, or to the size given."""
    size = float(expected.double().norm()) if size is None else size
    error = float((found.double() - expected.double()).norm())
    return error / size if size > 0 else error
