"""Plain tensors, a block at a time: the norm of a delta and Eq. 5, without temporaries of the tensor's size.

A block of what is reckoned with stays in cache, so that memory is read once for the norms and once for the sum, and
written once. Buffers are each thread's own and are used again for every block.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedfrom.merging.linalg.threads import each_block

# large enough that two threads gain on each operation, small enough that some blocks fit the cache that cores share
BLOCK = 1 << 19
# smaller: a norm goes over a block of what was sent and one delta, which then stay in each core's own cache
_NORM_BLOCK = 1 << 18
# what float32 sums squares of, and float64 these: 1e-7 off where float32 throughout may be 1e-5
_ROW = 1 << 10
# entries of a tensor for which most of the time goes into calls
_FEW = 1 << 13
# what is sampled of tensors above 2^16 entries: runs of a cache line of float32, so that others are not read
_WHOLE, RUNS, RUN = 1 << 16, 1 << 10, 16
# a norm outside this range may have lost squares to underflow or overflow in float32
_SAFE = (1e-12, 1e18)
# norms whose samples' squares have all their digits in float32, though most of the norm is elsewhere
_USUAL = (1e-6, 1e18)
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


def _buffer(slot: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return this thread's buffer of that name, one block at most."""
    held: dict[Any, tuple[Tensor, Tensor]] = _buffers.__dict__.setdefault("held", {})
    key = (slot, dtype, device)
    whole, last = held.get(key) or 2 * (torch.empty(BLOCK, dtype=dtype, device=device),)
    if last.numel() != size:  # a slice takes a third of a small operation's time
        last = whole[:size]
    held[key] = whole, last
    return last


class _Flat:
    """Values as one row, whose blocks come in the dtype that they have, or in another one."""

    def __init__(self, values: Values) -> None:
        self.is_read = not isinstance(values, Tensor)
        self.values: Any = values.detach().reshape(-1) if isinstance(values, Tensor) else values
        self.dtype, self.device, self.length = values.dtype, values.device, values.numel()

    def block(self, start: int, stop: int, slot: str) -> Tensor:
        """Return a block: a view, or the buffer of that name."""
        if self.is_read:
            return self.values.read(start, stop, _buffer(slot, stop - start, self.dtype, self.device))
        return self.values if stop - start == self.length else self.values[start:stop]

    def block_as(self, dtype: torch.dtype, start: int, stop: int, slot: str) -> Tensor:
        """Return a block in that dtype: a view, or the buffer of that name."""
        block = self.block(start, stop, slot)
        return block if self.dtype == dtype else _buffer(slot, stop - start, dtype, self.device).copy_(block)


def _theta(
    value: _Flat, reference: Tensor | None, dtype: torch.dtype, start: int, stop: int, slot: str = "theta"
) -> Tensor:
    """Return a block of value - reference (None: zero): the buffer of that name, or a view of what may not change."""
    if reference is None:
        return value.block_as(dtype, start, stop, slot)
    block = value.block_as(dtype, start, stop, "value")
    return torch.sub(block, reference, out=_buffer(slot, stop - start, dtype, value.device))


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
    return delta_norms([(value, reference)])[0]


def delta_norms(pairs: Sequence[tuple[Values, Tensor | None]]) -> list[float]:
    """Return `delta_norm` of each pair of a value and its reference.

    Small ones, which are many, are looked at together, and so are those in memory that have one reference: each block
    of it is read once.
    """
    norms = [math.nan] * len(pairs)
    small: dict[bool, list[int]] = {True: [], False: []}
    large: dict[Any, list[int]] = {}
    for i, (value, reference) in enumerate(pairs):
        if is_small(value) and value.numel() and value.device.type == "cpu":
            small[reference is None].append(i)
        else:
            alone = reference is None or not isinstance(value, Tensor)
            large.setdefault(("alone", i) if alone else (id(reference), value.dtype), []).append(i)
    for indices in small.values():
        for start in range(0, len(indices), BLOCK // _FEW):
            part = indices[start : start + BLOCK // _FEW]
            for i, norm in zip(part, _small_norms([pairs[i] for i in part]), strict=True):
                norms[i] = norm
    for indices in large.values():
        for i, norm in zip(indices, _norms([pairs[i][0] for i in indices], pairs[indices[0]][1]), strict=True):
            norms[i] = norm
    return norms


def _small_norms(pairs: Sequence[tuple[Values, Tensor | None]]) -> list[float]:
    """Return the norms of small tensors, whose references are all None, or all not."""

    def row(tensors: Sequence[Values]) -> Tensor:
        return torch.cat([whole(tensor).detach().reshape(-1) for tensor in tensors]).to(torch.float64)

    thetas = row([value for value, _ in pairs])
    if references := [reference for _, reference in pairs if reference is not None]:
        thetas -= row(references)
    sizes = [value.numel() for value, _ in pairs]
    starts = [0, *itertools.accumulate(sizes)][:-1]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # those are looked at again
        found = np.sqrt(np.add.reduceat(np.square(thetas.numpy()), starts)).tolist()
    return [
        norm if _is_safe(norm) else _block_norm(thetas[start : start + size])
        for norm, start, size in zip(found, starts, sizes, strict=True)
    ]


def _norms(values: Sequence[Values], reference: Tensor | None) -> list[float]:
    """Return the norms of values of one shape and dtype, less one reference."""
    dtype = arithmetic(values[0].dtype)
    rows, r = [_Flat(value) for value in values], None if reference is None else _Flat(reference)

    def norms(start: int, stop: int) -> list[float]:
        ref = None if r is None else r.block_as(dtype, start, stop, "reference")
        return [_block_norm(_theta(row, ref, dtype, start, stop)) for row in rows]

    found = each_block(values[0].numel(), _NORM_BLOCK, norms, rows[0].is_read)
    return [math.hypot(*(block[i] for block in found)) for i in range(len(rows))]


def _block_norm(block: Tensor) -> float:
    """Return one block's norm; where its squares may leave the dtype's range, from entries relative to the largest."""
    size = block.numel()
    if size == 0:
        return 0.0
    if (rest := size % _ROW) == size:
        norm = float(torch.linalg.vector_norm(block))
    else:
        rows = torch.linalg.vector_norm(block[: size - rest].view(-1, _ROW), dim=1)
        norm = float(torch.linalg.vector_norm(rows))
        if rest:
            norm = math.hypot(norm, float(torch.linalg.vector_norm(block[size - rest :])))
    if _is_safe(norm):
        return norm
    block = block.to(torch.float64)
    largest = float(block.abs().max())
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    return largest * float(torch.linalg.vector_norm(block / largest))


def _is_safe(norm: float) -> bool:
    return _SAFE[0] < norm < _SAFE[1]


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


def weighted_rows(
    rows: Tensor,
    weights: Sequence[float],
    base: Tensor | None,
    like: Values,
    server_lr: float,
    empty: Empty = torch.empty,
) -> tuple[Tensor, float, bool]:
    """Return what `weighted_sum` does, of (n, m) float64 deltas, in the shape, dtype and device of `like`."""
    theta = torch.tensor(weights, dtype=torch.float64, device=rows.device) @ rows
    norm = _block_norm(theta)
    out = empty(like.shape, dtype=like.dtype, device=like.device)
    if base is None:
        out.reshape(-1).copy_(theta.mul_(server_lr))
    else:
        out.reshape(-1).copy_(theta.mul_(server_lr).add_(base.detach().reshape(-1)))
    return out, norm, _is_finite(out, server_lr * norm)


def weighted_sum(
    values: Sequence[Values],
    references: Sequence[Tensor | None],
    weights: Sequence[float],
    base: Tensor | None,
    server_lr: float,
    empty: Empty = torch.empty,
) -> tuple[Tensor, float, bool]:
    """Return (T, ||theta*||_F, whether T is finite): T = W + alpha theta*, theta* = sum_i w_i (W_i - ref_i) (Eq. 5).

    Parameters
    ----------
    values : Sequence[Tensor | Reader]
        W_i: n floating-point tensors of one shape and device, and of one dtype, but for changes (ref_i zero) of a base.
    references : Sequence[Tensor | None]
        ref_i, what each client was sent; None is zero.
    weights : Sequence[float]
        (n,) w_i.
    base : Tensor | None
        W, all of it finite; None is zero.
    server_lr : float
        alpha.
    empty : Callable[..., Tensor] (default: torch.empty)
        Gives T's memory, called with its shape, and dtype and device as keywords.

    Returns
    -------
    tuple[Tensor, float, bool]
        T, new memory, in the values' shape and device and the base's dtype (else theirs), with NaN or infinity where
        it leaves the dtype's range; the norm of theta*; False where T does that.
    """
    kind, device = (values[0] if base is None else base).dtype, values[0].device
    dtype = arithmetic(kind)
    out = empty(values[0].shape, dtype=kind, device=device)
    result = out.reshape(-1)
    shared = {id(r): _Flat(r) for r in (*references, base) if r is not None}  # most clients were sent the same
    terms = [
        (w, _Flat(x), None if r is None else shared[id(r)])
        for w, x, r in zip(weights, values, references, strict=True)
        if w != 0.0
    ]
    W = None if base is None else shared[id(base)]
    if abs(server_lr) > torch.finfo(dtype).max:
        server_lr = math.copysign(math.inf, server_lr)  # as which the sums' dtype would take it

    def sum_block(start: int, stop: int) -> tuple[float, bool]:
        size = stop - start
        total = _buffer("total", size, dtype, device)
        if not terms:  # coefficients of 0
            total.zero_()
        ref, last = None, None
        for i, (w, x, r) in enumerate(terms):
            if r is not last:
                ref, last = None if r is None else r.block_as(dtype, start, stop, "reference"), r
            if i == 0:  # in place, but for a view
                theta = _theta(x, ref, dtype, start, stop, "total")
                if w != 1.0 or ref is None:
                    torch.mul(theta, w, out=total)
            else:
                total.add_(_theta(x, ref, dtype, start, stop), alpha=w)
        norm, block = _block_norm(total), result[start:stop]
        if W is None:
            torch.mul(total, server_lr, out=block if kind == dtype else total)
        else:
            own = W.block_as(dtype, start, stop, "reference")
            torch.add(own, total, alpha=server_lr, out=block if kind == dtype else total)
        if kind != dtype:
            block.copy_(total)
        return norm, _is_finite(block, server_lr * norm)

    read = any(x.is_read for _, x, _ in terms)
    found = each_block(out.numel(), BLOCK, sum_block, read)
    return out, math.hypot(*(norm for norm, _ in found)), all(finite for _, finite in found)


def is_finite(tensor: Tensor) -> bool:
    """Return whether no entry of a floating-point tensor is NaN or infinite; a temporary of one block."""
    flat = tensor.detach().reshape(-1)
    return all(each_block(flat.numel(), BLOCK, lambda start, stop: _is_finite(flat[start:stop])))


def _is_finite(block: Tensor, change: float = math.inf) -> bool:
    """Return whether a block is finite; one that was, and has changed by this norm, is not always looked at."""
    # less than half of the largest number's last place rounds to no infinity, whatever it is added to; a quarter leaves
    # room for the norm's own rounding
    limits = torch.finfo(block.dtype)
    if abs(change) < limits.max * limits.eps / 8:
        return True
    # a finite sum has no other terms; one that is not may have overflowed
    return math.isfinite(float(block.sum())) or bool(torch.isfinite(block).all())


def sampled_deltas(
    values: Sequence[Values], references: Sequence[Tensor | None], dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return (n, m), in that dtype: what is `sampled` of the deltas value - reference (None: zero)."""
    distinct = {id(r): r for r in references if r is not None}  # most were sent the same
    rows = torch.stack([_sample(x) for x in (*values, *distinct.values())]).flatten(1).to(dtype)
    found = rows[: len(values)]
    for row, key in zip(rows[len(values) :], distinct, strict=True):
        own = [i for i, r in enumerate(references) if id(r) == key]
        if len(own) == len(values):
            found -= row
        else:
            found[own] -= row
    return found


def gram_of_samples(values: Sequence[Values], references: Sequence[Tensor | None], norms: Sequence[float]) -> Tensor:
    """Return (n, n) float64: inner products of what is `sampled` of the deltas, each times any factor above 0."""
    narrow = all(each is None or each.dtype != torch.float64 for each in (*values, *references))
    # float32 is twice as fast, and has the range for all but the smallest and the largest updates
    usual = all(norm == 0 or _USUAL[0] < norm < _USUAL[1] for norm in norms)
    dtype = torch.float32 if narrow and usual else torch.float64
    rows = sampled_deltas(values, references, dtype)
    if dtype == torch.float64:
        rows *= torch.tensor([1 / norm if norm else 0.0 for norm in norms], dtype=dtype, device=rows.device)[:, None]
    return (rows @ rows.T).to(torch.float64)


def is_small(values: Values) -> bool:
    """Return whether calling for what is done with values takes longer than doing it: all at once, in float64."""
    return values.numel() <= _FEW


def sampled(values: Values) -> Tensor:
    """Return a row of all entries of values up to 2^16, else of 2^14: evenly spaced runs of 16. A view, or new."""
    return _sample(values).reshape(-1)


def _sample(values: Values) -> Tensor:
    """Return what `sampled` does, of a tensor a view: a row of all entries, or a row for each run."""
    if not isinstance(values, Tensor):
        return values.sample() if values.numel() <= _WHOLE else values.sample().view(RUNS, RUN)
    flat = values.detach().reshape(-1)
    if flat.numel() <= _WHOLE:
        return flat
    step = flat.numel() // RUNS
    return flat[: step * RUNS].view(RUNS, step)[:, :RUN]
