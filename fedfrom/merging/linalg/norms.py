"""Norms of plain tensors' updates, a block at a time, in any range of magnitudes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedfrom.merging.linalg.blocks import BLOCK, FEW, Flat, Values, arithmetic, is_small, update_block, whole
from fedfrom.merging.linalg.threads import each_block

# smaller than BLOCK: a norm reads a block of the reference and one update, which then stay in each core's own cache
_NORM_BLOCK = 1 << 18
# Entries whose squares are summed in float32; their sums are added in float64. So 1e-7 is lost, and in float32 alone
# 1e-5 may be.
_ROW = 1 << 10
# a norm outside this range may have lost squares to underflow or overflow in float32
_SAFE = (1e-12, 1e18)


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
        for start in range(0, len(indices), BLOCK // FEW):
            part = indices[start : start + BLOCK // FEW]
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
        norm if _is_safe(norm) else block_norm(thetas[start : start + size])
        for norm, start, size in zip(found, starts, sizes, strict=True)
    ]


def _norms(values: Sequence[Values], reference: Tensor | None) -> list[float]:
    """Return the norms of values of one shape and dtype, less one reference."""
    dtype = arithmetic(values[0].dtype)
    rows, r = [Flat(value) for value in values], None if reference is None else Flat(reference)

    def norms(start: int, stop: int) -> list[float]:
        ref = None if r is None else r.block_as(dtype, start, stop, "reference")
        return [block_norm(update_block(row, ref, dtype, start, stop)) for row in rows]

    found = each_block(values[0].numel(), _NORM_BLOCK, norms, rows[0].is_read)
    return [math.hypot(*(block[i] for block in found)) for i in range(len(rows))]


def block_norm(block: Tensor) -> float:
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


def largest_magnitude(tensor: Tensor) -> float:
    """Return the largest magnitude of a floating-point tensor, 0 of an empty one; NaN where there is one."""
    flat = tensor.detach().reshape(-1)

    def of_block(start: int, stop: int) -> float:
        low, high = torch.aminmax(flat[start:stop])  # NaN where there is one
        return max(-float(low), float(high))

    found = each_block(flat.numel(), BLOCK, of_block)
    return math.nan if any(math.isnan(value) for value in found) else max(found, default=0.0)
