"""LowRank: a matrix kept as a sum of products scaling * B @ A, never formed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A difference this far below its terms (in squared norm) has lost too many digits in Gram products.
_CANCELLED = 1e-6
# A difference below this many rounding errors of its terms is zero.
_ROUNDING = 64 * torch.finfo(torch.float64).eps


class _Term(NamedTuple):
    coefficient: float
    B: Tensor
    A: Tensor


Cores = dict[tuple[tuple[int, int], ...], Any]
"""What `LowRank.core` keeps of stacks of factors, for other sums of the same ones; lives no longer than they do."""


class LowRank:
    """The matrix scaling * B @ A, or a sum of such products, kept as factors.

    Sums and multiples are lazy: they hold the factors they were made of, and a product that occurs twice
    (the same two tensors) is held once, so that W + sum_i w_i (W_i - W) costs no more than its distinct terms.
    Arithmetic is float64. Nothing here changes a tensor it was given.

    Parameters
    ----------
    B : Tensor
        (d_out, r), floating point.
    A : Tensor
        (r, d_in), floating point, on B's device.
    scaling : float (default: 1.0)
        lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA.

    Raises
    ------
    ValueError
        B and A are not matrices that can be multiplied.
    """

    def __init__(self, B: Tensor, A: Tensor, scaling: float = 1.0) -> None:
        if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
            raise ValueError(
                f"expected B (d_out, r) and A (r, d_in) with one r, found B {tuple(B.shape)} and A {tuple(A.shape)}"
            )
        self.terms: tuple[_Term, ...] = (_Term(float(scaling), B, A),)

    @classmethod
    def from_dense(cls, matrix: Tensor) -> LowRank:
        """Return a (d_out, d_in) matrix that is dense already, as the product of it and the smaller identity."""
        identity = torch.eye(min(matrix.shape), dtype=matrix.dtype, device=matrix.device)
        return cls(identity, matrix) if matrix.shape[0] < matrix.shape[1] else cls(matrix, identity)

    @classmethod
    def sum(cls, matrices: Sequence[LowRank], coefficients: Sequence[float] | None = None) -> LowRank:
        """Return sum_i c_i M_i by stacking factors; equal terms are held once and cancelled ones dropped.

        Parameters
        ----------
        matrices : Sequence[LowRank]
            At least one, all of one shape and device.
        coefficients : Sequence[float] | None (default: None)
            c_i; None means all 1.
        """
        if coefficients is None:
            coefficients = [1.0] * len(matrices)
        if len({matrix.shape for matrix in matrices}) != 1:
            raise ValueError(f"expected matrices of one shape, found {[matrix.shape for matrix in matrices]}")
        totals: dict[tuple[int, int], list] = {}
        for c, matrix in zip(coefficients, matrices, strict=True):
            for term in matrix.terms:
                entry = totals.setdefault((id(term.B), id(term.A)), [0.0, 0.0, term])
                entry[0] += float(c) * term.coefficient
                entry[1] += abs(float(c) * term.coefficient)
        kept = [_Term(c, t.B, t.A) for c, size, t in totals.values() if abs(c) > 1e-15 * size]
        result = cls.__new__(cls)
        first = next(iter(totals.values()))[2]
        result.terms = tuple(kept) or (_Term(0.0, first.B, first.A),)
        return result

    def __add__(self, other: LowRank) -> LowRank:
        return LowRank.sum([self, other])

    def __sub__(self, other: LowRank) -> LowRank:
        return LowRank.sum([self, other], [1.0, -1.0])

    def __mul__(self, factor: float) -> LowRank:
        return LowRank.sum([self], [factor])

    __rmul__ = __mul__

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        term = self.terms[0]
        return term.B.shape[0], term.A.shape[1]

    @property
    def rank(self) -> int:
        """Columns of the stacked factors: a bound on the matrix's rank."""
        return sum(term.A.shape[0] for term in self.terms)

    @property
    def T(self) -> LowRank:
        """The transpose."""
        result = LowRank.__new__(LowRank)
        result.terms = tuple(_Term(c, A.T, B.T) for c, B, A in self.terms)
        return result

    @property
    def B(self) -> Tensor:
        """(d_out, rank) float64, new memory; the coefficients of the terms are in here."""
        return torch.cat([B.to(torch.float64) * c for c, B, _ in self.terms], dim=1)

    @property
    def A(self) -> Tensor:
        """(rank, d_in) float64, new memory."""
        return torch.cat([A.to(torch.float64) for _, _, A in self.terms], dim=0)

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the (d_out, d_in) matrix, computed in float64; new memory."""
        return (self.B @ self.A).to(dtype)

    def leading(self, rank: int) -> LowRank:
        """Return the product of the first `rank` columns of each B and rows of each A (views)."""
        result = LowRank.__new__(LowRank)
        result.terms = tuple(_Term(c, B[:, :rank], A[:rank]) for c, B, A in self.terms)
        return result

    def inner(self, other: LowRank) -> float:
        """Return the Frobenius inner product <self, other> from Gram products of the factors."""
        return float(((self.B.T @ other.B) * (self.A @ other.A.T)).sum())

    def norm(self) -> float:
        """Return the Frobenius norm, without forming the matrix.

        ||BA||_F^2 = <B^T B, A A^T>. Where the terms cancel (a delta far smaller than the two products it is the
        difference of) the digits are gone from that sum, and the norm is taken of R_B R_A^T, the R factors of thin
        QR. A result within rounding of its terms is exactly 0, so a client that trained nothing has no norm.
        Infinite or NaN factors give an infinite or NaN norm.
        """
        B, A = self.B, self.A
        # Scaling by the largest entries keeps the squares (fourth powers of entries) in range.
        b, a = float(B.abs().amax()), float(A.abs().amax())
        if b == 0.0 or a == 0.0 or not (b * a < float("inf")):
            return b * a
        B, A = B / b, A / a
        if self.rank > max(self.shape):  # the products of all columns would outgrow the matrix
            size = float((torch.linalg.vector_norm(B, dim=0) * torch.linalg.vector_norm(A, dim=1)).sum())
            norm = float(torch.linalg.matrix_norm(B @ A))
            return b * a * norm if norm > _ROUNDING * size else 0.0
        products = (B.T @ B) * (A @ A.T)
        square, size = float(products.sum()), float(products.abs().sum())
        if square > _CANCELLED * size:
            return b * a * square**0.5
        rows = torch.linalg.qr(B, mode="r").R @ torch.linalg.qr(A.T, mode="r").R.T
        norm = float(torch.linalg.matrix_norm(rows))
        return b * a * norm if norm > _ROUNDING * size**0.5 else 0.0

    def core(self, cores: Cores | None = None) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Return (Q_B, C, Q_A) with self = Q_B C Q_A^T, Q's with orthonormal columns, float64.

        The thin QRs of the stacked factors cost O((d_out + d_in) R^2). Where the stack is at least as wide as the
        matrix is narrow that costs more than forming the matrix: then C is the matrix and both Q's are None.

        Parameters
        ----------
        cores : Cores | None (default: None)
            Keeps the QRs, which do not depend on the terms' coefficients.
        """
        if self.rank >= min(self.shape):
            return None, self.B @ self.A, None
        key = tuple((id(term.B), id(term.A)) for term in self.terms)
        if cores is None or key not in cores:
            unscaled = torch.cat([term.B.to(torch.float64) for term in self.terms], dim=1)
            found = (*torch.linalg.qr(unscaled), *torch.linalg.qr(self.A.T))
            if cores is not None:
                cores[key] = found
        else:
            found = cores[key]
        Q_B, R_B, Q_A, R_A = found
        coefficients = torch.tensor([t.coefficient for t in self.terms for _ in range(len(t.A))], dtype=torch.float64)
        return Q_B, (R_B * coefficients.to(R_B.device)) @ R_A.T, Q_A

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the thin (U, S, Vh) by thin QR of the factors and one small SVD, float64."""
        Q_B, C, Q_A = self.core()
        U, S, Vh = torch.linalg.svd(C, full_matrices=False)
        return lift(Q_B, U), S, lift(Q_A, Vh.T).T

    def truncate(self, rank: int, name: str = "") -> LowRank:
        """Return the closest matrix of at most the given rank, in Frobenius norm, in the gauge.

        Parameters
        ----------
        rank : int
            r, with 1 <= r <= min(d_out, d_in).
        name : str (default: "")
            Seeds the completion of A where this matrix has a lower rank (see `gauge`).

        Returns
        -------
        LowRank
            New tensors: B (d_out, r), A (r, d_in) with orthonormal rows, float64, scaling 1.

        Raises
        ------
        ValueError
            rank is out of range.

        Notes
        -----
        Eckart & Young (1936). Costs O((d_out + d_in) R^2) for a stack of rank R; never forms d_out x d_in while
        R < min(d_out, d_in).
        """
        if not 1 <= rank <= min(self.shape):
            raise ValueError(f"rank: expected 1 to {min(self.shape)} for a matrix of shape {self.shape}, found {rank}")
        return gauge(*self.svd(), rank=rank, name=name)


def gram(matrices: Sequence[LowRank], norms: Sequence[float]) -> Tensor:
    """Return the (n, n) float64 inner products of n matrices of one shape.

    One Gram product of all distinct factors: what the matrices share (the global model that each delta is taken from)
    enters it once. The diagonal is from their norms, which are exact where terms cancel.
    """
    squares = torch.tensor(norms, dtype=torch.float64).square()
    place: dict[tuple[int, int], int] = {}
    terms: list[_Term] = []
    for term in (term for matrix in matrices for term in matrix.terms):
        if place.setdefault((id(term.B), id(term.A)), len(terms)) == len(terms):
            terms.append(term)
    d_out, d_in = matrices[0].shape
    if sum(term.A.shape[0] for term in terms) ** 2 > len(matrices) * d_out * d_in:  # larger than the matrices
        rows = torch.stack([matrix.dense().reshape(-1) for matrix in matrices])
        return (rows @ rows.T).cpu().diagonal_scatter(squares)
    # scaling by the largest entries keeps the squares (fourth powers of entries) in range
    sizes = [[float(factor.abs().amax()) or 1.0 for factor in (term.B, term.A)] for term in terms]
    coefficients = torch.zeros(len(matrices), len(terms), dtype=torch.float64)
    for i, matrix in enumerate(matrices):
        for term in matrix.terms:
            t = place[id(term.B), id(term.A)]
            coefficients[i, t] += term.coefficient * sizes[t][0] * sizes[t][1]
    ranks = torch.tensor([term.A.shape[0] for term in terms])
    coefficients = coefficients.repeat_interleave(ranks, dim=1).to(terms[0].B.device)
    B = torch.cat([term.B.to(torch.float64) / b for term, (b, _) in zip(terms, sizes, strict=True)], dim=1)
    A = torch.cat([term.A.to(torch.float64) / a for term, (_, a) in zip(terms, sizes, strict=True)], dim=0)
    products = coefficients @ ((B.T @ B) * (A @ A.T)) @ coefficients.T
    return products.cpu().diagonal_scatter(squares)


def lift(Q: Tensor | None, matrix: Tensor) -> Tensor:
    """Return Q @ matrix: from the core's coordinates to the layer's (None: they are the same)."""
    return matrix if Q is None else Q @ matrix


def gauge(U: Tensor, S: Tensor, Vh: Tensor, rank: int, name: str = "") -> LowRank:
    """Return U diag(S) Vh cut to `rank`, with the factors that leave the server.

    The rows of A are orthonormal and B carries the singular values, largest first; each row of A has its largest
    entry positive (lowest index on ties). So the leading rows and columns are the best approximation of lower rank,
    and training starts from factors of a fresh LoRA's scale. Where the matrix has a rank below `rank`, A is
    completed to a full orthonormal set and B gets zero columns: no direction is dead for the next round's gradient.

    Parameters
    ----------
    U, S, Vh : Tensor
        (d_out, m), (m,) descending, (m, d_in), float64.
    rank : int
        r >= 1, rows of A; above d_in the rows beyond are random unit rows.
    name : str
        Seeds the completion.
    """
    kept = min(rank, len(S))
    U, S, Vh = U[:, :kept], S[:kept], Vh[:kept]
    cutoff = (float(S[0]) if kept else 0.0) * max(U.shape[0], Vh.shape[1]) * torch.finfo(S.dtype).eps
    found = int((cutoff < S).sum())
    rows = torch.arange(found, device=Vh.device)
    # argmax takes the lowest index on ties
    signs = torch.sign(Vh[rows, Vh[:found].abs().argmax(dim=1)])
    B = torch.zeros(U.shape[0], rank, dtype=U.dtype, device=U.device)
    B[:, :found] = U[:, :found] * (S[:found] * signs)
    return LowRank(B, complete(Vh[:found] * signs[:, None], rank, name))


def complete(rows: Tensor, rank: int, name: str) -> Tensor:
    """Return `rows` (m, d) and below them rank - m more, orthonormal while d allows, from the seed `name`."""
    found, width = rows.shape
    if found == rank:
        return rows
    extra = random_normal(rank - found, width, name).to(rows.device)
    free = min(rank, width) - found
    for _ in range(2):  # once is not orthogonal to rounding
        extra[:free] -= (extra[:free] @ rows.T) @ rows
        extra[:free] = torch.linalg.qr(extra[:free].T).Q.T
    return torch.cat([rows, extra / torch.linalg.vector_norm(extra, dim=1, keepdim=True)])


def random_normal(rows: int, columns: int, seed: str) -> Tensor:
    """Return a (rows, columns) float64 standard normal matrix from a text seed: the same on every device."""
    return torch.randn(rows, columns, dtype=torch.float64, generator=_generator(seed))


def random_uniform(length: int, seed: str) -> Tensor:
    """Return (length,) float32 numbers, uniform in [0, 1), from a text seed: the same on every device."""
    return torch.rand(length, generator=_generator(seed))


def _generator(seed: str) -> torch.Generator:
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1
    # on the CPU, so that every device gets the same
    return torch.Generator().manual_seed(number)
