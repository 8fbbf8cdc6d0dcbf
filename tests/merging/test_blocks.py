"""Norms and sums, a block at a time: against float64, whatever is looked at together."""

import math

import pytest
import torch

from fedfrom.merging.linalg import blocks, norms, sums
from fedfrom.merging.linalg.threads import one_thread_each

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SIZES = [0, 1, blocks.FEW, blocks.FEW + 1, norms._NORM_BLOCK, 3 * norms._NORM_BLOCK + 1025]


def pairs_of(dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Return values of three clients and of all sizes: less one reference each, less one of their own, less none."""
    generator, pairs = torch.Generator().manual_seed(0), []
    for size in SIZES:
        reference = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        for scale in (1e-3, 1.0, 0.0):
            value = (reference + scale * torch.randn(size, generator=generator, dtype=torch.float64)).to(dtype)
            pairs += [(value, reference), (value, reference.clone()), (value, None)]
    return [pairs[i] for i in torch.randperm(len(pairs), generator=generator).tolist()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_looked_at_together_are_those_of_each_alone(dtype: torch.dtype) -> None:
    pairs = pairs_of(dtype)
    exact = [float(torch.linalg.vector_norm(v.double() - (0 if r is None else r.double()))) for v, r in pairs]
    with one_thread_each():
        together, alone = norms.delta_norms(pairs), [norms.delta_norm(*pair) for pair in pairs]
    assert together == alone
    assert together == pytest.approx(exact, rel=1e-6, abs=0)


def test_what_many_are_compared_with_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = torch.zeros(3 * norms._NORM_BLOCK, dtype=torch.bfloat16)
    other = torch.zeros_like(reference)
    values = [torch.full_like(reference, i) for i in range(4)]
    read, inner = [], blocks.Flat.block_as

    def noting(self: blocks.Flat, dtype: torch.dtype, start: int, stop: int, slot: str) -> torch.Tensor:
        if slot == "reference":
            read.append((self.values.data_ptr(), start))
        return inner(self, dtype, start, stop, slot)

    monkeypatch.setattr(blocks.Flat, "block_as", noting)
    found = norms.delta_norms([(value, r) for r in (reference, other) for value in values])
    assert found == pytest.approx(2 * [i * math.sqrt(reference.numel()) for i in range(4)])
    starts = [i * norms._NORM_BLOCK for i in range(3)]
    assert sorted(read) == sorted((r.data_ptr(), start) for r in (reference, other) for start in starts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("rows", [True, False])
def test_results_beyond_the_dtype_are_told_whatever_the_change(dtype: torch.dtype, sign: float, rows: bool) -> None:
    """From the largest number itself: what is not looked at must be finite, what is not finite must be told."""
    limits = torch.finfo(dtype)
    base = torch.full((5,), sign * limits.max, dtype=dtype)
    told = []
    for exponent in range(-8, 4):
        change = torch.zeros(5, dtype=torch.float64)
        change[2] = sign * limits.max * limits.eps * 2.0**exponent
        if rows:
            found = sums.weighted_rows(change[None], [1.0], base, base, 1.0)
        else:
            found = sums.weighted_sum([change.to(blocks.arithmetic(dtype))], [None], [1.0], base, 1.0)
        result, _, finite = found
        assert finite == bool(torch.isfinite(result).all())
        told.append(finite)
    assert told[0] and not told[-1] and told == sorted(told, reverse=True)
