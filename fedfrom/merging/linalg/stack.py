"""The factors of many products side by side, each held once: their Gram matrices, inner products and small core.

Every matrix of one layer (W, the updates, what they merge to) is a sum of products of the same few factors: X M Y^T, X
(d_out, p) and Y (d_in, q) the factors side by side, M (p, q) sparse. The two Gram matrices X^T X and Y^T Y then give
every norm and inner product, and their Cholesky factors the small core that has the singular values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedfrom.merging.linalg.krylov import Operator, product
from fedfrom.merging.linalg.sides import FEW, Basis, Side, are_all

# Entries of the matrices that are formed at a time where Gram matrices would cost more.
_ENTRIES = 1 << 21
# Steps that an iteration for leading triplets takes on flat spectra, and what a core's Cholesky factors, products and
# iteration take of the cube of its width: counted in multiplications, and twice where they are float64.
_STEPS = 20
_CORE = 8
# What products with the factors must save, as only they leave ||T||_F^2 to be estimated.
_EXACT = 1.3


class Term(NamedTuple):
    """coefficient * B @ A, B (d_out, r), A (r, d_in)."""

    coefficient: float
    B: Tensor
    A: Tensor


class Mixture(NamedTuple):
    """M (p, q), sparse: entries by row and column; equal places add up."""

    rows: Tensor
    columns: Tensor
    values: Tensor

    @property
    def T(self) -> Mixture:
        """M^T."""
        return Mixture(self.columns, self.rows, self.values)

    def scaled(self, factor: float) -> Mixture:
        """Return factor * M."""
        return self._replace(values=self.values * factor)

    def times(self, right: Tensor, rows: int) -> Tensor:
        """Return M @ right, (rows, any), in right's dtype; new memory."""
        if self.values.dtype != right.dtype:
            return self._replace(values=self.values.to(right.dtype)).times(right, rows)
        if rows == len(right) and are_all(self.rows, rows) and are_all(self.columns, rows):
            return self.values[:, None] * right
        result = right.new_zeros(rows, right.shape[1])
        for start in range(0, len(self.rows), max(1, len(right))):  # so that what is gathered is no larger than `right`
            part = slice(start, start + len(right))
            result.index_add_(0, self.rows[part], self.values[part, None] * right[self.columns[part]])
        return result


class Core(NamedTuple):
    """left.lift(C) right.lift(.)^T is the matrix: C (m_out, m_in) in two orthonormal bases."""

    left: Basis
    C: Tensor
    right: Basis


class Stack:
    """The factors of matrices of one layer, as two sides; what is computed of them is kept.

    Parameters
    ----------
    matrices : Iterable[Sequence[Term]]
        At least one term in all.
    narrow : bool (default: False)
        See `Side`.
    """

    def __init__(self, matrices: Iterable[Sequence[Term]], narrow: bool = False) -> None:
        terms = [term for matrix in matrices for term in matrix]
        self.left, self.right = Side((t.B for t in terms), narrow), Side((t.A.T for t in terms), narrow)

    @property
    def is_wide(self) -> bool:
        """Whether the factors have so many columns that forming a matrix costs less than their Gram matrices."""
        return is_wide(self.left.height, self.right.height, max(self.left.width, self.right.width))

    @property
    def is_narrow(self) -> bool:
        """Whether float32 tells all factors apart."""
        return self.left.is_narrow and self.right.is_narrow

    def holds(self, terms: Sequence[Term]) -> bool:
        """Whether all factors of a matrix are in the stack."""
        return all(self.left.place(B) is not None and self.right.place(A.T) is not None for _, B, A in terms)

    def mixture(self, terms: Sequence[Term]) -> Mixture:
        """Return M of a matrix that the stack holds, X M Y^T."""
        rows: list[int] = []
        columns: list[int] = []
        values: list[float] = []
        for c, B, A in terms:
            left, right = self.left.place(B), self.right.place(A.T)
            assert left is not None and right is not None
            width = A.shape[0]
            rows += range(left[0], left[0] + width)
            columns += range(right[0], right[0] + width)
            values += [c * left[1] * right[1]] * width
        device = terms[0].B.device
        return Mixture(
            torch.tensor(rows, device=device),
            torch.tensor(columns, device=device),
            torch.tensor(values, dtype=torch.float64, device=device),
        )

    def dense(self, terms: Sequence[Term]) -> Tensor:
        """Return a matrix that the stack holds, (d_out, d_in) float64."""
        return self.left.columns @ self.mixture(terms).times(self.right.columns.T, self.left.width)

    def core(self, terms: Sequence[Term]) -> Core:
        """Return a matrix's core, R_X M R_Y^T; of a wide stack the matrix itself."""
        if self.is_wide:
            C = self.dense(terms)
            return Core(Basis(), C, Basis())
        left, right = self.left.basis, self.right.basis
        return Core(left, left.R @ self.mixture(terms).times(right.R.T, self.left.width), right)

    def operator(self, terms: Sequence[Term], columns: int, dtype: torch.dtype = torch.float64) -> Operator | None:
        """Return a matrix that the stack holds as products with so many columns; None where its core costs less.

        Where there are many clients and the layer is large, no matrix is formed: memory is that of the factors side by
        side, once, in `dtype`. Where the factors have so many more columns than the layer that products with it cost
        less, they form it, once, d_out x d_in of `dtype`.
        """
        X, Y = self.left, self.right
        d_out, d_in = X.height, Y.height
        way = cheapest(d_out, d_in, max(X.width, Y.width), columns, len(terms) <= FEW)
        if way == "core":
            return None
        M = self.mixture(terms)
        left, right = X.columns_in(dtype), Y.columns_in(dtype)
        if way == "matrix":
            formed = left.new_empty(d_out, d_in)
            half = M.times(right.T, X.width)
            return Operator.of(torch.matmul(left, half, out=formed))
        return Operator(
            (d_out, d_in),
            lambda V: product(left, M.times(product(right.T, V), X.width)).to(torch.float64),
            lambda U: product(right, M.T.times(product(left.T, U), Y.width)).to(torch.float64),
        )

    def inner(self, mixtures: Sequence[Mixture]) -> tuple[Tensor, Tensor]:
        """Return the inner products of n matrices, (n, n) float64, and what their norms are at most, (n,).

        <X M_i Y^T, X M_j Y^T> is the sum over the entries (s, t) of M_i and (u, v) of M_j of their product times
        (X^T X)_su (Y^T Y)_tv. Where it is far below the squares of those bounds, its digits have cancelled.
        """
        n, left, right = len(mixtures), self.left, self.right
        owner = torch.cat([torch.full_like(m.rows, i) for i, m in enumerate(mixtures)])
        rows, columns, values = (torch.cat(parts) for parts in zip(*mixtures, strict=True))
        if not self.is_wide:
            products = _taken(left.gram, rows).mul_(_taken(right.gram, columns)).mul_(values).mul_(values[:, None])
        lengths = values.abs() * left.lengths[rows] * right.lengths[columns]
        most = values.new_zeros(n).index_add_(0, owner, lengths)
        if self.is_wide:
            return self._inner_of_rows(mixtures), most
        half = products.new_zeros(n, len(owner)).index_add_(0, owner, products)
        inner = products.new_zeros(n, n).index_add_(0, owner, half.T.contiguous())
        return (inner + inner.T) / 2, most

    def squares(self, mixtures: Sequence[Mixture]) -> tuple[Tensor, Tensor]:
        """Return n matrices' squared norms, (n,) float64, and what their norms are at most: time linear in n."""
        found = []
        for some in _batches(mixtures):
            left, right = self.left.some(some.rows), self.right.some(some.columns)
            grams = [factors @ factors.mT for factors in (left, right)]
            lengths = [gram.diagonal(dim1=1, dim2=2).sqrt() for gram in grams]
            values = some.values[:, None]
            squares = (values @ (grams[0] * grams[1]) @ values.mT).flatten()
            found.append((squares, (some.values.abs() * lengths[0] * lengths[1]).sum(dim=1)))
        squares, most = (torch.cat(parts) for parts in zip(*found, strict=True))
        return squares, most

    def sketch(self, mixtures: Sequence[Mixture], left: Tensor, right: Tensor) -> Tensor:
        """Return (n, a b) float64: P M_i Q of n matrices, P (a, d_out) and Q (d_in, b); time linear in n."""
        dtype = torch.float32 if self.is_narrow else torch.float64
        left, right = (
            product(side.columns_in(dtype).T, some).to(torch.float64)
            for some, side in ((left.T, self.left), (right, self.right))
        )
        found = [(left[some.rows].mT * some.values[:, None]) @ right[some.columns] for some in _batches(mixtures)]
        return torch.cat(found).flatten(1)

    def _inner_of_rows(self, mixtures: Sequence[Mixture]) -> Tensor:
        """Return the inner products by forming the n matrices, some rows of each at a time."""
        X, Y = self.left.columns, self.right.columns.T
        rights = [Y[m.columns] * m.values[:, None] for m in mixtures]
        height = max(1, _ENTRIES // (len(mixtures) * Y.shape[1]))
        inner = X.new_zeros(len(mixtures), len(mixtures))
        for start in range(0, len(X), height):
            some = X[start : start + height]
            formed = torch.stack([(some[:, m.rows] @ Z).flatten() for m, Z in zip(mixtures, rights, strict=True)])
            inner += formed @ formed.T
        return inner


def is_wide(d_out: int, d_in: int, columns: int) -> bool:
    """Return whether factors of so many columns cost more as Gram matrices than the (d_out, d_in) matrix itself."""
    return columns * (d_out + d_in) > d_out * d_in


def cheapest(d_out: int, d_in: int, width: int, columns: int, few: bool = False) -> str:
    """Return the way to the leading triplets of a matrix of stacked factors that takes the least time.

    Parameters
    ----------
    d_out, d_in : int
        Of the matrix.
    width : int
        Columns of the stacked factors.
    columns : int
        Of one product in an iteration for the leading triplets.
    few : bool (default: False)
        All numbers are to be exact: "factors" is none of the ways.

    Returns
    -------
    str
        "core", by Gram matrices; "factors", by products with the factors; "matrix", by products with the matrix.
    """
    both = d_out + d_in
    # a step of the iteration is two products, which with few columns run at half the speed
    iteration = _STEPS * 2 * 2 * columns
    times = {
        "core": width**2 * both / 2 + _CORE * width**3,
        "factors": _EXACT * iteration * width * both,
        "matrix": (width + iteration) * d_out * d_in,
    }
    if few:
        del times["factors"]
    return min(times, key=lambda way: times[way])


def _batches(mixtures: Sequence[Mixture], size: int = 64) -> Iterator[Mixture]:
    """Yield some mixtures at a time as one, (some, entries), shorter ones filled up with zeros."""
    for start in range(0, len(mixtures), size):
        parts = zip(*mixtures[start : start + size], strict=True)
        yield Mixture(*(torch.nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in parts))


def _taken(gram: Tensor, places: Tensor) -> Tensor:
    return gram.clone() if are_all(places, len(gram)) else gram[places][:, places]
