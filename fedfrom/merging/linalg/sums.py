"""Eq. 5 for plain tensors, a block at a time: no temporary has the tensor's size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedfrom.merging.linalg.blocks import BLOCK, Empty, Flat, Values, arithmetic, buffer, update_block
from fedfrom.merging.linalg.norms import block_norm
from fedfrom.merging.linalg.threads import each_block


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
    norm = block_norm(theta)
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
    shared = {id(r): Flat(r) for r in (*references, base) if r is not None}  # most clients were sent the same
    terms = [
        (w, Flat(x), None if r is None else shared[id(r)])
        for w, x, r in zip(weights, values, references, strict=True)
        if w != 0.0
    ]
    W = None if base is None else shared[id(base)]
    if abs(server_lr) > torch.finfo(dtype).max:
        server_lr = math.copysign(math.inf, server_lr)  # as which the sums' dtype would take it

    def sum_block(start: int, stop: int) -> tuple[float, bool]:
        size = stop - start
        total = buffer("total", size, dtype, device)
        if not terms:  # coefficients of 0
            total.zero_()
        ref, last = None, None
        for i, (w, x, r) in enumerate(terms):
            if r is not last:
                ref, last = None if r is None else r.block_as(dtype, start, stop, "reference"), r
            if i == 0:  # in place, but for a view
                theta = update_block(x, ref, dtype, start, stop, "total")
                if w != 1.0 or ref is None:
                    torch.mul(theta, w, out=total)
            else:
                total.add_(update_block(x, ref, dtype, start, stop), alpha=w)
        norm, block = block_norm(total), result[start:stop]
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
