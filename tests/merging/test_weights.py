"""Eq. 1: w_i proportional to n_i^p ||theta_i||^k."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfrom import merge
from fedfrom.merging.methods.frobenius import weights
from tests.merging import oracle

NORMS = st.lists(st.just(0.0) | st.floats(1e-3, 1e3), min_size=1, max_size=6)
K = st.sampled_from([0.0, 0.5, 1.0, 2.0, 8.0, math.inf, -1.0, -2.0]) | st.floats(-20, 20)
INF = math.inf


@given(NORMS, K, st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.data())
def test_weights_are_eq_1(norms, k, p, data):
    examples = data.draw(st.none() | st.lists(st.integers(1, 10**6), min_size=len(norms), max_size=len(norms)))
    found = weights(norms, k, examples, p)
    assert found.dtype == torch.float64 and found.shape == (len(norms),)
    assert found.tolist() == pytest.approx(oracle.weights(norms, k, examples, p), rel=1e-12, abs=1e-300)
    assert float(found.sum()) == pytest.approx(1, abs=1e-15 * len(norms))


@given(NORMS, K, st.randoms())
def test_order_of_norms_changes_no_bit(norms, k, random):
    order = list(range(len(norms)))
    random.shuffle(order)
    found = weights(norms, k, [i + 1 for i in range(len(norms))], 0.5).tolist()
    moved = weights([norms[i] for i in order], k, [i + 1 for i in order], 0.5).tolist()
    assert moved == [found[i] for i in order]


@given(NORMS, K, st.sampled_from([1e-200, 1e-30, 1e30, 1e200]))
def test_scale_of_norms_changes_nothing(norms, k, c):
    assert weights([c * norm for norm in norms], k).tolist() == pytest.approx(weights(norms, k).tolist(), rel=1e-9)


@pytest.mark.parametrize(
    ("norms", "k", "expected"),
    [
        ([0.0, 1.0, 3.0], 0.0, [1 / 3] * 3),  # ||0||^0 = 1
        ([0.0, 0.0], 1.0, [0.5, 0.5]),
        ([0.0, 0.0], INF, [0.5, 0.5]),
        ([0.0, 1.0], INF, [0.0, 1.0]),
        ([0.0, 1.0], 1.0, [0.0, 1.0]),
        ([0.0, 1.0], 1e-9, [0.0, 1.0]),
        ([2.0, 2.0 * (1 + 1e-7), 1.0], INF, [0.5, 0.5, 0.0]),  # a tie within 1e-6
        ([2.0, 2.0 * (1 + 1e-5), 1.0], INF, [0.0, 1.0, 0.0]),
        ([1.0, 2.0, 4.0], 1e3, [0.0, 0.0, 1.0]),
        ([1e-308, 1e308], 1e3, [0.0, 1.0]),
        ([5e-324, 5e-324], 8.0, [0.5, 0.5]),
        ([1e308, 1e308], 1e308, [0.5, 0.5]),
        ([0.0, 1.0, 3.0], -1.0, [0.0, 0.75, 0.25]),  # NAN, and who changed nothing says nothing
        ([0.0, 0.0], -1.0, [0.5, 0.5]),
        ([0.0, 7.0], -1e-9, [0.0, 1.0]),
        ([1e-308, 1e308], -1e3, [1.0, 0.0]),
        ([1e-308, 1e308], -1e308, [1.0, 0.0]),
        ([1e308, 1e308], -1e308, [0.5, 0.5]),
    ],
)
def test_extremes_are_exact(norms, k, expected):
    assert weights(norms, k).tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("clip", "expected"), [(1.0, [0.0, 0.0, 0.5, 0.5]), (1.5, [0.0, 0.0, 0.0, 1.0]), (None, [0.0, 0.0, 0.0, 1.0])]
)
def test_clipping_comes_before_infinity(clip, expected):
    """With clip=1 the two above the median, 2.5, are as long as each other, and share: as `k` and `clip` say."""
    states = [{"w": torch.full((4,), norm)} for norm in (1.0, 2.0, 3.0, 4.0)]
    _, report = merge(states, {"w": torch.zeros(4)}, k=INF, clip=clip)
    assert report.layers[0].weights == expected


def test_large_k_in_log_space():
    # 2^1000 : 1 would overflow, (1 + 1e-3)^1000 : 1 would not
    assert weights([1.0, 1.001], 1000.0).tolist() == pytest.approx(oracle.weights([1.0, 1.001], 1000.0), rel=1e-12)


def test_large_powers_of_examples_do_not_overflow():
    assert weights([1.0, 1.0], 0.0, [10, 10**6], 1e308).tolist() == [0.0, 1.0]
    assert weights([1.0, 2.0], 1.0, [7, 7], 1e308).tolist() == pytest.approx([1 / 3, 2 / 3])
