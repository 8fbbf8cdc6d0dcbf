"""Very many clients: leading triplets by products with the stacked factors or with their sum, against dense oracles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedfrom import LowRank, merge
from fedfrom.merging.linalg import krylov, stack
from fedfrom.merging.linalg.krylov import Operator, energy_of, krylov_svd
from fedfrom.merging.linalg.leading import columns_of
from fedfrom.merging.linalg.stack import Stack, cheapest
from fedfrom.merging.linalg.threads import one_thread_each
from fedfrom.merging.solve import energy_probes
from fedfrom.wire.spool import SpooledState
from tests.merging import oracle, properties
from tests.merging.samples import A_KEY, B_KEY, adapter_case, generator, normal, singular_values
from tests.merging.test_adapters import assert_optimal, merged_adapter, target
from tests.merging.test_memory import LargestResult

SHAPE = (200, 180, 40, 3)  # few enough triplets of it are asked for, of more clients than all numbers are exact for
LIMITS = {torch.float64: (1e-13, 1e-10), torch.float32: (1e-9, 1e-5)}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@pytest.fixture(params=["factors", "matrix"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What layers of thousands of columns take, here for small ones; and that it was taken."""
    taken = []
    monkeypatch.setattr(stack, "cheapest", lambda *sizes: taken.append(sizes) or request.param)
    yield request.param
    assert taken


@DTYPES
@pytest.mark.parametrize("start", ["fresh", "trained", "cut", "configs"])
def test_the_merge_is_the_optimum(way: str, start: str, dtype: torch.dtype) -> None:
    for seed, moved, spectrum in ((0, 0.3, "gaussian"), (1, 1e-3, "fast"), (2, 1e-6, "slow"), (3, 1.0, "flat")):
        case = adapter_case(seed, *SHAPE, dtype=dtype, start=start, moved=moved, spectrum=spectrum, server_lr=0.5)
        found, report = assert_optimal(case, 1.0, *LIMITS[dtype])
        assert report.norms == pytest.approx(case.layer.norms, rel=1e-6)
        T, w = target(case)
        energy, size = float(T.square().sum()), case.layer.size(w)
        close = 1e-6 if way == "matrix" else 0.1  # an estimate of what is left, its seed fixed
        residual = float((found - T).square().sum())
        assert report.energy_dropped == pytest.approx(residual / energy, rel=close, abs=1e-9)
        update = float(case.layer.update(w).square().sum())
        assert report.interference == pytest.approx(1 - update / size, abs=close * update / size + 1e-6)
        objective = case.layer.objective(found, w, 0.5)
        allowed = 1e-9 * energy + (0.0 if way == "matrix" else close * (residual + 0.25 * update))
        assert report.objective == pytest.approx(objective, rel=1e-6, abs=allowed)
        # a sketch
        assert report.lambda_max == pytest.approx(case.layer.lambda_max(w), abs=0.05)


@given(st.integers(0, 10**6), st.integers(2, 6), st.sampled_from(["gaussian", "fast"]), st.sampled_from([0.0, 1.0]))
@settings(max_examples=10)
def test_any_rank_of_any_clients(seed: int, out: int, spectrum: str, k: float) -> None:
    for dtype, limits in LIMITS.items():
        for name in ("factors", "matrix"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(stack, "cheapest", lambda *_, name=name: name)
                assert_optimal(
                    adapter_case(seed, 170, 190, 35, 2, dtype=dtype, start="configs", spectrum=spectrum, out=out),
                    k,
                    *limits,
                )


@DTYPES
def test_without_an_update_nothing_is_merged(way: str, dtype: torch.dtype) -> None:
    case = adapter_case(7, *SHAPE, dtype=dtype, start="trained", idle=15)
    found, report = assert_optimal(case, 1.0, *LIMITS[dtype])
    assert report.weights[:15] == [0.0] * 15
    nothing, silent = merged_adapter(adapter_case(7, *SHAPE, dtype=dtype, start="trained", idle=40))
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    assert oracle.relative_error(nothing, case.layer.W) <= limit
    assert silent.norms == [0.0] * 40 and silent.lambda_max == 0.0
    zeros = [{A_KEY: state[A_KEY], B_KEY: torch.zeros_like(state[B_KEY])} for state in case.states]
    merged, report = merge(zeros)
    assert not merged[B_KEY].any() and report.layers[0].energy_dropped == 0.0


@DTYPES
@pytest.mark.parametrize("left", [0.0, 1e-3, 1e-6])
def test_updates_that_cancel(way: str, left: float, dtype: torch.dtype) -> None:
    """theta and -theta, by factors of their own, and something small of either: float32 sums would be rounding."""
    g, (d_out, d_in, n, r) = generator(4), SHAPE
    states = []
    for _ in range(n // 2):
        B, A, small = normal(d_out, r, g=g), normal(r, d_in, g=g), normal(d_out, r, g=g)
        states += [{A_KEY: A, B_KEY: B}, {A_KEY: A.clone(), B_KEY: left * small - B}]
    states = [{key: value.to(dtype) for key, value in state.items()} for state in states]
    sent = [oracle.product(state[B_KEY], state[A_KEY]) for state in states]
    case = adapter_case(0, *SHAPE)
    zeros = torch.zeros(d_out, d_in, dtype=torch.float64)
    case = replace(case, states=states, layer=oracle.Layer(sent, [zeros] * n, zeros), dtype=dtype)
    # at left = 0 weights of k = 1 are equal but for rounding, and so is what is left
    limit, matrix_limit = LIMITS[dtype]
    # the digits that cancelling leaves
    assert_optimal(case, 0.0, limit, matrix_limit + 1e-15 / left if left else None)


@DTYPES
@pytest.mark.parametrize("start", ["fresh", "trained"])
def test_bits_depend_neither_on_the_order_nor_on_threads(way: str, start: str, dtype: torch.dtype) -> None:
    case, before = adapter_case(9, *SHAPE, dtype=dtype, start=start, moved=0.01), torch.get_num_threads()
    properties.assert_order_of_clients_changes_nothing(case, torch.randperm(40, generator=generator(1)).tolist())
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(merge(**case.arguments()))
    torch.set_num_threads(before)
    assert all(torch.equal(found[0][0][key], value) for key, value in found[1][0].items())
    assert found[0][1].layers == found[1][1].layers


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_large_and_small_adapters_float32(way: str, size: float) -> None:
    case = adapter_case(6, *SHAPE, dtype=torch.float32)
    merged, report = merge([{A_KEY: state[A_KEY], B_KEY: state[B_KEY] * size} for state in case.states])
    T, w = target(case)
    assert report.layers[0].weights == pytest.approx(w, rel=1e-6)
    found = oracle.product(merged[B_KEY].double() / size, merged[A_KEY])
    best = float((oracle.truncated(T, 3) - T).square().sum())
    assert float((found - T).square().sum()) - best <= 1e-9 * case.layer.size(w)


def test_one_update_of_all_clients(way: str) -> None:
    """T has rank 3: the iteration runs out of directions after one step."""
    case, g = adapter_case(3, *SHAPE).permuted([0] * 40), generator(1)
    mixed = [normal(3, 3, g=g) for _ in range(40)]  # with one A it would be solved without an iteration
    states = [
        {A_KEY: torch.linalg.solve(G, state[A_KEY]), B_KEY: state[B_KEY] @ G}
        for G, state in zip(mixed, case.states, strict=True)
    ]
    case = replace(case, states=states)
    found, report = merged_adapter(case)
    assert oracle.relative_error(found, case.layer.sent[0]) <= 1e-12
    assert report.energy_dropped <= 1e-12 and report.interference <= 1e-12


SPECTRA = ["1/j", "0.9^j", "0.999^j", "steps", "cliff", "equal", "rank 3"]


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(200, 170), (170, 400), (600, 700)])
@DTYPES
def test_triplets_are_those_of_the_full_svd(spectrum: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    m, r, g = min(shape), 8, generator(12)
    S = singular_values(spectrum, m, r)
    U, V = (torch.linalg.qr(normal(d, m, g=g)).Q for d in shape)
    C = ((U * S) @ V.T).to(dtype).double()
    lost, turned, allowed, matrix = (
        (3e-10, 1e-6, 1e-9, 1e-5) if dtype == torch.float32 else (1e-14, 1e-12, 1e-13, 1e-11)
    )
    if spectrum == "equal":  # rounding to float32 alone parts the values by more than they can be told apart
        allowed *= 10
    energy = float(C.square().sum())
    T = Operator.of(C.to(dtype))
    found = krylov_svd(T, r, lost * energy, turned, normal(shape[1], columns_of(r), g=g), energy_probes(shape[1]))
    if found is None:  # of a few hundred columns the space is all there is: the full SVD is taken
        assert m < 200 and spectrum in ("equal", "0.999^j", "steps")
        return
    assert found.energy == pytest.approx(energy, rel=1e-12)
    residual = float((C - (found.U * found.S) @ found.Vh).square().sum())
    best = oracle.truncated(C, r)
    assert residual - float((C - best).square().sum()) <= allowed * energy
    if oracle.is_separated(C, r):
        assert oracle.relative_error((found.U * found.S) @ found.Vh, best) <= matrix


def test_energy_is_estimated_within_its_error() -> None:
    """Of one direction it is exact, of many equal ones off by sqrt(2 / (m k)): here 1 %, three of it allowed."""
    d, g = 700, generator(5)
    for k in (1, 20, 300):
        X, Y = normal(d, k, g=g), normal(k, d, g=g)

        def times(V: Tensor, X: Tensor = X, Y: Tensor = Y) -> Tensor:
            return X @ (Y @ V)

        def transposed_times(U: Tensor, X: Tensor = X, Y: Tensor = Y) -> Tensor:
            return Y.T @ (X.T @ U)

        exact = float((X @ Y).square().sum())
        found = energy_of(Operator((d, d), times, transposed_times), energy_probes(d))
        assert found == pytest.approx(exact, rel=0.03 if k > 32 else 1e-12)


@DTYPES
def test_the_operator_is_the_matrix(dtype: torch.dtype) -> None:
    for start in ("trained", "configs"):
        case = adapter_case(11, *SHAPE, start=start)
        first = case.states[0]
        parts = [LowRank(state[B_KEY], state[A_KEY]) for state in case.states]
        if start == "trained":  # as an update is: each client's factors with those that all were sent
            parts += [LowRank(first[B_KEY], state[A_KEY], 0.5) for state in case.states[1:]]
            parts += [LowRank(state[B_KEY], first[A_KEY], 2.0) for state in case.states[1:30]]
        total = LowRank.sum(parts, [(-1) ** i / (i + 1) for i in range(len(parts))])
        held, g = Stack([total.terms]), generator(1)
        V, U = normal(180, 5, g=g), normal(200, 5, g=g)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stack, "cheapest", lambda *_: "factors")
            T = held.operator(total.terms, 16, dtype)
        assert T is not None and T.energy is None
        limit = 1e-13 if dtype == torch.float64 else 1e-6
        assert oracle.relative_error(T.times(V), total.dense() @ V) <= limit
        assert oracle.relative_error(T.transposed_times(U), total.dense().T @ U) <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("by_rows", [True, False])
def test_products_are_the_same_on_any_threads(by_rows: bool, dtype: torch.dtype) -> None:
    """More rows than one part has, and not a multiple of them; large enough to be shared out."""
    g = generator(3)
    matrix = normal(2000, 1200, g=g, dtype=dtype) if by_rows else normal(1200, 2000, g=g, dtype=dtype).T
    few = normal(1200, 5, g=g)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with one_thread_each():
                found.append(krylov.product(matrix, few))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found[0].double(), matrix.double() @ few, rtol=tolerance, atol=40 * tolerance)


def test_in_inference_mode_products_and_files_are_shared_out_too(tmp_path: Path) -> None:
    """Torch lets no other thread write to what is made in inference mode."""
    g = generator(4)
    adapters = [{A_KEY: normal(16, 4096, g=g).float(), B_KEY: normal(4096, 16, g=g).float()} for _ in range(33)]
    tensors = [{"w": normal(2200, 1000, g=g).float()} for _ in range(2)]
    spooled = [SpooledState(state, tmp_path, f"client {i}") for i, state in enumerate(tensors)]
    expected, before = [merge(adapters)[0], merge(tensors)[0]], torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with torch.inference_mode():
            found = [merge(adapters)[0], merge(spooled)[0]]
    finally:
        torch.set_num_threads(before)
    for each, other in zip(found, expected, strict=True):
        assert all(torch.equal(each[key], other[key]) for key in other)


def test_the_way_is_the_cheapest() -> None:
    clients = (3, 32, 316, 1000)
    assert [cheapest(4096, 4096, 8 * n, 16) for n in clients] == ["core", "core", "factors", "factors"]
    assert [cheapest(1024, 1024, 8 * n, 16) for n in clients] == ["core", "core", "matrix", "matrix"]
    # few wide factors of a long layer, where all numbers are to be exact: forming it would cost more than its core
    assert cheapest(40_000, 2048, 7 * 256, 8) == "factors" and cheapest(40_000, 2048, 7 * 256, 8, True) == "core"


def test_no_matrix_of_the_layers_size_is_formed() -> None:
    d, n, r = 3000, 150, 8
    g = generator(0)
    states = [{A_KEY: torch.randn(r, d, generator=g), B_KEY: torch.randn(d, r, generator=g)} for _ in range(n)]
    assert cheapest(d, d, n * r, columns_of(r)) == "factors"
    with LargestResult() as largest:
        merge(states)
    assert largest.numel <= n * r * d  # the stack of all factors


def test_a_space_that_is_full_is_cut_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(krylov, "_SPACE", 5)
    g = generator(2)
    C = normal(400, 300, g=g) @ normal(300, 350, g=g)
    found = krylov_svd(Operator.of(C), 8, 1e-14, 1e-12, normal(350, 16, g=g), energy_probes(350))
    assert found is not None
    assert found.S.tolist() == pytest.approx(oracle.singular_values(C)[:8].tolist(), rel=1e-12)
