"""Plain tensors, a block at a time: the norm of a delta and Eq. 5, without temporaries of the tensor's size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# float32 sums within a block of 2^16, float64 across: 6e-8 off, nearly twice as fast as all float64
BLOCK = 1 << 16
# a norm outside this range may have lost squares to underflow or overflow in float32
_SAFE = (1e-12, 1e18)


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype sums are formed in: float64 for float64, float32 for all that is narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _blocks(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Iterator[list[Any]]:
    flat = [None if tensor is None else tensor.reshape(-1) for tensor in tensors]
    length = next(tensor.numel() for tensor in flat if tensor is not None)
    for start in range(0, length, BLOCK):
        yield [None if t is None else t[start : start + BLOCK].to(dtype) for t in flat]


def delta(value: Tensor, reference: Tensor | None) -> Tensor:
    """Return value - reference (None: zero) in the dtype sums are formed in; new memory."""
    dtype = arithmetic(value.dtype)
    return value.to(dtype, copy=True) if reference is None else value.to(dtype) - reference.to(dtype)


def delta_norm(value: Tensor, reference: Tensor | None) -> float:
    """Return ||value - reference||_F (None: zero) of floating-point tensors of one shape and device."""
    blocks = _blocks([value, reference], arithmetic(value.dtype))
    return math.hypot(*(_block_norm(x if r is None else x - r) for x, r in blocks))


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


def is_finite(tensor: Tensor) -> bool:
    """Return whether no entry of a floating-point tensor is NaN or infinite."""
    return all(bool(torch.isfinite(block).all()) for (block,) in _blocks([tensor], arithmetic(tensor.dtype)))


def gram(values: Sequence[Tensor], references: Sequence[Tensor | None]) -> Tensor:
    """Return the (n, n) float64 inner products of the deltas value - reference (None: zero), on the CPU."""
    total = torch.zeros(len(values), len(values), dtype=torch.float64)
    for block in _blocks([*values, *references], torch.float64):
        sent, received = block[: len(values)], block[len(values) :]
        thetas = torch.stack([x if r is None else x - r for x, r in zip(sent, received, strict=True)])
        total += (thetas @ thetas.T).cpu()
    return total


def weighted_sum(
    values: Sequence[Tensor],
    references: Sequence[Tensor | None],
    weights: Sequence[float],
    base: Tensor | None,
    server_lr: float,
) -> tuple[Tensor, float]:
    """Return (T, ||theta*||_F): T = W + alpha theta*, theta* = sum_i w_i (W_i - ref_i) (Eq. 5).

    Parameters
    ----------
    values : Sequence[Tensor]
        W_i: n floating-point tensors of one shape, dtype and device.
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
        T, new memory, in the values' shape, dtype and device; the norm of theta*.
    """
    dtype = arithmetic(values[0].dtype)
    out = torch.empty(values[0].shape, dtype=values[0].dtype, device=values[0].device)
    flat, position = out.reshape(-1), 0
    norms: list[float] = []
    for W, *pairs in _blocks([base, *values, *references], dtype):
        sent, received = pairs[: len(values)], pairs[len(values) :]
        total: Tensor | None = None
        for w, x, r in zip(weights, sent, received, strict=True):
            if w == 0.0:
                continue
            theta = x if r is None else x - r
            total = theta * w if total is None else total.add_(theta, alpha=w)
        if total is None:  # a coefficient of 0
            total = torch.zeros_like(sent[0])
        norms.append(_block_norm(total))
        if server_lr != 1.0:
            total.mul_(server_lr)
        if W is not None:
            total.add_(W)
        flat[position : position + total.numel()] = total
        position += total.numel()
    return out, math.hypot(*norms)


def sample(value: Tensor, reference: Tensor | None) -> Tensor:
    """Return at most 2^16 evenly spaced entries of the delta as a float64 vector: all of them in smaller tensors."""
    step = -(-value.numel() // BLOCK) or 1
    x = value.reshape(-1)[::step].to(torch.float64)
    return x if reference is None else x - reference.reshape(-1)[::step].to(torch.float64)
