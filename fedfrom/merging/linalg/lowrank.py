"""LowRank: a matrix kept as a sum of products scaling * B @ A, never formed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedfrom.merging.linalg.scale import power_of_two
from fedfrom.merging.linalg.stack import Core, Stack, Term

# A sum this far below its terms (in squared norm) has lost too many digits in Gram products.
_CANCELLED = 1e-6
# A sum below this many rounding errors of its terms is zero.
_ROUNDING = 64 * torch.finfo(torch.float64).eps


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

    Examples
    --------
    >>> import torch
    >>> from fedfrom import LowRank
    >>> matrix = LowRank(torch.ones(3, 1), torch.ones(1, 2), scaling=2.0)
    >>> matrix.shape, round(matrix.norm(), 4)
    ((3, 2), 4.899)
    >>> (matrix - matrix).norm()
    0.0
    """

    def __init__(self, B: Tensor, A: Tensor, scaling: float = 1.0) -> None:
        if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
            raise ValueError(
                f"expected B (d_out, r) and A (r, d_in) with one r, found B {tuple(B.shape)} and A {tuple(A.shape)}"
            )
        self.terms: tuple[Term, ...] = (Term(float(scaling), B, A),)

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
        kept = [Term(c, t.B, t.A) for c, size, t in totals.values() if abs(c) > 1e-15 * size]
        result = cls.__new__(cls)
        first = next(iter(totals.values()))[2]
        result.terms = tuple(kept) or (Term(0.0, first.B, first.A),)
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
        result.terms = tuple(Term(c, A.T, B.T) for c, B, A in self.terms)
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
        return Stack([self.terms]).dense(self.terms).to(dtype)

    def inner(self, other: LowRank) -> float:
        """Return the Frobenius inner product <self, other>, without forming a matrix while that costs more."""
        stack = Stack([self.terms, other.terms])
        return float(stack.inner([stack.mixture(self.terms), stack.mixture(other.terms)])[0][0, 1])

    def norm(self) -> float:
        """Return the Frobenius norm: see `norms_and_cosines`."""
        return norms_and_cosines([self])[0][0]

    def core(self, stack: Stack | None = None) -> Core:
        """Return (left, C, right): this matrix as a small one in two orthonormal bases; see `Stack.core`.

        Parameters
        ----------
        stack : Stack | None (default: None)
            A stack that may hold this matrix's factors, among others: its Gram matrices and bases are used again.
        """
        if stack is None or not stack.holds(self.terms):
            stack = Stack([self.terms])
        return stack.core(self.terms)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the thin (U, S, Vh) by orthonormal bases of the factors and one small SVD, float64."""
        left, C, right = self.core()
        U, S, Vh = torch.linalg.svd(C, full_matrices=False)
        return left.lift(U), S, right.lift(Vh.T).T

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


def norms_and_cosines(
    matrices: Sequence[LowRank], stack: Stack | None = None, pairs: bool = True
) -> tuple[list[float], Tensor | None]:
    """Return the Frobenius norms of n matrices and the cosines between them, (n, n) float64 on the CPU.

    ||BA||_F^2 = <B^T B, A A^T>, and likewise for sums. Where the terms of a matrix cancel (two products that are nearly
    the same, by other factors) the digits are gone from that sum, and the norm is taken of its core. A norm within
    rounding of its terms is exactly 0, so a client that trained nothing has none. Infinite or NaN factors give an
    infinite or NaN norm.

    Parameters
    ----------
    matrices : Sequence[LowRank]
        Of one shape.
    stack : Stack | None (default: None)
        One that holds their factors, among others; None stacks them.
    pairs : bool (default: True)
        False leaves out the cosines: time is then linear in n.

    Returns
    -------
    tuple[list[float], Tensor | None]
        ||M_i||_F, and cos(M_i, M_j): 1 on the diagonal, 0 where a norm is 0.
    """
    stack = stack or Stack([matrix.terms for matrix in matrices])
    mixtures = [stack.mixture(matrix.terms) for matrix in matrices]
    # in this unit no square leaves float64's range
    unit = power_of_two(torch.cat([mixture.values for mixture in mixtures]).abs().max(0, True).values.tolist())
    mixtures = [mixture.scaled(1 / unit) for mixture in mixtures]
    inner, most = stack.inner(mixtures) if pairs else stack.squares(mixtures)
    squares = inner.diagonal() if pairs else inner
    norms = []
    for matrix, square, bound in zip(matrices, squares.tolist(), most.tolist(), strict=True):
        if not math.isfinite(bound):
            norms.append(bound)
            continue
        norm = max(0.0, square) ** 0.5
        if norm**2 <= _CANCELLED * bound**2 and bound > 0:
            norm = float(torch.linalg.matrix_norm((matrix * (1 / unit)).core().C))
        norms.append(norm if norm > _ROUNDING * bound else 0.0)
    if not pairs:
        return [norm * unit for norm in norms], None
    scale = torch.tensor([1 / norm if norm > 0 else 0.0 for norm in norms], dtype=torch.float64)
    cosines = scale[:, None] * inner.cpu() * scale
    return [norm * unit for norm in norms], cosines.diagonal_scatter((scale > 0).to(torch.float64))


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
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator(seed))


def random_uniform(length: int, seed: str) -> Tensor:
    """Return (length,) float32 numbers, uniform in [0, 1), from a text seed: the same on every device."""
    return torch.rand(length, generator=generator(seed))


def generator(seed: str) -> torch.Generator:
    """Return a generator on the CPU that starts from a text."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1
    # on the CPU, so that every device gets the same
    return torch.Generator().manual_seed(number)
