"""Inner products of plain tensors' updates: of all entries, or of an even sample of a large tensor's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedfrom.merging.linalg.blocks import Values
from fedfrom.merging.linalg.entries import Entries

# tensors above 2^16 entries are sampled: in runs of one cache line of float32, so that no other line is read
_WHOLE, RUNS, RUN = 1 << 16, 1 << 10, 16
# norms whose samples' squares have all their digits in float32, though most of the norm is elsewhere
_USUAL = (1e-6, 1e18)


def sampled(values: Values) -> Tensor:
    """Return a row of all entries of values up to 2^16, else of 2^14: evenly spaced runs of 16. A view, or new."""
    return _sample(values).reshape(-1)


def places(numel: int, start: int, stop: int) -> Tensor | slice:
    """Return which entries of the block from `start` to `stop` are `sampled` of so many: their places in the block."""
    if numel <= _WHOLE:
        return slice(None)
    step = numel // RUNS
    # runs that end after the block's start and begin before its end
    runs = torch.arange(max(0, (start - RUN) // step), min(RUNS, -(-stop // step)))
    found = (runs[:, None] * step + torch.arange(RUN)).flatten()
    return found[(found >= start) & (found < stop)] - start


def _sample(values: Values) -> Tensor:
    """Return what `sampled` does, of a tensor a view: a row of all entries, or a row for each run."""
    if not isinstance(values, Tensor):
        return values.sample() if values.numel() <= _WHOLE else values.sample().view(RUNS, RUN)
    flat = values.detach().reshape(-1)
    if flat.numel() <= _WHOLE:
        return flat
    step = flat.numel() // RUNS
    return flat[: step * RUNS].view(RUNS, step)[:, :RUN]


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


def gram(values: Sequence[Values], references: Sequence[Tensor | None]) -> Tensor:
    """Return the (n, n) float64 inner products of the deltas value - reference (None: zero), on the CPU."""
    entries = Entries(values, references, [1.0] * len(values), torch.float64)
    total = torch.zeros(len(values), len(values), dtype=torch.float64)
    for rows in zip(*(entries.in_order(i) for i in range(len(values))), strict=True):
        thetas = torch.stack(rows)
        total += (thetas @ thetas.T).cpu()
    return total
