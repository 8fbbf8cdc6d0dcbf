"""How long the merged update is and where it points, in the report and in the log."""

import logging

import pytest
import torch

from fedfrom import merge
from fedfrom.merging.linalg import samples
from fedfrom.merging.linalg.blocks import BLOCK
from tests.merging.samples import A_KEY, B_KEY, TENSOR, adapter_case, generator, normal, tensor_case


def lengths(case, found):
    """||theta*|| / mean ||theta_i|| and the cosines, of a theta* that was written out in full."""
    norms = [float(delta.norm()) for delta in case.layer.deltas]
    size = float(found.norm())
    cosines = [float((delta * found).sum()) / (n * size) for delta, n in zip(case.layer.deltas, norms, strict=True)]
    return size / (sum(norms) / len(norms)), cosines


@pytest.mark.parametrize("method", ["from", "task-arithmetic", "ties", "dare", "dare-ties"])
@pytest.mark.parametrize("shape", [(40, 50), (300, 400)])
def test_tensors_of_one_block_and_of_several(method, shape):
    """Above 2^16 entries the cosines are those of a sample."""
    case = tensor_case(4, shape=shape, n=3)
    merged, report = merge(**case.arguments(), method=method)
    layer = report.layers[0]
    ratio, cosines = lengths(case, merged[TENSOR] - case.layer.W)
    assert layer.size_ratio == pytest.approx(ratio, rel=1e-6)
    assert layer.cosines_merged == pytest.approx(cosines, abs=1e-6 if shape == (40, 50) else 0.05)
    if shape != (40, 50) and "ties" in method:  # of exactly the entries that are sampled
        some = [samples.sampled(delta) for delta in case.layer.deltas]
        found = samples.sampled(merged[TENSOR] - case.layer.W)
        exact = [float(row @ found / (row.norm() * found.norm())) for row in some]
        assert layer.cosines_merged == pytest.approx(exact, abs=1e-6)


def test_places_of_blocks_are_those_of_the_sample():
    for numel in (1 << 16, (1 << 16) + 1, 3 * BLOCK + 5, 100_003):
        row = torch.arange(numel)
        parts = [
            row[start : start + BLOCK][samples.places(numel, start, min(start + BLOCK, numel))]
            for start in range(0, numel, BLOCK)
        ]
        assert torch.equal(torch.cat(parts), samples.sampled(row))


@pytest.mark.parametrize("method", ["average", "task-arithmetic", "ties", "knots-ties"])
def test_many_clients(method):
    """Above 32 adapters a weighted sum has no cosines; what is formed has them all the same."""
    case = adapter_case(2, n=33, r=2)
    merged, report = merge(**case.arguments(), method=method, rank=9)
    layer = report.layers[0]
    ratio, cosines = lengths(case, merged[B_KEY] @ merged[A_KEY])
    assert layer.size_ratio == pytest.approx(ratio, rel=1e-6)
    assert layer.cosines_merged == (
        [] if method in ("average", "task-arithmetic") else pytest.approx(cosines, abs=1e-6)
    )


def test_clipped_updates_are_compared_as_they_are_merged():
    case = tensor_case(6, n=3)
    _, report = merge(**case.arguments(), clip=0.5)
    layer = report.layers[0]
    clipped = [norm * factor for norm, factor in zip(layer.norms, layer.clipped, strict=True)]
    weights = [own / sum(clipped) for own in clipped]
    thetas = [d * f for d, f in zip(case.layer.deltas, layer.clipped, strict=True)]
    size = float(sum(w * theta for w, theta in zip(weights, thetas, strict=True)).norm())
    assert layer.size_ratio == pytest.approx(size / (sum(clipped) / 3))


def test_what_is_no_update_has_neither():
    case = tensor_case(1, with_reference=False)
    for states, reference in ((case.states, None), ([{"bn.running_mean": torch.ones(3)}] * 2, None)):
        layer = merge(states, reference)[1].layers[0]
        assert layer.size_ratio == 0 and layer.cosines_merged == []


@pytest.mark.parametrize("scale", [1e-160, 1e160])
@pytest.mark.parametrize("method", ["from", "ties"])
def test_no_square_leaves_the_range(scale, method):
    case = tensor_case(3, n=3)
    W = case.reference[TENSOR]
    far = [{TENSOR: (state[TENSOR] - W) * scale} for state in case.states]
    zero = {TENSOR: torch.zeros_like(W)}
    expected = merge([{TENSOR: state[TENSOR] / scale} for state in far], zero, method)[1].layers[0]
    found = merge(far, zero, method)[1].layers[0]
    assert found.size_ratio == pytest.approx(expected.size_ratio, rel=1e-9)
    assert found.cosines_merged == pytest.approx(expected.cosines_merged, abs=1e-9)


def test_a_merge_far_longer_than_its_clients_is_warned_of_once(caplog):
    g = generator(5)
    shared = {key: normal(6, 4, g=g) for key in ("a", "b", "c")}
    states = [{key: value + 0.01 * normal(6, 4, g=g) for key, value in shared.items()} for _ in range(4)]
    zero = {key: torch.zeros(6, 4, dtype=torch.float64) for key in shared}
    with caplog.at_level(logging.WARNING):
        merge(states, zero, "task-arithmetic")
        assert len(caplog.records) == 1
        assert "in 3 of 3 layers" in caplog.text and "up to 4.0 times" in caplog.text and "coefficient" in caplog.text
        caplog.clear()
        merge(states, zero, "task-arithmetic", coefficient=0.7)
        merge(states, zero)
        assert not caplog.records
