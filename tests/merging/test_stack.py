"""Stacks of many factors: Gram matrices, cores and iterations against the dense oracle, where digits might go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfrom import LowRank, merge
from fedfrom.merging.linalg.leading import columns_of, leading_svd, takes_few
from fedfrom.merging.linalg.lowrank import norms_and_cosines
from fedfrom.merging.linalg.stack import Stack
from tests.merging import oracle, properties
from tests.merging.samples import A_KEY, B_KEY, Case, adapter_case, generator, merged_product, normal, singular_values
from tests.merging.test_adapters import assert_optimal, merged_adapter, target
from tests.merging.test_gauge import assert_gauge

# columns of all factors: more than the matrix has; few; so many that float32 inputs are summed in float32, and that the
# leading triplets are iterated for
WIDE, NARROW, MANY = (64, 60, 40, 4), (200, 180, 40, 2), (440, 420, 40, 5)
SHAPES = pytest.mark.parametrize("shape", [WIDE, NARROW, MANY], ids=["wide", "narrow", "many"])
LIMITS = {torch.float64: (1e-13, 1e-10), torch.float32: (1e-9, 1e-5)}


@SHAPES
@pytest.mark.parametrize("start", ["fresh", "trained", "cut", "configs"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_forty_clients_are_merged_to_the_optimum(shape: tuple, start: str, dtype: torch.dtype) -> None:
    for seed, moved, spectrum in ((0, 0.3, "gaussian"), (1, 1e-3, "fast"), (2, 1e-6, "slow"))[shape == MANY :]:
        case = adapter_case(seed, *shape, dtype=dtype, start=start, moved=moved, spectrum=spectrum, server_lr=0.5)
        found, report = assert_optimal(case, 1.0, *LIMITS[dtype])
        assert report.norms == pytest.approx(case.layer.norms, rel=1e-6)
        T, w = target(case)
        assert report.objective == pytest.approx(
            case.layer.objective(found, w, 0.5), rel=1e-6, abs=1e-12 * float(T.square().sum())
        )
        update = case.layer.update(w)  # once: it is as many sums as there are clients
        lost = sum(x * float((d - update).square().sum()) for x, d in zip(w, case.layer.deltas, strict=True))
        # without pairs it is the difference of sums of W's size
        assert report.interference == pytest.approx(lost / case.layer.size(w), abs=1e-6)


@pytest.mark.parametrize("n", [3, 40])
@pytest.mark.parametrize("moved", [1e-2, 1e-5, 1e-9])
def test_factors_that_nearly_depend_on_each_other(n: int, moved: float) -> None:
    """Fresh adapters that all started from one A_0 and one B_0, merged without a reference."""
    trained = adapter_case(5, 100, 90, n, 3, start="trained", moved=moved)
    zeros = [torch.zeros_like(trained.layer.W)] * n
    case = replace(trained, reference=None, rank=6, layer=oracle.Layer(trained.layer.sent, zeros, zeros[0]))
    assert_optimal(case, 1.0, 1e-13, 1e-10)
    merged, _ = properties.run(case)
    assert_gauge(merged[B_KEY], merged[A_KEY])


def test_one_product_by_other_factors_is_no_update() -> None:
    """B G and G^-1 A: what changed in the factors cancels in the product."""
    g = generator(3)
    B, A, G = normal(90, 4, g=g), normal(4, 80, g=g), normal(4, 4, g=g)
    moved = {A_KEY: torch.linalg.solve(G, A), B_KEY: B @ G}
    other = {A_KEY: A + 0.1 * normal(4, 80, g=g), B_KEY: B}
    merged, report = merge([moved, other], {A_KEY: A, B_KEY: B}, as_reference=True)
    norms = report.layers[0].norms
    assert norms[0] <= 1e-12 * float((B @ A).norm()) and report.layers[0].weights[1] == pytest.approx(1.0)
    assert oracle.relative_error(merged[B_KEY] @ merged[A_KEY], other[B_KEY] @ other[A_KEY]) <= 1e-10


@pytest.mark.parametrize("shape", [WIDE, NARROW, MANY, (330, 320, 30, 5)], ids=["wide", "narrow", "many", "pairs"])
@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_forty_large_and_small_adapters_float32(shape: tuple, size: float) -> None:
    case = adapter_case(6, *shape, dtype=torch.float32)
    states = [{A_KEY: state[A_KEY], B_KEY: state[B_KEY] * size} for state in case.states]
    merged, report = merge(states)
    expected, _ = merge(case.states)
    T, w = target(case)
    assert report.layers[0].weights == pytest.approx(w, rel=1e-6)
    gaps = [
        float((oracle.product(m[B_KEY].double() / s, m[A_KEY]) - T).norm()) for m, s in ((merged, size), (expected, 1))
    ]
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-9)


@SHAPES
def test_those_of_forty_that_trained_nothing_add_nothing(shape: tuple) -> None:
    case = adapter_case(7, *shape, start="trained", idle=15)
    found, report = assert_optimal(case, 1.0, 1e-13, 1e-10)
    assert report.weights[:15] == [0.0] * 15
    alone, _ = merged_adapter(case.permuted(list(range(15, 40))))
    assert oracle.relative_error(found, alone) <= 1e-12
    nothing, silent = merged_adapter(adapter_case(7, *shape, start="trained", idle=40))
    assert oracle.relative_error(nothing, case.layer.W) <= 1e-12
    assert silent.norms == [0.0] * 40 and silent.lambda_max == silent.objective == 0.0


@SHAPES
def test_forty_with_a_frozen_A(shape: tuple) -> None:
    d_out, d_in, n, r = shape
    g = generator(8)
    A, W = normal(r, d_in, g=g), normal(d_out, r, g=g)
    states = [{A_KEY: A.clone(), B_KEY: W + 0.1 * normal(d_out, r, g=g)} for _ in range(n)]
    merged, report = merge(states, {A_KEY: A, B_KEY: W}, as_reference=True, server_lr=0.5)
    w = report.layers[0].weights
    expected = W + 0.5 * sum(w_i * (state[B_KEY] - W) for w_i, state in zip(w, states, strict=True))
    assert torch.equal(merged[A_KEY], A) and oracle.relative_error(merged[B_KEY], expected) <= 1e-13


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@SHAPES
@pytest.mark.parametrize("start", ["fresh", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("threads")
def test_bits_depend_neither_on_the_order_nor_on_threads(shape: tuple, start: str, dtype: torch.dtype) -> None:
    for n in (7, 40):
        case = adapter_case(9, *shape[:2], n, shape[3], dtype=dtype, start=start, moved=0.01)
        order = torch.randperm(n, generator=generator(n)).tolist()
        properties.assert_order_of_clients_changes_nothing(case, order)
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(merge(**case.arguments()))
        assert all(torch.equal(found[0][0][key], value) for key, value in found[1][0].items())
        assert found[0][1].layers == found[1][1].layers


@SHAPES
def test_lambda_max_of_forty_is_within_some_percent(shape: tuple) -> None:
    case = adapter_case(10, *shape, start="trained")
    _, report = merged_adapter(case)
    assert report.cosines == []
    assert report.lambda_max == pytest.approx(case.layer.lambda_max(report.weights), abs=0.03)
    _, alike = merged_adapter(case.permuted([0] * 20 + [1] * 20), k=0.0)
    assert alike.lambda_max == pytest.approx(
        case.permuted([0] * 20 + [1] * 20).layer.lambda_max([1 / 40] * 40), abs=0.1
    )
    _, one = merged_adapter(case.permuted([0] * 40))
    assert one.lambda_max == pytest.approx(1.0)


@given(st.integers(0, 10**6), st.sampled_from([1e-8, 1.0, 1e8]), st.sampled_from(["trained", "cut"]))
@settings(max_examples=20)
def test_norms_and_cosines_are_the_dense_ones(seed: int, size: float, start: str) -> None:
    case: Case = adapter_case(seed, 50, 40, 5, 3, start=start)
    products = [LowRank(state[B_KEY] * size, state[A_KEY]) for state in case.states]
    rows = torch.stack([product.dense().flatten() for product in products])
    lengths = torch.linalg.vector_norm(rows, dim=1)
    norms, cosines = norms_and_cosines(products)
    assert norms == pytest.approx(lengths.tolist(), rel=1e-13)
    assert cosines is not None
    torch.testing.assert_close(cosines, rows @ rows.T / lengths / lengths[:, None], rtol=0, atol=1e-13)
    assert norms_and_cosines(products, pairs=False)[0] == pytest.approx(norms, rel=1e-13)


def test_a_part_in_the_same_memory_is_held_once() -> None:
    g = generator(11)
    B, A = normal(30, 6, g=g), normal(6, 20, g=g)
    whole, part, other = LowRank(B, A), LowRank(B[:, :2], A[:2]), LowRank(B[:, 2:], A[2:])
    stack = Stack([part.terms, whole.terms])
    assert stack.left.width == stack.right.width == 6 and not stack.holds(other.terms)
    assert oracle.relative_error(stack.dense(part.terms), B[:, :2] @ A[:2]) <= 1e-15


@pytest.mark.parametrize("spectrum", ["1/j", "0.9^j", "0.999^j", "steps", "cliff", "equal"])
@pytest.mark.parametrize("shape", [(200, 170), (170, 400)])
def test_leading_triplets_are_those_of_the_full_svd(spectrum: str, shape: tuple[int, int]) -> None:
    m, r, g = min(shape), 8, generator(12)
    S = singular_values(spectrum, m, r)
    U, V = (torch.linalg.qr(normal(d, m, g=g)).Q for d in shape)
    C = (U * S) @ V.T
    assert takes_few(C.shape, r)
    found = leading_svd(C, r, 1e-14, 1e-12, normal(shape[1], columns_of(r), g=g))
    if found is None:  # the full SVD is taken
        assert spectrum in ("equal", "steps", "0.999^j")
        return
    residual = float((C - (found[0] * found[1]) @ found[2]).square().sum())
    assert residual - float(S[r:].square().sum()) <= 1e-13 * float(S.square().sum())
    if float(S[r]) < 0.99 * float(S[r - 1]):
        assert oracle.relative_error((found[0] * found[1]) @ found[2], oracle.truncated(C, r)) <= 1e-11


def test_merged_forty_by_the_paper_too() -> None:
    case = adapter_case(13, *NARROW, start="trained", moved=0.1)
    merged, report = merge(**case.arguments(), solver="alternating")
    T, _ = target(case)
    best = float((oracle.truncated(T, 2) - T).square().sum())
    residual = float((merged_product(merged, report) - T).square().sum())
    assert residual - best <= 1e-4 * case.layer.size(report.layers[0].weights)
