"""The clients' updates of one layer as a merging method sees them, and theta* as it hands it back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fedfrom.merging.linalg.entries import Combine, Entries, Histogram, form
from fedfrom.merging.linalg.lowrank import LowRank

T = TypeVar("T")
Edit = Callable[[int, Tensor, int], Tensor]
"""edit(i, entries, start): what takes the place of a row of theta_i's entries, the first of them at `start`."""


class Change:
    """theta* of one layer.

    A method gets it from `Updates.sum`, `entrywise`, `formed` or `cores`, and hands it back; the updates that it came
    from know how to turn it into tensors.

    Attributes
    ----------
    coefficients : Tensor | None
        (n,) c_i where theta* is known to be sum_i c_i theta_i, None elsewhere.
    """

    coefficients: Tensor | None = None


class Destination(NamedTuple):
    """Where a layer is going: T = W + alpha theta*, solved back to a rank.

    Attributes
    ----------
    base : LowRank | None
        W of a LoRA module, in the updates' unit; None is zero, and of a plain tensor not needed.
    server_lr : float
        alpha.
    rank : int | float
        That T will be solved back to: a number of columns, or a share of the energy to keep. 0 of a plain tensor.
    """

    base: LowRank | None
    server_lr: float
    rank: int | float


class Cores(NamedTuple):
    """theta_i = U M_i V^T, U and V with orthonormal columns, the same for all clients.

    Attributes
    ----------
    matrices : list[Tensor]
        n of (p, q), float64 (a plain float32 tensor's: float32). A plain matrix is its own core.
    lift : Callable[[Tensor], Change]
        lift(M): theta* = U M V^T.
    left, right : Callable[[Tensor], Tensor]
        left(X): U X of X (p, any), and right(Y): V Y of Y (q, any): in the layer's coordinates. Default: the identity.
    """

    matrices: list[Tensor]
    lift: Callable[[Tensor], Change]
    left: Callable[[Tensor], Tensor] = lambda X: X
    right: Callable[[Tensor], Tensor] = lambda Y: Y


class Updates(ABC):
    """theta_1 ... theta_n of one layer, after clipping, in an order that does not depend on the clients' order.

    Attributes
    ----------
    name : str
        The layer: module path of an adapter, key of a plain tensor. Seeds what a method draws.
    shape : tuple[int, ...]
        Of each update; (d_out, d_in) of a LoRA module.
    order : Sequence[int]
        Place of each client among the clients as they were given.
    sizes : Sequence[float]
        (n,) ||theta_i||_F, divided by one power of two for all clients.
    clipped_norms : Sequence[float]
        (n,) ||theta_i||_F in their true size, in the order in which clients were given: what surveys sum up.
    dtype : torch.dtype
        Of the entries: float64, or float32 of plain tensors that came in less.
    entry_unit : float
        What the entries that `entrywise` hands over are divided by.
    products : Sequence[LowRank] | None
        theta_i of a LoRA module, as sums of products B A, divided by that power of two; None of a plain tensor.
    tolerance : float
        Share of the largest singular value at and below which a direction of the updates is rounding in the dtype that
        they came in.
    is_linear : bool
        Whether the layer is a LoRA module or a matrix that inputs are multiplied by, as far as name and shape tell:
        neither an embedding nor of other than two dimensions.
    """

    name: str
    shape: tuple[int, ...]
    order: Sequence[int]
    sizes: Sequence[float]
    clipped_norms: Sequence[float]
    dtype: torch.dtype
    entry_unit: float = 1.0
    products: Sequence[LowRank] | None = None
    tolerance: float = 0.0

    def __len__(self) -> int:
        """Return n, the number of clients."""
        return len(self.order)

    @property
    def is_linear(self) -> bool:
        return len(self.shape) == 2

    @property
    def numel(self) -> int:
        """Entries of one update."""
        return math.prod(self.shape)

    def weighted_energy(self, weights: Tensor) -> float:
        """Return sum_i w_i ||theta_i||_F^2, of (n,) weights, in the unit of `sizes`."""
        return math.fsum(w * size**2 for w, size in zip(weights.tolist(), self.sizes, strict=True))

    @abstractmethod
    def sum(self, coefficients: Tensor) -> Change:
        """Return theta* = sum_i c_i theta_i (Eq. 5), of (n,) float64 coefficients; of a LoRA module never dense."""

    @abstractmethod
    def entrywise(self, combine: Combine) -> Change:
        """Return theta* whose entries each depend on the n clients' entries there alone.

        Parameters
        ----------
        combine : Callable[[list[Tensor], int], Tensor]
            combine(rows, start) returns a row of theta*'s entries from the n clients' rows, in C order, the first of
            them at `start`. It is called once a block, on several threads, and may overwrite the rows. A LoRA module's
            updates are formed: O(n d_out d_in) memory.
        """

    @abstractmethod
    def formed(self, matrix: Tensor | LowRank) -> Change:
        """Return theta* that the method has formed itself: of a LoRA module as products, else in the layer's shape."""

    @abstractmethod
    def settled(self, change: Change) -> Tensor | LowRank:
        """Return theta* of a change that these updates made: of a LoRA module as products, else in the layer's shape.

        In the unit of what `formed` takes. A plain tensor's is formed: new memory.
        """

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return compute(), computed for the first method that asks for the key: what several candidates share.

        It is held as long as the updates, and must not be changed.
        """
        found: dict[Hashable, Any] = self.__dict__.setdefault("_once", {})
        if key not in found:
            found[key] = compute()
        result: T = found[key]
        return result

    def edited(self, edit: Edit) -> Updates:
        """Return these updates with their entries edited (trimmed, dropped), a row at a time as they are read."""
        return _Edited(self, edit)

    def largest(self, i: int, count: int) -> tuple[float, int]:
        """Return (t, end): theta_i's `count` largest entries by magnitude are above t, or equal to it before `end`.

        Of several that equal t the first in C order are taken; t is divided by `entry_unit`.
        """
        return self.entries.threshold(i, count)

    @property
    @abstractmethod
    def entries(self) -> Entries:
        """The updates' entries, a block at a time."""

    def counts(self, i: int, histogram: Histogram, dtype: torch.dtype) -> Sequence[Tensor]:
        """Return counts of theta_i's magnitudes in their true size, as `kth_largest` asks for them."""
        return self.entries.counts(i, histogram, dtype)

    def matrices(self) -> list[Tensor]:
        """Return the n updates in the layer's shape, in the dtype sums are formed in; new memory."""
        entries = self.entries
        return [entries.block(i, 0, entries.numel()).reshape(self.shape) for i in range(len(self))]

    def cores(self) -> Cores | None:
        """Return the updates as small matrices in two shared bases; None of a tensor that is no matrix."""
        return Cores(self.matrices(), self.formed) if len(self.shape) == 2 else None

    def statistics(self, kind: str) -> list[Tensor] | None:
        """Return what the clients sent beside the layer; None where no client sent any.

        Parameters
        ----------
        kind : str
            "gram": (d_in, d_in) Gram matrices of the layer's inputs; "fisher": diagonals in the layer's shape.
        """
        return None


class _Edited(Updates):
    """Updates whose entries are edited before they are combined."""

    def __init__(self, updates: Updates, edit: Edit) -> None:
        self._updates, self._edit = updates, edit
        self.name, self.shape, self.order, self.sizes = updates.name, updates.shape, updates.order, updates.sizes
        self.clipped_norms, self.dtype, self.entry_unit = updates.clipped_norms, updates.dtype, updates.entry_unit

    def sum(self, coefficients: Tensor) -> Change:
        return self.entrywise(summed(coefficients))

    def entrywise(self, combine: Combine) -> Change:
        def edited(rows: list[Tensor], start: int) -> Tensor:
            return combine([self._edit(i, row, start) for i, row in enumerate(rows)], start)

        return self._updates.entrywise(edited)

    def formed(self, matrix: Tensor | LowRank) -> Change:
        return self._updates.formed(matrix)

    def settled(self, change: Change) -> Tensor | LowRank:
        return self._updates.settled(change)

    @property
    def entries(self) -> Entries:
        raise NotImplementedError("edited updates have no entries to look at: look at them before editing")

    def statistics(self, kind: str) -> list[Tensor] | None:
        return self._updates.statistics(kind)


@dataclass(frozen=True)
class DenseChange(Change):
    """theta* of `DenseUpdates`.

    Attributes
    ----------
    tensor : Tensor
        In the updates' shape.
    """

    tensor: Tensor


class DenseUpdates(Updates):
    """n dense tensors of one shape in the place of a layer's updates: what a method merges in a basis of its own.

    Parameters
    ----------
    tensors : Sequence[Tensor]
        n of one shape, float32 or float64; not changed.
    name : str
        The layer.
    tolerance : float (default: 0.0)
        See `Updates`.
    """

    def __init__(self, tensors: Sequence[Tensor], name: str, tolerance: float = 0.0) -> None:
        self.tolerance = tolerance
        self.name, self.order, self.shape = name, range(len(tensors)), tuple(tensors[0].shape)
        self.dtype = tensors[0].dtype
        self._entries = Entries(tensors, [None] * len(tensors), [1.0] * len(tensors), tensors[0].dtype)

    @cached_property
    def sizes(self) -> Sequence[float]:  # type: ignore[override]
        """Norms are taken when they are asked for: methods that combine the tensors do without."""
        return [float(torch.linalg.vector_norm(tensor)) for tensor in self._entries.values]

    @property
    def clipped_norms(self) -> Sequence[float]:  # type: ignore[override]
        return self.sizes

    @property
    def entries(self) -> Entries:
        return self._entries

    def sum(self, coefficients: Tensor) -> DenseChange:
        return self.entrywise(summed(coefficients))

    def entrywise(self, combine: Combine) -> DenseChange:
        return DenseChange(form(self._entries, combine).reshape(self.shape))

    def formed(self, matrix: Any) -> DenseChange:
        return DenseChange(matrix)

    def settled(self, change: Change) -> Tensor:
        assert isinstance(change, DenseChange)
        return change.tensor


def summed(coefficients: Tensor) -> Combine:
    """Return the function that combines rows to sum_i c_i theta_i, for `Updates.entrywise`."""
    c = coefficients.tolist()
    return lambda rows, start: torch.stack([c_i * row for c_i, row in zip(c, rows, strict=True)]).sum(dim=0)
