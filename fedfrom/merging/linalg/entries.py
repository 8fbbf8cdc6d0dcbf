"""The updates of one plain tensor, read a block at a time, and the magnitude that so many of their entries reach."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedfrom.merging.linalg.blocks import BLOCK, Values
from fedfrom.merging.linalg.threads import each_block

# a digit of a magnitude's bits, of which there are as many bins: two passes for float32, four for float64
_DIGIT = 16
# entries whose bins are added up before they are handed over
_PART = 16 * BLOCK
Histogram = Callable[[Tensor], Tensor]
"""Counts of a block of magnitudes, by `kth_largest`."""

Combine = Callable[[list[Tensor], int], Tensor]
"""combine(rows, start): a row of the result from n rows of entries, the first of them at `start`."""


@dataclass(frozen=True)
class Entries:
    """theta_i of n clients, clipped: factor_i (W_i - ref_i), in the dtype sums are formed in.

    Attributes
    ----------
    values : Sequence[Tensor | Reader]
        W_i, of one shape.
    references : Sequence[Tensor | None]
        ref_i; None is zero.
    factors : Sequence[float]
        What clipping multiplies them by.
    dtype : torch.dtype
        float32 or float64.
    """

    values: Sequence[Values]
    references: Sequence[Tensor | None]
    factors: Sequence[float]
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.values)

    @property
    def is_read(self) -> bool:
        """Whether some are not in memory."""
        return not all(isinstance(value, Tensor) for value in self.values)

    def numel(self) -> int:
        """Return how many entries each has."""
        return self.values[0].numel()

    def block(self, i: int, start: int, stop: int) -> Tensor:
        """Return theta_i's entries from `start` to `stop` in C order; new memory."""
        value, reference, factor = self.values[i], self.references[i], self.factors[i]
        if isinstance(value, Tensor):
            found = value.detach().reshape(-1)[start:stop].to(self.dtype, copy=True)
        else:
            found = value.read(start, stop).to(self.dtype)
        if reference is not None:
            found.sub_(reference.detach().reshape(-1)[start:stop].to(self.dtype))
        return found if factor == 1.0 else found.mul_(factor)

    def in_order(self, i: int) -> Iterator[Tensor]:
        """Yield theta_i's blocks."""
        for start in range(0, self.numel(), BLOCK):
            yield self.block(i, start, min(start + BLOCK, self.numel()))

    def counts(self, i: int, histogram: Histogram, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Return sums, some blocks at a time, of histogram(|theta_i|'s block, in that dtype)."""

        def part(start: int, stop: int) -> Tensor:
            total = torch.zeros((), dtype=torch.int64, device=self.values[i].device)
            for first in range(start, stop, BLOCK):
                block = self.block(i, first, min(first + BLOCK, stop)).abs_()
                total = total + histogram(block if dtype is None else block.to(dtype))
            return total

        return each_block(self.numel(), _PART, part, self.is_read)

    def threshold(self, i: int, count: int) -> tuple[float, int]:
        """Return (t, end): theta_i's `count` largest entries by magnitude are above t, or equal to it and before `end`.

        Of several that equal t the first in C order are taken.
        """
        length = self.numel()
        if count == 0:
            return float("inf"), length
        if length <= BLOCK:
            magnitudes = self.block(i, 0, length).abs_()
            largest = torch.topk(magnitudes, count).values
            least = float(largest[-1])
            taken, equal = int((largest == least).sum()), int((magnitudes == least).sum())
            return least, length if taken == equal else self._end(i, least, taken)

        def counts(histogram: Histogram) -> list[Tensor]:
            return self.counts(i, histogram)

        least, taken, equal = kth_largest(counts, count, self.dtype)
        return least, length if taken == equal else self._end(i, least, taken)

    def _end(self, i: int, magnitude: float, count: int) -> int:
        """Return the position after the first `count` entries of that magnitude."""
        for number, block in enumerate(self.in_order(i)):
            found = (block.abs_() == magnitude).nonzero()[:, 0]
            if len(found) >= count:
                return number * BLOCK + int(found[count - 1]) + 1
            count -= len(found)
        return self.numel()


def form(entries: Entries, combine: Combine) -> Tensor:
    """Return a row of all entries of combine(rows, start), a block at a time; new memory, in the entries' dtype."""
    result = torch.empty(entries.numel(), dtype=entries.dtype, device=entries.values[0].device)

    def part(start: int, stop: int) -> None:
        result[start:stop] = combine([entries.block(i, start, stop) for i in range(len(entries))], start)

    each_block(entries.numel(), BLOCK, part, entries.is_read)
    return result


def kth_largest(counts: Callable[[Histogram], Iterable[Tensor]], k: int, dtype: torch.dtype) -> tuple[float, int, int]:
    """Return (m, taken, equal): the k-th largest of any number of magnitudes, exactly, from blocks of them.

    Parameters
    ----------
    counts : Callable
        counts(histogram) calls histogram(block) on each block of all magnitudes, finite and >= 0, of the dtype, and
        returns what it returned, or sums of that. It is called twice for float32, four times for float64.
    k : int
        1 <= k <= how many there are.
    dtype : torch.dtype
        float32 or float64.

    Returns
    -------
    tuple[float, int, int]
        m; how many that equal it are among the k largest; how many equal it in all.

    Notes
    -----
    Bits of numbers >= 0 are in the numbers' order: 16 of them at a time are counted, from the leading ones on, among
    those whose bits before are the k-th largest's. Memory is that of 2^16 counts, whatever the number of entries.
    """
    bits, integers = (31, torch.int32) if dtype == torch.float32 else (63, torch.int64)
    found, left, equal, high = 0, k, 0, bits  # `found`: the bits above `high` of the k-th largest
    while high:
        low = max(0, high - _DIGIT)
        bins = 1 << (high - low)

        def histogram(block: Tensor, high: int = high, low: int = low, bins: int = bins) -> Tensor:
            keys = block.view(integers)
            if high < bits:
                keys = keys[keys >> high == found]  # noqa: B023 (called before `found` changes)
            return torch.bincount(keys >> low & bins - 1, minlength=bins)

        total = torch.zeros(bins, dtype=torch.int64)
        for part in counts(histogram):
            total += part.cpu()
        reached = total.flip(0).cumsum(0)  # how many have the largest digit, the two largest, ...
        digit = bins - 1 - int((reached < left).sum())
        equal = int(total[digit])
        left -= int(reached[bins - 1 - digit]) - equal
        found = found << (high - low) | digit
        high = low
    return float(torch.tensor(found, dtype=integers).view(dtype)), left, equal
