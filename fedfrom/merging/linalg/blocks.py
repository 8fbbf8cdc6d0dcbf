"""Plain tensors, a block at a time: what a block is read from, and the memory that it is read into.

One block stays in the processor's cache, so that memory is read once for a norm or a sum, and written once. Each thread
has buffers of its own and uses them again for every block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

# large enough that two threads gain on each operation, small enough that some blocks fit the cache that cores share
BLOCK = 1 << 19
# most entries of a tensor for which the overhead of calls exceeds the arithmetic
FEW = 1 << 13
_buffers = threading.local()


class Reader(Protocol):
    """A tensor that is not in memory, and is read a block at a time."""

    @property
    def shape(self) -> torch.Size:
        """Its shape."""

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""

    @property
    def device(self) -> torch.device:
        """Where what is read will be."""

    def numel(self) -> int:
        """Return how many entries it has."""

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return the entries from `start` to `stop` in C order; in `out`, flat and of this dtype, where given."""

    def sample(self) -> Tensor:
        """Return what `sampled` does of all its entries."""


Values = Tensor | Reader
"""What blocks are taken from: a tensor in memory, or one to be read."""

Empty = Callable[..., Tensor]
"""What gives new memory: called as `torch.empty` with a shape, and dtype and device as keywords."""


def whole(values: Values) -> Tensor:
    """Return a tensor itself, or all of what is to be read, which is new memory."""
    return values if isinstance(values, Tensor) else values.read(0, values.numel()).reshape(values.shape)


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype sums are formed in: float64 for float64, float32 for all that is narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def buffer(slot: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return this thread's buffer of that name, one block at most."""
    held: dict[Any, tuple[Tensor, Tensor]] = _buffers.__dict__.setdefault("held", {})
    key = (slot, dtype, device)
    whole, last = held.get(key) or 2 * (torch.empty(BLOCK, dtype=dtype, device=device),)
    if last.numel() != size:  # a slice takes a third of a small operation's time
        last = whole[:size]
    held[key] = whole, last
    return last


class Flat:
    """Values as one row, whose blocks come in the dtype that they have, or in another one."""

    def __init__(self, values: Values) -> None:
        self.is_read = not isinstance(values, Tensor)
        self.values: Any = values.detach().reshape(-1) if isinstance(values, Tensor) else values
        self.dtype, self.device, self.length = values.dtype, values.device, values.numel()

    def block(self, start: int, stop: int, slot: str) -> Tensor:
        """Return a block: a view, or the buffer of that name."""
        if self.is_read:
            return self.values.read(start, stop, buffer(slot, stop - start, self.dtype, self.device))
        return self.values if stop - start == self.length else self.values[start:stop]

    def block_as(self, dtype: torch.dtype, start: int, stop: int, slot: str) -> Tensor:
        """Return a block in that dtype: a view, or the buffer of that name."""
        block = self.block(start, stop, slot)
        return block if self.dtype == dtype else buffer(slot, stop - start, dtype, self.device).copy_(block)


def update_block(
    value: Flat, reference: Tensor | None, dtype: torch.dtype, start: int, stop: int, slot: str = "theta"
) -> Tensor:
    """Return a block of value - reference (None: zero): the buffer of that name, or a view of what may not change."""
    if reference is None:
        return value.block_as(dtype, start, stop, slot)
    block = value.block_as(dtype, start, stop, "value")
    return torch.sub(block, reference, out=buffer(slot, stop - start, dtype, value.device))


def in_order(values: Values) -> Iterator[Tensor]:
    """Yield all entries in C order, as rows of one block each."""
    flat = Flat(values)
    for start in range(0, values.numel(), BLOCK):
        yield flat.block(start, min(start + BLOCK, values.numel()), "value")


def delta(value: Values, reference: Tensor | None) -> Tensor:
    """Return value - reference (None: zero) in the dtype sums are formed in; new memory."""
    dtype, value = arithmetic(value.dtype), whole(value)
    return value.to(dtype, copy=True) if reference is None else value.to(dtype) - reference.to(dtype)


def is_small(values: Values) -> bool:
    """Return whether call overhead exceeds the arithmetic, so that all entries are taken at once, in float64."""
    return values.numel() <= FEW
