"""Methods that work entry by entry: in blocks the same as whole, to the bit, in memory of a few blocks."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfrom import merge
from fedfrom.merging import tensors
from fedfrom.merging.linalg import entries as module
from fedfrom.merging.linalg.blocks import BLOCK
from fedfrom.merging.linalg.entries import Entries, kth_largest
from fedfrom.merging.methods.ties import keep_from
from fedfrom.wire.spool import SpooledState
from tests.merging.samples import TENSOR, generator, tensor_case
from tests.peaks import printed_last, reads_peaks

ENTRYWISE: list[dict[str, Any]] = [
    {"method": "ties"},
    {"method": "ties", "density": 0.7, "majority": "frequency", "examples_power": 0.5, "clip": 1.0},
    {"method": "ties", "density": 0.3, "scope": "model"},
    {"method": "dare", "density": 0.4, "clip": 1.0, "server_lr": 0.7},
    {"method": "dare-ties", "density": 0.4, "seed": 3},
    {"method": "dare-from", "density": 0.4, "k": 2.0},
    {"method": "dare-from", "density": 1.0},
    {"method": "fisher", "examples_power": 1.0},
]
SHAPE = (900, 701)  # a block and a rest


def is_drawn(options: dict[str, Any]) -> bool:
    return "dare" in options["method"] and options["density"] < 1


def arguments(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    case = tensor_case(1, shape=SHAPE, n=4, dtype=dtype, examples=True)
    found = {**case.arguments(), **options}
    if options["method"] == "fisher":
        g = generator(1)
        found["statistics"] = [{TENSOR: torch.rand(SHAPE, generator=g)} for _ in range(4)]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [each for each in ENTRYWISE if not is_drawn(each)], ids=str)
def test_in_blocks_it_is_what_it_is_of_whole_tensors_to_the_bit(
    options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but DARE's below density 1: their masks are drawn block by block."""
    given = arguments(options, dtype)
    found, report = merge(**given)
    monkeypatch.setattr(tensors, "BLOCK", SHAPE[0] * SHAPE[1])
    expected, whole = merge(**given)
    assert torch.equal(found[TENSOR], expected[TENSOR]) and found[TENSOR].dtype == dtype
    # sums of numbers of both signs: what a block rounds is relative to their magnitudes
    assert report.layers[0].objective == pytest.approx(whole.layers[0].objective, rel=1e-6)
    assert report.layers[0].interference == pytest.approx(whole.layers[0].interference, rel=1e-6)


@pytest.mark.parametrize("options", ENTRYWISE, ids=str)
def test_what_is_read_from_disk_merges_to_the_same_bits(options: dict[str, Any], tmp_path: Any) -> None:
    given = arguments(options)
    expected, report = merge(**given)
    states = [SpooledState(state, tmp_path, f"client {i}") for i, state in enumerate(given["states"])]
    found, again = merge(**{**given, "states": states})
    assert torch.equal(found[TENSOR], expected[TENSOR])
    assert again.layers == report.layers


@pytest.mark.parametrize("options", [ENTRYWISE[0], ENTRYWISE[2], ENTRYWISE[4]], ids=str)
def test_how_many_threads_there_are_changes_nothing(options: dict[str, Any]) -> None:
    """On a tensor whose blocks are handed out."""
    g = generator(0)
    states = [{"w": torch.randn(1 << 21, generator=g)} for _ in range(3)]
    reference, before = {"w": torch.zeros(1 << 21)}, torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(merge(states, reference, **options))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0]["w"], found[1][0]["w"]) and found[0][1].layers == found[1][1].layers


def in_parts(magnitudes: torch.Tensor) -> Any:
    """At most 15 parts of 7 entries or more: a histogram of each, of half a MiB, is held."""
    return lambda histogram: [histogram(part) for part in magnitudes.split(max(7, len(magnitudes) // 14))]


@given(
    st.lists(
        st.floats(0, allow_infinity=False, width=32) | st.sampled_from([0.0, 1.0, 1e-45]), min_size=1, max_size=60
    ),
    st.sampled_from([torch.float32, torch.float64]),
    st.data(),
)
def test_the_kth_largest_is_the_sorted_ones(values: list[float], dtype: torch.dtype, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    magnitudes = torch.tensor(values, dtype=dtype)
    expected = sorted(magnitudes.tolist(), reverse=True)
    found, taken, equal = kth_largest(in_parts(magnitudes), k, dtype)
    assert found == expected[k - 1]
    assert (taken, equal) == (expected[:k].count(found), expected.count(found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kth_largest_is_torchs(dtype: torch.dtype) -> None:
    magnitudes = torch.randn(100_000, generator=generator(5), dtype=dtype).abs()
    for k in (1, 20_000, 99_999, 100_000):
        found, _, _ = kth_largest(in_parts(magnitudes), k, dtype)
        assert found == float(torch.kthvalue(magnitudes, len(magnitudes) - k + 1).values)


@pytest.mark.parametrize("length", [50, BLOCK + 50])
@pytest.mark.parametrize("density", [0.0001, 0.2, 0.55, 1.0])
def test_of_entries_that_are_equally_large_the_first_are_kept(
    length: int, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they lie in several blocks: as many as the density says, to the entry."""
    monkeypatch.setattr(module, "_PART", BLOCK)
    delta = torch.randint(-2, 3, (length,), generator=generator(1)).float()
    count = int(density * length)
    order = sorted(range(length), key=lambda i: (-abs(float(delta[i])), i))
    expected = torch.zeros(length)
    expected[order[:count]] = delta[order[:count]]
    least, end = Entries([delta], [None], [1.0], delta.dtype).threshold(0, count)
    assert torch.equal(keep_from(delta, least, end), expected)
    transposed = delta.reshape(-1, 2).T
    strided, contiguous = (
        Entries([each], [None], [1.0], delta.dtype).threshold(0, count)
        for each in (transposed, transposed.contiguous())
    )
    assert strided == contiguous


def test_a_block_is_of_the_clipped_update() -> None:
    value, reference = torch.arange(10.0).reshape(2, 5), 3 * torch.arange(10.0).reshape(2, 5)
    entries = Entries([value, value], [reference, None], [0.5, 1.0], torch.float32)
    assert entries.block(0, 3, 6).tolist() == [-3.0, -4.0, -5.0] and entries.block(1, 3, 6).tolist() == [3.0, 4.0, 5.0]
    entries.block(1, 0, 10).zero_()
    assert value.flatten().tolist() == list(range(10))


MEASURE = """
import sys
import torch
from fedfrom import merge

def states(rows):
    g = torch.Generator().manual_seed(0)
    return [{"w": torch.randn(rows, 1024, generator=g)} for _ in range(7)]

options = eval(sys.argv[1])
*small, reference = states(2048)  # its blocks are handed out, too
merge(small, reference, **options)
del small
*clients, reference = states(16384)
before = peak()
merge(clients, reference, **options)
print(peak() - before)
"""


@pytest.mark.slow
@reads_peaks
@pytest.mark.parametrize("options", ENTRYWISE[:-1], ids=str)
def test_the_peak_is_the_result_and_some_blocks(options: dict[str, Any]) -> None:
    """6 clients' updates of 64 MiB, of which each whole temporary would be one more."""
    mib = printed_last(MEASURE, repr(options))
    print(f"{options}: {mib:.1f} MiB")
    # the result's 64 and blocks of 2 MiB, some of each client (28 to 40 measured): less than any temporary of the whole
    assert 0 < mib < 64 + 48
