"""Plain tensors, a block at a time: the norm of a delta and Eq. 5, without temporaries of the tensor's size.

A block of each operand fits a core's cache, so that memory is read once for the norms and once for the sum, and written
once. Buffers are each thread's own and are used again for every block.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fedfrom.merging.threads import begin, each_block

# float32 sums within a block, float64 across: 1e-7 off, nearly twice as fast as all float64; three blocks fit a cache
BLOCK = 1 << 17
# what is sampled of tensors above 2^16 entries: runs of a cache line of float32, so that others are not read
_WHOLE, _RUNS, _RUN = 1 << 16, 1 << 10, 16
# a norm outside this range may have lost squares to underflow or overflow in float32
_SAFE = (1e-12, 1e18)
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


def whole(values: Values) -> Tensor:
    """Return a tensor itself, or all of what is to be read, which is new memory."""
    return values if isinstance(values, Tensor) else values.read(0, values.numel()).reshape(values.shape)


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype sums are formed in: float64 for float64, float32 for all that is narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _buffer(slot: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return this thread's buffer of that name, one block at most."""
    held: dict[Any, Tensor] = _buffers.__dict__.setdefault("held", {})
    key = (slot, dtype, device)
    if key not in held:
        held[key] = torch.empty(BLOCK, dtype=dtype, device=device)
    return held[key][:size]


class _Flat:
    """Values as one row, whose blocks come in the dtype that they have, or in another one."""

    def __init__(self, values: Values) -> None:
        self.values: Any = values.detach().reshape(-1) if isinstance(values, Tensor) else values
        self.dtype, self.device = values.dtype, values.device

    def block(self, start: int, stop: int, slot: str) -> Tensor:
        """Return a block: a view, or the buffer of that name."""
        if isinstance(self.values, Tensor):
            return self.values[start:stop]
        return self.values.read(start, stop, _buffer(slot, stop - start, self.dtype, self.device))

    def block_as(self, dtype: torch.dtype, start: int, stop: int, slot: str) -> Tensor:
        """Return a block in that dtype: a view, or the buffer of that name."""
        block = self.block(start, stop, slot)
        return block if block.dtype == dtype else _buffer(slot, stop - start, dtype, self.device).copy_(block)


def _theta(value: _Flat, reference: Tensor | None, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    """Return a block of value - reference (None: zero): the buffer "theta", or a view of what may not be changed."""
    if reference is None:
        return value.block_as(dtype, start, stop, "theta")
    block = value.block_as(dtype, start, stop, "value")
    return torch.sub(block, reference, out=_buffer("theta", stop - start, dtype, value.device))


def _blocks(tensors: Sequence[Values | None], dtype: torch.dtype) -> Iterator[list[Any]]:
    flat = [None if tensor is None else _Flat(tensor).values for tensor in tensors]
    length = next(tensor.numel() for tensor in flat if tensor is not None)

    def part(values: Any, start: int) -> Tensor:
        stop = min(start + BLOCK, length)
        return values[start:stop] if isinstance(values, Tensor) else values.read(start, stop)

    for start in range(0, length, BLOCK):
        yield [None if t is None else part(t, start).to(dtype) for t in flat]


def in_order(values: Values) -> Iterator[Tensor]:
    """Yield all entries in C order, as rows of one block each."""
    flat = _Flat(values)
    for start in range(0, values.numel(), BLOCK):
        yield flat.block(start, min(start + BLOCK, values.numel()), "value")


def delta(value: Values, reference: Tensor | None) -> Tensor:
    """Return value - reference (None: zero) in the dtype sums are formed in; new memory."""
    dtype, value = arithmetic(value.dtype), whole(value)
    return value.to(dtype, copy=True) if reference is None else value.to(dtype) - reference.to(dtype)


def delta_norm(value: Values, reference: Tensor | None) -> float:
    """Return ||value - reference||_F (None: zero) of floating-point tensors of one shape and device."""
    dtype = arithmetic(value.dtype)
    x, r = _Flat(value), None if reference is None else _Flat(reference)

    def norm(start: int, stop: int) -> float:
        ref = None if r is None else r.block_as(dtype, start, stop, "reference")
        return _block_norm(_theta(x, ref, dtype, start, stop))

    return math.hypot(*each_block(value.numel(), BLOCK, norm))


def delta_norms(pairs: Mapping[str, tuple[Values, Tensor | None]]) -> dict[str, float]:
    """Return `delta_norm` of each pair of a value and its reference."""

    def of(value: Values, reference: Tensor | None) -> Callable[[], float]:
        return begin(value.numel(), lambda: delta_norm(value, reference))

    waiting = {name: of(*pair) for name, pair in pairs.items()}
    return {name: wait() for name, wait in waiting.items()}


def _block_norm(block: Tensor) -> float:
    """Return one block's norm; where its squares may leave the dtype's range, from entries relative to the largest."""
    norm = float(torch.linalg.vector_norm(block))
    if _SAFE[0] < norm < _SAFE[1]:
        return norm
    block = block.to(torch.float64)
    largest = float(block.abs().max())
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    return largest * float(torch.linalg.vector_norm(block / largest))


def largest(tensor: Tensor) -> float:
    """Return the largest magnitude of a floating-point tensor, 0 of an empty one; NaN where there is one."""
    flat = tensor.detach().reshape(-1)

    def of_block(start: int, stop: int) -> float:
        low, high = torch.aminmax(flat[start:stop])  # NaN where there is one
        return max(-float(low), float(high))

    found = each_block(flat.numel(), BLOCK, of_block)
    return math.nan if any(math.isnan(value) for value in found) else max(found, default=0.0)


def gram(values: Sequence[Values], references: Sequence[Tensor | None]) -> Tensor:
    """Return the (n, n) float64 inner products of the deltas value - reference (None: zero), on the CPU."""
    total = torch.zeros(len(values), len(values), dtype=torch.float64)
    for block in _blocks([*values, *references], torch.float64):
        sent, received = block[: len(values)], block[len(values) :]
        thetas = torch.stack([x if r is None else x - r for x, r in zip(sent, received, strict=True)])
        total += (thetas @ thetas.T).cpu()
    return total


def weighted_sum(
    values: Sequence[Values],
    references: Sequence[Tensor | None],
    weights: Sequence[float],
    base: Tensor | None,
    server_lr: float,
) -> tuple[Tensor, float]:
    """Return (T, ||theta*||_F): T = W + alpha theta*, theta* = sum_i w_i (W_i - ref_i) (Eq. 5).

    Parameters
    ----------
    values : Sequence[Tensor | Reader]
        W_i: n floating-point tensors of one shape and device, and of one dtype, but for changes (ref_i zero) of a base.
    references : Sequence[Tensor | None]
        ref_i, what each client was sent; None is zero.
    weights : Sequence[float]
        (n,) w_i.
    base : Tensor | None
        W; None is zero.
    server_lr : float
        alpha.

    Returns
    -------
    tuple[Tensor, float]
        T, new memory, in the values' shape and device and the base's dtype (else theirs), with NaN or infinity where
        it leaves the dtype's range; the norm of theta*.
    """
    kind, device = (values[0] if base is None else base).dtype, values[0].device
    dtype = arithmetic(kind)
    out = torch.empty(values[0].shape, dtype=kind, device=device)
    result = out.reshape(-1)
    terms = [
        (w, _Flat(x), None if r is None else _Flat(r))
        for w, x, r in zip(weights, values, references, strict=True)
        if w != 0.0
    ]
    W = None if base is None else _Flat(base)

    def sum_block(start: int, stop: int) -> float:
        size = stop - start
        total = _buffer("total", size, dtype, device)
        if not terms:  # coefficients of 0
            total.zero_()
        ref, read = None, None
        for i, (w, x, r) in enumerate(terms):
            if r is None:
                ref = read = None
            elif read is None or r.values.data_ptr() != read:  # most clients were sent the same
                ref, read = r.block_as(dtype, start, stop, "reference"), r.values.data_ptr()
            theta = _theta(x, ref, dtype, start, stop)
            if i == 0:
                torch.mul(theta, w, out=total)
            else:
                total.add_(theta, alpha=w)
        norm = _block_norm(total)
        if server_lr != 1.0:
            total.mul_(server_lr)
        if W is None:
            result[start:stop] = total
        elif kind == dtype:
            torch.add(total, W.block_as(dtype, start, stop, "reference"), out=result[start:stop])
        else:
            result[start:stop] = total.add_(W.block_as(dtype, start, stop, "reference"))
        return norm

    norm = math.hypot(*each_block(out.numel(), BLOCK, sum_block))
    return out, norm


def is_finite(tensor: Tensor) -> bool:
    """Return whether no entry of a floating-point tensor is NaN or infinite; a temporary of one block."""
    flat = tensor.detach().reshape(-1)

    def block_is(start: int, stop: int) -> bool:
        block = flat[start:stop]
        # a finite sum has no other terms; one that is not may have overflowed
        return math.isfinite(float(block.sum())) or bool(torch.isfinite(block).all())

    return all(each_block(flat.numel(), BLOCK, block_is))


def gram_of_samples(values: Sequence[Values], references: Sequence[Tensor | None], factors: Sequence[float]) -> Tensor:
    """Return the (n, n) float64 inner products of what is `sampled` of the deltas, each times its factor."""
    wide = any(each.dtype == torch.float64 for each in (*values, *references) if each is not None)
    dtype, read = torch.float64 if wide else torch.float32, dict[int, Tensor]()

    def sample(i: int, r: Tensor | None) -> Tensor:
        x = values[i]
        entries = (sampled(x) if isinstance(x, Tensor) else x.sample()).to(dtype)
        if r is None:
            return entries
        if id(r) not in read:  # most clients were sent the same
            read[id(r)] = sampled(r).to(dtype)
        return entries - read[id(r)]

    first = sample(0, references[0])
    rows = torch.empty(len(values), len(first), dtype=torch.float64, device=first.device)
    for i, (r, factor) in enumerate(zip(references, factors, strict=True)):
        rows[i].copy_(sample(i, r) if i else first).mul_(factor)
    total = torch.zeros(len(values), len(values), dtype=torch.float64, device=first.device)
    for part in each_block(len(first), 1 << 12, lambda start, stop: rows[:, start:stop] @ rows[:, start:stop].T):
        total += part
    return total


def sampled(tensor: Tensor) -> Tensor:
    """Return a row of all entries of a tensor up to 2^16, else of 2^14: evenly spaced runs of 16. A view, or new."""
    flat = tensor.detach().reshape(-1)
    if len(flat) <= _WHOLE:
        return flat
    step = len(flat) // _RUNS
    return flat[: step * _RUNS].reshape(_RUNS, step)[:, :_RUN].reshape(-1)
