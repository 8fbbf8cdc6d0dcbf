"""Distinct factors side by side, each held once, with their Gram matrix and an orthonormal basis of their columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fedfrom.merging.linalg.numbers import numbers
from fedfrom.merging.linalg.scale import power_of_two

# Columns that lie this near (squared, relative) to the span of those before them are too near for Gram matrices, which
# square the condition: their digits come from Householder QR.
_DEPENDENT = 1e-2
# Columns of one piece of a Gram matrix: only pieces on and above the diagonal are multiplied.
_PIECE = 128
# Rows that are summed in float32.
_SUM = 1 << 11
# Most terms for which all numbers are exact.
FEW = 32


class Side:
    """Distinct factors (d, r_j) side by side: F (d, p), p = sum_j r_j.

    A factor that is the leading columns of another in the same memory (what a client of smaller rank was sent) is held
    with it. Factors are scaled by powers of two where a square of an entry may leave the range that it is summed in.

    Parameters
    ----------
    factors : Iterable[Tensor]
        At least one, of one d and device, floating point.
    narrow : bool (default: False)
        Float32 tells all of them apart, though some are float64: what changed in factors of less.
    """

    def __init__(self, factors: Iterable[Tensor], narrow: bool = False) -> None:
        widest: dict[tuple, Tensor] = {}
        for factor in factors:
            key = _place(factor)
            if key not in widest or widest[key].shape[1] < factor.shape[1]:
                widest[key] = factor
        self._held = widest
        self.width = sum(factor.shape[1] for factor in widest.values())
        self.height = next(iter(widest.values())).shape[0]
        none = all(factor.dtype != torch.float64 for factor in widest.values())
        self.is_narrow = narrow or none
        self._in_single = none and self.width > _PIECE
        self._found: dict[tuple, tuple[int, float]] = {}
        wide = [key for key, f in widest.items() if self.width > _PIECE or f.dtype == torch.float64]
        largest = dict(zip(wide, numbers([widest[key].abs().amax() for key in wide]), strict=True))
        start = 0
        for key, factor in widest.items():
            self._found[key] = start, power_of_two([largest[key]]) if key in largest else 1.0
            start += factor.shape[1]
        self._columns: dict[torch.dtype, Tensor] = {}
        self._gram: Tensor | None = None
        self._basis: Basis | None = None

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return next(iter(self._held.values())).device

    def place(self, factor: Tensor) -> tuple[int, float] | None:
        """Return where a factor's columns start in F, and what they are to be multiplied by; None: it is not in F."""
        key = _place(factor)
        return self._found[key] if key in self._found and self._held[key].shape[1] >= factor.shape[1] else None

    def columns_in(self, dtype: torch.dtype) -> Tensor:
        """Return F, float32 or float64."""
        if dtype not in self._columns:
            scales = [scale for _, scale in self._found.values()]
            held = [
                f.to(dtype) if s == 1.0 else (f / s).to(dtype) for f, s in zip(self._held.values(), scales, strict=True)
            ]
            # by rows, as an A lies in memory; a few B as they lie
            by_rows = held[0].stride(0) == 1 or len(held) > FEW + 1
            self._columns[dtype] = torch.cat([f.T for f in held]).T if by_rows else torch.cat(held, dim=1)
        return self._columns[dtype]

    @property
    def columns(self) -> Tensor:
        """F, float64."""
        return self.columns_in(torch.float64)

    @property
    def single(self) -> Tensor:
        """F, float32 where its Gram matrix is summed so: what goes with that matrix."""
        return self.columns_in(torch.float32 if self._in_single else torch.float64)

    def some(self, places: Tensor) -> Tensor:
        """Return columns of F, (some, entries, d) float64 of places (some, entries); new memory."""
        F, flat = self.single, places.flatten()
        start = int(flat[0])
        if are_all(flat - start, len(flat)):  # a slice: several times as fast
            return F[:, start : start + len(flat)].to(torch.float64).T.unflatten(0, places.shape)
        return F.T[places].to(torch.float64)

    @property
    def gram(self) -> Tensor:
        """F^T F, (p, p) float64: of many factors in float32 or less by float32 sums of at most 2^11, 1e-8 off."""
        if self._gram is None:
            F = self.single
            gram = F.new_zeros(self.width, self.width, dtype=torch.float64)
            for rows in F.split(_SUM if self._in_single else len(F)):
                for start in range(0, self.width, _PIECE):
                    piece = slice(start, start + _PIECE)
                    gram[piece, start:] += rows[:, piece].T @ rows[:, start:]
            for start in range(0, self.width, _PIECE):
                piece = slice(start, start + _PIECE)
                gram[piece.stop :, piece] = gram[piece, piece.stop :].T
            self._gram = gram
        return self._gram

    @property
    def lengths(self) -> Tensor:
        """(p,) float64 norms of F's columns."""
        if self._gram is None:
            return torch.linalg.vector_norm(self.columns, dim=0)
        return self._gram.diagonal().sqrt()

    @property
    def basis(self) -> Basis:
        """Orthonormal columns that span F's: see `Basis`."""
        if self._basis is None:
            self._basis = Basis.of(self)
        return self._basis


class Basis(NamedTuple):
    """Q (d, m) with orthonormal columns, F = Q R, Q itself kept as columns @ inverse(triangle) where that is cheaper.

    Attributes
    ----------
    R : Tensor
        (m, p); empty where Q is the identity.
    columns : Tensor | None
        (d, m); None is the identity.
    triangle : Tensor | None
        (m, m), upper; None is the identity.
    """

    R: Tensor = torch.empty(0)
    columns: Tensor | None = None
    triangle: Tensor | None = None

    @classmethod
    def of(cls, side: Side) -> Basis:
        """Return the basis of F's columns, float64.

        By Cholesky of the Gram matrix, of columns scaled to length 1 with zeros left out: O(d p) beyond that matrix.
        Where columns are so nearly dependent that this would lose digits, by Householder QR, O(d p^2).
        """
        F, squares = side.single, side.gram.diagonal()
        kept = squares > 0
        if not kept.all():
            F, squares = F[:, kept], squares[kept]
        if len(squares):
            lengths = squares.sqrt()
            small = side.gram if kept.all() else side.gram[kept][:, kept]
            factor, failed = torch.linalg.cholesky_ex(small / lengths / lengths[:, None])
            if not failed and bool((factor.diagonal().square() > _DEPENDENT).all()):
                triangle = (factor * lengths[:, None]).T.contiguous()
                R = triangle
                if not kept.all():
                    R = triangle.new_zeros(len(triangle), side.width)
                    R[:, kept] = triangle
                return cls(R, F, triangle)
        Q, R = torch.linalg.qr(side.columns)
        return cls(R, Q)

    def lift(self, matrix: Tensor) -> Tensor:
        """Return Q @ matrix: from the core's coordinates to the layer's."""
        if self.columns is None:
            return matrix
        if self.triangle is not None:
            matrix = torch.linalg.solve_triangular(self.triangle, matrix, upper=True)
        return (self.columns @ matrix.to(self.columns.dtype)).to(torch.float64)

    def project(self, matrix: Tensor) -> Tensor:
        """Return Q^T @ matrix, (m, any): from the layer's coordinates to the core's."""
        if self.columns is None:
            return matrix
        found = (self.columns.T @ matrix.to(self.columns.dtype)).to(torch.float64)
        if self.triangle is not None:
            found = torch.linalg.solve_triangular(self.triangle.T, found, upper=False)
        return found


def are_all(places: Tensor, count: int) -> bool:
    """Return whether these are 0, 1, ..., count - 1."""
    return len(places) == count and bool((places == torch.arange(count, device=places.device)).all())


def _place(factor: Tensor) -> tuple:
    """Return what a factor shares with its leading columns in the same memory."""
    return factor.data_ptr(), factor.stride(), factor.shape[0], factor.dtype
