"""Eq. 6 on adapters: the exact solution, Algorithm 1, and what goes around them."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfrom import LowRank, merge
from fedfrom.merging.linalg.lowrank import random_normal
from fedfrom.merging.solve import half_steps
from tests.merging import oracle
from tests.merging.samples import (
    A_KEY,
    B_KEY,
    DTYPES,
    POWERS,
    adapter_case,
    adapter_cases,
    factors,
    generator,
    merged_product,
    normal,
)

POWER = st.sampled_from(POWERS)


def merged_adapter(case, **options):
    """The dense product that comes out, and the layer's report."""
    merged, report = merge(**case.arguments(), rank=case.rank, **options)
    return merged_product(merged, report), report.layers[0]


def target(case, k=1.0, p=0.0):
    """(T, w) by the oracle."""
    w = case.layer.weights(k, case.examples, p)
    return case.layer.target(w, case.server_lr), w


def excess(case, found, T, w):
    """The objective (the literal sum over clients) above the dense optimum's, relative to sum_i w_i ||theta_i||^2."""
    best = oracle.truncated(T, case.out_rank)
    size = case.layer.size(w)
    difference = case.layer.objective(found, w, case.server_lr) - case.layer.objective(best, w, case.server_lr)
    return difference / size if size > 0 else difference


def assert_optimal(case, k, limit, matrix_limit, p=0.0, **options):
    """The merge solves Eq. 6: objective within `limit` of the dense optimum, the matrix too where that is unique."""
    found, report = merged_adapter(case, k=k, examples_power=p, **options)
    T, w = target(case, k, p)
    # Where W is far larger than the updates: the rounding of the factors to their dtype enters squared (to first order
    # it lies in the spaces of B and A, orthogonal to the residual), that of the oracle's own sums does not.
    eps = torch.finfo(case.dtype).eps ** 2 + torch.finfo(torch.float64).eps
    rounding = eps * float(T.norm()) ** 2 / max(case.layer.size(w), 1e-300)
    assert excess(case, found, T, w) <= limit + rounding
    assert torch.linalg.matrix_rank(found, rtol=1e-6) <= case.out_rank
    if matrix_limit and oracle.is_separated(T, case.out_rank):
        assert oracle.relative_error(found, oracle.truncated(T, case.out_rank), float(T.norm())) <= matrix_limit
    return found, report


@given(adapter_cases(dtype=torch.float64), POWER, st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=150)
def test_exact_solver_float64(case, k, p):
    assert_optimal(case, k, 1e-13, 1e-10, p)


@given(adapter_cases(dtype=torch.float32), POWER)
@settings(max_examples=150)
def test_exact_solver_float32(case, k):
    assert_optimal(case, k, 1e-9, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
@settings(max_examples=15)
def test_every_dtype_within_its_rounding(dtype, data):
    case = data.draw(adapter_cases(dtype=dtype, moved=0.3))
    merged, report = merge(**case.arguments(), rank=case.rank)
    assert {value.dtype for value in merged.values()} == {dtype}
    T, _ = target(case)
    if oracle.is_separated(T, case.out_rank):
        expected = oracle.truncated(T, case.out_rank)
        # each factor is rounded once: relative errors of at most eps / 2, so eps in the product
        limit = 1.5 * torch.finfo(dtype).eps + 1e-12
        assert oracle.relative_error(merged_product(merged, report), expected, float(T.norm())) <= limit


@pytest.mark.parametrize("spectrum", ["flat", "slow"])
@pytest.mark.parametrize("n", [1, 3, 8, 32])
@pytest.mark.parametrize("start", ["fresh", "trained"])
def test_alternating_is_close_to_the_optimum_on_flat_spectra(spectrum, n, start):
    for seed, (d, r) in enumerate([(24, 4), (64, 8), (96, 16), (256, 4)]):
        case = adapter_case(seed, d, d - 5, n, r, spectrum=spectrum, start=start, moved=0.05)
        assert_optimal(case, 1.0, 1e-4, None, solver="alternating")
        equal = adapter_case(seed, d, d - 5, n, r, spectrum=spectrum, start=start, moved=0.05)
        assert_optimal(equal, 0.0, 1e-4, None, solver="alternating")


@pytest.mark.parametrize("decay", ["equal", "1/sqrt(j)", "1/j", "0.999^j", "steps", "cliff"])
@pytest.mark.parametrize("seed", range(3))
def test_alternating_is_close_to_the_optimum_on_hard_spectra(decay, seed):
    """One orthogonal stack of all clients' updates, so that T has exactly this spectrum."""
    n, r, d = 16, 4, 96
    g, j = generator(seed), torch.arange(1.0, n * r + 1, dtype=torch.float64)
    values = {
        "equal": torch.ones_like(j),
        "1/sqrt(j)": j**-0.5,
        "1/j": 1 / j,
        "0.999^j": 0.999**j,
        "steps": 2.0 ** -torch.div(j, 6, rounding_mode="floor"),
        "cliff": torch.where(j <= r, 1 + 1e-3 / j, torch.ones_like(j)),
    }[decay]
    U, V = torch.linalg.qr(normal(d, n * r, g=g)).Q, torch.linalg.qr(normal(d, n * r, g=g)).Q
    U = U * values
    blocks = [slice(i, None, n) for i in range(n)]
    case = adapter_case(seed, d, d, n, r)
    states = [{A_KEY: V.T[block].contiguous(), B_KEY: U[:, block].contiguous()} for block in blocks]
    layer = replace(case.layer, sent=[state[B_KEY] @ state[A_KEY] for state in states])
    for solver_seed in (0, 1):
        assert_optimal(
            replace(case, states=states, layer=layer), 0.0, 1e-4, None, solver="alternating", seed=solver_seed
        )


@pytest.mark.parametrize(("seed", "shape", "n", "r", "out"), [(6, (40, 30), 3, 16, 12), (85, (96, 90), 1, 8, 5)])
def test_alternating_leaves_a_flat_global_model(seed, shape, n, r, out):
    """A W of equal singular values, small updates and a rank below W's: the slowest of all, thousands of iterations."""
    for moved in (0.05, 0.01):
        case = adapter_case(seed, *shape, n, r, start="trained", spectrum="flat", moved=moved, out=out)
        assert_optimal(case, 1.0, 1e-4, None, solver="alternating")


@given(adapter_cases(dtype=torch.float64, moved=0.1), POWER)
def test_alternating_is_close_to_the_optimum(case, k):
    assert_optimal(case, k, 1e-4, None, solver="alternating")


@given(adapter_cases(spectrum="fast", start="fresh", n=2))
def test_alternating_is_exact_where_the_stack_has_the_rank(case):
    """B A of one client alone: its rank is r, and one step of Algorithm 1 finds it."""
    case = case.permuted([0])
    found, report = merged_adapter(replace(case, rank=None), solver="alternating")
    T, _ = target(case)
    assert oracle.relative_error(found, T) <= 1e-12
    assert report.iterations <= 2


def test_alternating_keeps_the_best_iterate_and_the_limit():
    case = adapter_case(0, 64, 64, 16, 4, spectrum="flat")
    T, w = target(case)
    gaps = []
    for iterations in (1, 2, 4, 8, 16):
        found, report = merged_adapter(case, solver="alternating", iterations=iterations, tolerance=0.0)
        assert report.iterations <= iterations
        gaps.append(excess(case, found, T, w))
        assert report.excess == pytest.approx(gaps[-1], rel=1e-6, abs=1e-13)
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 10 * gaps[-1]


def iterates(T, A):
    while True:
        B, A, objective = half_steps(T, A)
        yield B, A, objective


@pytest.mark.parametrize("shape", [(40, 30), (12, 50), (9, 9)])  # Gram matrices would cost more than the last two
@pytest.mark.parametrize("spectrum", ["gaussian", "slow", "fast"])
def test_algorithm_1_step_for_step(shape, spectrum):
    """From one A_0: the dense normal equations, the QR half-steps in full space, and those in the stack's core."""
    g, r = generator(0), 3
    terms = [LowRank(*factors(*shape, 4, g, spectrum)) for _ in range(3)]
    total = LowRank.sum(terms, [0.2, 0.3, 0.5])
    T = sum(w * oracle.product(term.B, term.A) for w, term in zip([0.2, 0.3, 0.5], terms, strict=True))
    A_0 = normal(r, shape[1], g=g)
    left, C, right = total.core()
    lifted_B = left.lift(torch.eye(C.shape[0], dtype=torch.float64))
    lifted_A = right.lift(torch.eye(C.shape[1], dtype=torch.float64))
    assert tuple(C.shape) == ((12, 12) if shape == (40, 30) else shape)
    compared = 0
    runs = zip(oracle.algorithm_1(T, A_0), iterates(T, A_0), iterates(C, A_0 @ lifted_A), strict=True)
    for (B, A), (B_full, A_full, value), (B_core, A_core, core_value) in itertools.islice(runs, 20):
        if torch.linalg.cond(B) >= 1e6:
            break
        compared += 1
        expected = B @ A
        assert oracle.relative_error(B_full @ A_full, expected) <= 1e-9
        assert oracle.relative_error(lifted_B @ (B_core @ A_core) @ lifted_A.T, expected) <= 1e-9
        residual = float((expected - T).square().sum())
        assert value == pytest.approx(residual, rel=1e-9) and core_value == pytest.approx(residual, rel=1e-9)
        # the half-step itself: B spans what Eq. 7 spans
        assert oracle.relative_error(B_full @ (B_full.T @ B), B) <= 1e-9
    assert compared >= 5


def test_the_solver_is_algorithm_1_from_its_seeded_start():
    case = adapter_case(3, 40, 30, 5, 3)
    T, _ = target(case)
    A_0 = random_normal(3, 30, "7:base_model.model.encoder.layer.0.query")
    for steps in (1, 2, 5):
        B, A = next(itertools.islice(oracle.algorithm_1(T, A_0), steps - 1, None))
        found, _ = merged_adapter(case, solver="alternating", iterations=steps, tolerance=0.0, seed=7)
        assert oracle.relative_error(found, B @ A) <= 1e-9


@pytest.mark.parametrize("start", ["trained", "cut"])
@pytest.mark.parametrize("solver", ["svd", "alternating"])
@given(st.data())
@settings(max_examples=25)
def test_reference_learning_rate_and_rank(start, solver, data):
    """Non-zero reference, alpha = 0.5, rank in other than rank out: the whole of W + alpha theta*, truncated once."""
    case = data.draw(adapter_cases(start=start, server_lr=0.5, dtype=torch.float32))
    assert_optimal(
        case, 1.0, 1e-4 if solver == "alternating" else 1e-9, 1e-5 if solver == "svd" else None, solver=solver
    )


@given(adapter_cases(start="configs", dtype=torch.float32, out=None), POWER)
def test_unequal_ranks_and_alphas_against_the_oracle(case, k):
    found, report = assert_optimal(case, k, 1e-9, 1e-5)
    assert report.ranks_in == [state[A_KEY].shape[0] for state in case.states]


@given(st.integers(0, 10**6), st.sampled_from(["trained", "cut"]), st.integers(1, 6), st.sampled_from(DTYPES))
def test_clients_that_train_nothing_change_nothing(seed, start, n, dtype):
    case = adapter_case(seed, n=n, start=start, idle=n, dtype=dtype)
    found, report = merged_adapter(case, k=1.0)
    # a dtype's own rounding, where the gauge writes W anew
    assert oracle.relative_error(found, case.layer.W) <= max(1e-6, 2 * torch.finfo(dtype).eps)
    assert report.norms == [0.0] * n and report.weights == pytest.approx([1 / n] * n)


@given(st.integers(0, 10**6), st.sampled_from(["trained", "cut"]), st.sampled_from([0.5, 1.0, math.inf]))
def test_one_that_trains_nothing_has_no_weight(seed, start, k):
    case = adapter_case(seed, n=4, start=start, idle=1, dtype=torch.float32)
    alone = case.permuted([1, 2, 3])
    found, report = merged_adapter(case, k=k)
    expected, _ = merged_adapter(alone, k=k)
    assert report.weights[0] == 0.0
    assert oracle.relative_error(found, expected) <= 1e-6


@given(st.integers(0, 10**6), st.sampled_from([1e-3, 1e-5, 1e-7]))
def test_small_updates_of_a_large_matrix_keep_their_digits(seed, moved):
    """The norm of B_i A_i - B A where the two products cancel."""
    case = adapter_case(seed, start="trained", moved=moved, n=4)
    _, report = merged_adapter(case, k=2.0)
    assert report.norms == pytest.approx(case.layer.norms, rel=1e-8)
    assert report.weights == pytest.approx(case.layer.weights(2.0), rel=1e-7)
    # its inner products are Gram products, which lose the square of the ratio
    limit = 1e-6 + 1e-14 / moved**2
    assert report.lambda_max == pytest.approx(case.layer.lambda_max(report.weights), rel=limit)


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15, 1e30])
@pytest.mark.parametrize("solver", ["svd", "alternating"])
def test_large_and_small_adapters_float32(size, solver):
    case = adapter_case(4, dtype=torch.float32)
    states = [{A_KEY: state[A_KEY], B_KEY: state[B_KEY] * size} for state in case.states]
    layer = replace(case.layer, sent=[oracle.product(state[B_KEY], state[A_KEY]) for state in states])
    case = replace(case, states=states, layer=layer)
    found, report = merged_adapter(case, k=1.0, solver=solver)
    T, w = target(case)
    assert report.weights == pytest.approx(w, rel=1e-9)
    limit = 1e-5 if solver == "svd" else 0.05  # flat enough that 1e-4 in objective leaves the matrix open
    assert oracle.relative_error(found, oracle.truncated(T, 3)) <= limit


@pytest.mark.parametrize("size", [1e-200, 1e200])
@pytest.mark.parametrize("solver", ["svd", "alternating"])
@pytest.mark.parametrize("rank", [None, 0.9])
def test_large_and_small_adapters_float64(size, solver, rank):
    case = adapter_case(4)
    large = [{A_KEY: state[A_KEY], B_KEY: state[B_KEY] * size} for state in case.states]
    merged, report = merge(large, solver=solver, rank=rank)
    expected, expected_report = merge(case.states, solver=solver, rank=rank)
    found = oracle.product(merged[B_KEY] / size, merged[A_KEY])
    assert oracle.relative_error(found, oracle.product(expected[B_KEY], expected[A_KEY])) <= 1e-9
    for field in ("weights", "lambda_max", "energy_dropped", "excess", "rank_out"):
        value = getattr(expected_report.layers[0], field)
        assert getattr(report.layers[0], field) == pytest.approx(value, rel=1e-6, abs=1e-12), field


@pytest.mark.parametrize("solver", ["svd", "alternating"])
@given(st.data())
@settings(max_examples=25)
def test_fraction_ranks_keep_that_share_of_the_energy(solver, data):
    case = data.draw(adapter_cases(out=None, start="fresh"))
    share = data.draw(st.floats(0.05, 0.999))
    merged, report = merge(**case.arguments(), rank=share, solver=solver)
    T, _ = target(case)
    squares = oracle.singular_values(T).square()
    kept = squares.cumsum(0) / squares.sum()
    rank = merged[A_KEY].shape[0]
    assert report.layers[0].rank_out == rank
    assert kept[rank - 1] >= share - 1e-9
    assert rank == 1 or kept[rank - 2] < share + 1e-9


@given(st.integers(0, 10**6), st.floats(0.05, 0.9999), st.sampled_from(["svd", "alternating"]))
def test_fraction_ranks_are_capped_by_the_shapes_that_clients_have(seed, share, solver):
    case = adapter_case(seed, n=5, r=2, start="trained", moved=1.0)
    merged, report = merge(**case.arguments(), rank=share, as_reference=True, solver=solver)
    assert {key: value.shape for key, value in merged.items()} == {
        key: value.shape for key, value in case.reference.items()
    }
    T, w = target(case)
    found = merged_product(merged, report)
    layer = report.layers[0]
    dropped = float((found - T).square().sum() / T.square().sum())
    assert layer.energy_dropped == pytest.approx(dropped, rel=1e-6, abs=1e-9)
    assert layer.objective == pytest.approx(case.layer.objective(found, w), rel=1e-6)


@pytest.mark.parametrize("rank", [None, 1, 2, 8, 0.5])
def test_heads_of_two_classes_with_rank_8(rank):
    case = replace(adapter_case(0, d_out=2, d_in=16, r=8, n=3), rank=rank)
    merged, report = merge(**case.arguments(), rank=rank)
    T, _ = target(case)
    if rank != 0.5:
        assert oracle.relative_error(merged_product(merged, report), oracle.truncated(T, rank or 8)) <= 1e-12
    as_reference, _ = merge(case.states, case.states[0], rank=rank, as_reference=True)
    assert as_reference[A_KEY].shape == (8, 16) and as_reference[B_KEY].shape == (2, 8)


@given(adapter_cases(d_out=6, d_in=4, r=3, n=6))
def test_stacks_wider_than_the_matrix(case):
    assert_optimal(replace(case, rank=2), 1.0, 1e-13, 1e-10)


@pytest.mark.parametrize("as_reference", [False, True])
def test_rank_caps_the_product_and_as_reference_keeps_the_shapes(as_reference):
    case = adapter_case(5, r=4, start="trained")
    config = {"r": 4, "lora_alpha": 12}
    scaled = replace(case.layer, sent=[3 * M for M in case.layer.sent], received=[3 * M for M in case.layer.received])
    layer = replace(scaled, W=3 * scaled.W)
    merged, report = merge(
        **{**case.arguments(), "configs": [config] * 3, "reference_config": config}, rank=2, as_reference=as_reference
    )
    expected = oracle.truncated(layer.target(layer.weights(1.0)), 2)
    assert oracle.relative_error(merged_product(merged, report), expected) <= 1e-12
    if as_reference:
        assert report.config == config
        assert merged[A_KEY].shape == case.reference[A_KEY].shape
        assert torch.equal(merged[B_KEY][:, 2:], torch.zeros(12, 2, dtype=torch.float64))
        A = merged[A_KEY]
        assert torch.allclose(A @ A.T, torch.eye(4, dtype=torch.float64), atol=1e-12)
    else:
        assert merged[A_KEY].shape[0] == report.config["r"] == report.config["lora_alpha"] == 2


def test_model_scope_weighs_adapters_and_tensors_together():
    g = generator(0)
    case = adapter_case(6, n=3)
    heads = [normal(5, g=g) for _ in range(3)]
    W = normal(5, g=g)
    states = [{**state, "head": head} for state, head in zip(case.states, heads, strict=True)]
    with pytest.raises(ValueError, match=r"scope.*configs"):  # a scaling that cancels in a layer does not here
        merge(states, {"head": W}, k=2.0, scope="model")
    ranks = [state[A_KEY].shape[0] for state in states]
    configs = [{"r": r, "lora_alpha": r} for r in ranks]
    _, report = merge(states, {"head": W}, k=2.0, scope="model", configs=configs)
    norms = [math.hypot(a, float((head - W).norm())) for a, head in zip(case.layer.norms, heads, strict=True)]
    for layer in report.layers:
        assert layer.weights == pytest.approx(oracle.weights(norms, 2.0), rel=1e-12)
    merged, _ = merge(states, {"head": W}, k=2.0, scope="model", configs=configs)
    T = case.layer.target(oracle.weights(norms, 2.0))
    assert oracle.relative_error(oracle.product(merged[B_KEY], merged[A_KEY]), oracle.truncated(T, 3)) <= 1e-12
