"""CtM by its equations on dense float64 matrices, beside Eq. 6 at the same rank, and what is identically true of it."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedfrom import merge
from fedfrom.merging import CtM
from fedfrom.merging.linalg import tucker
from fedfrom.merging.methods import core_space, ctm
from tests.merging import oracle, properties
from tests.merging.formulas import are_apart, is_cut_clearly, ties
from tests.merging.samples import (
    A_KEY,
    B_KEY,
    TENSOR,
    Case,
    adapter_case,
    adapter_cases,
    generator,
    normal,
    tensor_case,
    tensor_cases,
)

AVERAGE = {"method": "ctm", "inner": "average"}
INNER: list[dict[str, Any]] = [
    AVERAGE,
    {"method": "ctm", "inner": "from", "inner_options": {"k": 1.0}},
    {"method": "ctm", "inner": "ties", "inner_options": {"density": 0.4}},
]
OTHERS = [{"method": "ctm", "inner": inner} for inner in ("task-arithmetic", "dare-ties", "tsv", "iso", "iso-cts")]
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}
TOLERANCE = 1e-6  # of HOOI, by default


def label(options: dict[str, Any]) -> str:
    return str(options["inner"])


# --- The paper, in full matrices --------------------------------------------------------------------------------------


def leading(side_by_side: Tensor, r: int) -> Tensor:
    """The first r left singular vectors, or all of the numerical rank; which they are must be clear."""
    U, S, _ = torch.linalg.svd(side_by_side, full_matrices=False)
    found = int((1e-9 * S[0] < S).sum())
    assume(float(S[found - 1]) >= 1e-3 * float(S[0]))
    assume(r >= found or float(S[r]) < 0.99 * float(S[r - 1]))
    return U[:, : min(r, found)]


def subspaces(X: list[Tensor], r: int) -> tuple[Tensor, Tensor]:
    """HOSVD, then HOOI until a step gains less than the tolerance; all directions where one side has no more than r."""
    U, V, held = leading(torch.cat(X, 1), 99), leading(torch.cat([x.T for x in X], 1), 99), 0.0
    if r >= min(U.shape[1], V.shape[1]):
        return U, V
    V = leading(torch.cat([x.T for x in X], 1), r)
    energy = sum(float(x.square().sum()) for x in X)
    while True:
        U = leading(torch.cat([x @ V for x in X], 1), r)
        V = leading(torch.cat([x.T @ U for x in X], 1), r)
        now = sum(float((U.T @ x @ V).square().sum()) for x in X)
        gain, held = (now - held) / energy, now
        assume(not 0.9 * TOLERANCE < gain < 1.1 * TOLERANCE)
        if gain < TOLERANCE:
            return U, V


def signed(basis: Tensor) -> Tensor:
    """Each column's largest entry positive."""
    largest = basis.abs().sort(dim=0, descending=True).values
    assume(len(basis) == 1 or bool((largest[0] > largest[1] * (1 + 1e-5)).all()))
    return basis * torch.stack([column[column.abs().argmax()].sign() for column in basis.T])


def compressed(thetas: list[Tensor], weights: Tensor, r: int, beta: float, options: dict[str, Any]) -> Tensor:
    """U inner(U^T theta_t V) V^T of 2606.03723, the targets of weighted clients times the root of their weight."""
    m = sum(float(w) * float(theta.norm()) for w, theta in zip(weights, thetas, strict=True)) / float(weights.sum())
    X = [
        float(w) ** 0.5 * (beta * float(theta.norm()) + (1 - beta) * m) * theta / float(theta.norm())
        for w, theta in zip(weights, thetas, strict=True)
    ]
    U, V = (signed(basis) for basis in subspaces(X, r))
    O = [U.T @ theta @ V for theta in thetas]
    if options["inner"] != "ties":
        return U @ sum(float(w) * o for w, o in zip(weights, O, strict=True)) @ V.T
    for x, basis in ((torch.cat([x @ V for x in X], 1), U), (torch.cat([x.T @ U for x in X], 1), V)):
        assume(are_apart(torch.linalg.svdvals(x)[: basis.shape[1]]))
    density = options["inner_options"]["density"]
    O = [torch.where(o.abs() > 1e-11 * o.norm(), o, 0.0) for o in O]
    assume(all(is_cut_clearly(o, density) for o in O))
    return U @ ties(O, density, "total", weights) @ V.T


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("options", INNER, ids=label)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 6), st.sampled_from(["fresh", "configs", "tensor"]))
@settings(max_examples=15)
def test_by_formula(options, beta, dtype, seed, n, r, start):
    """At ranks that cut and at some that don't, with weights by examples."""
    if start == "tensor":
        case = tensor_case(seed, shape=(9, 14), n=n, dtype=dtype, size=1e-3, moved=1.0, server_lr=0.5, examples=True)
    else:
        case = adapter_case(
            seed, d_out=20, d_in=17, n=n, r=4, dtype=dtype, start=start, server_lr=0.5, examples=True, spectrum="slow"
        )
    case, deltas = replace(case, rank=r), case.layer.deltas
    share = torch.tensor(case.examples, dtype=torch.float64)
    weights = share / (share.mean() if options["inner"] == "ties" else share.sum())
    if options["inner"] == "from":
        weights = torch.tensor(case.layer.weights(1.0, case.examples, 1.0), dtype=torch.float64)
    change = 0.7 * compressed(deltas, weights, r, beta, options)
    found = properties.result(case, **options, beta=beta, coefficient=0.7, examples_power=1.0)
    T = case.layer.W.double() + 0.5 * change
    size = float(case.layer.W.double().norm() + change.norm())
    assert oracle.relative_error(found, T, size) <= LIMITS[dtype]


@given(st.integers(0, 10**6), st.sampled_from(["trained", "cut"]))
@settings(max_examples=20)
def test_in_rounds_the_updates_are_compressed_and_the_sum_is_cut(seed, start):
    case = adapter_case(seed, d_out=20, d_in=17, n=3, r=4, start=start, server_lr=0.5)
    r = case.out_rank
    change = compressed(case.layer.deltas, torch.full((3,), 1 / 3, dtype=torch.float64), r, 0.25, AVERAGE)
    T = case.layer.W + 0.5 * change
    assume(oracle.is_separated(T, r))
    size = float(case.layer.W.norm() + change.norm())
    assert oracle.relative_error(properties.result(case, **AVERAGE), oracle.truncated(T, r), size) <= 1e-9


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@given(adapter_cases(start="fresh", spectrum="slow"))
@settings(max_examples=20)
def test_no_average_of_that_rank_is_closer_to_the_updates_than_eq_6(beta, case):
    """Eckart and Young; nor does Eq. 6 cut anything more of it."""
    found, best = (properties.run(case, **options)[1].layers[0] for options in (AVERAGE | {"beta": beta}, {"k": 0.0}))
    weights = [1 / len(case.states)] * len(case.states)
    merged = properties.result(case, **AVERAGE, beta=beta)
    size = case.layer.size(weights)
    assert found.rank_out == best.rank_out and found.energy_dropped <= 1e-12
    least = case.layer.objective(oracle.truncated(case.layer.update(weights), case.out_rank), weights)
    if case.server_lr == 1.0:
        assert case.layer.objective(merged, weights) >= least - 1e-9 * size
        assert found.objective >= best.objective - 1e-9 * size


# --- What is true of it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [*INNER, *OTHERS], ids=label)
@pytest.mark.parametrize("make", [adapter_case, tensor_case])
def test_the_result_has_the_rank(options, make):
    case = replace(make(1, n=5), rank=3)
    S = torch.linalg.svdvals(properties.result(replace(case, server_lr=1.0), **options) - case.layer.W)
    assert float(S[3]) <= 1e-12 * float(S[0])


@given(adapter_cases(spectrum="slow") | tensor_cases(shape=(7, 5)))
@settings(max_examples=20)
def test_at_a_rank_that_holds_all_updates_the_average_is_the_average(case):
    case = replace(case, rank=None if TENSOR in case.states[0] else min(case.layer.W.shape))
    expected = properties.result(case, method="average")
    size = float(case.layer.W.norm()) + max(case.layer.norms)
    assert oracle.relative_error(properties.result(case, **AVERAGE), expected, size) <= 1e-11


@pytest.mark.parametrize("options", INNER, ids=label)
@pytest.mark.parametrize("n", [3, 32])
def test_neither_gauge_nor_alpha_matters_to_what_is_compressed(options, n):
    """The same products by other factors: B G, G^-1 A, of other alphas."""
    g, case = generator(6), adapter_case(6, d_out=60, d_in=50, n=n, r=3)
    states, configs = [], []
    for i, state in enumerate(case.states):
        G, alpha = normal(3, 3, g=g), (3, 12, 6, 1)[i % 4]
        states.append({A_KEY: torch.linalg.solve(G, state[A_KEY]), B_KEY: state[B_KEY] @ G * (3 / alpha)})
        configs.append({"r": 3, "lora_alpha": alpha})
    changed = properties.result(replace(case, states=states, configs=configs), **options)
    assert oracle.relative_error(changed, properties.result(case, **options)) <= 1e-7  # G's condition


@pytest.mark.parametrize("options", INNER, ids=label)
def test_exact_on_cores(options):
    """f(P M Q^T) = P f(M) Q^T at a rank below the cores', P and Q tall."""
    g = generator(4)
    cores = [normal(8, 6, g=g) for _ in range(3)]
    P, Q = (torch.linalg.qr(normal(*shape, g=g)).Q for shape in ((40, 8), (30, 6)))

    def merged(matrices: list[Tensor]) -> Tensor:
        return merge([{"w": M} for M in matrices], {"w": torch.zeros_like(matrices[0])}, rank=4, **options)[0]["w"]

    assert oracle.relative_error(merged([P @ M @ Q.T for M in cores]), P @ merged(cores) @ Q.T) <= 1e-10


@given(adapter_cases(n=3, examples=True, spectrum="slow") | tensor_cases(n=3, examples=True, shape=(7, 5)))
@settings(max_examples=20)
def test_weights_count_clients(case):
    """Weight 0 is left out of the subspaces too, half a client counts half, and one that trained nothing not at all."""
    case = replace(case, rank=2, weights=None)
    assume(min(case.layer.norms) > 0 and is_decided(case))
    properties.assert_two_halves_of_a_client_count_as_the_whole(case, 1, 1e-7, **AVERAGE)
    properties.assert_weight_0_is_left_out(replace(case, weights=[1.0, 0.5, 2.0]), 1, 1e-7, **AVERAGE)


def is_decided(case: Case) -> bool:
    """Whether rounding decides neither which directions are kept, as far as HOSVD tells, nor what Eq. 6 cuts."""
    gaps = [
        torch.linalg.svdvals(torch.cat(parts, 1)) for parts in (case.layer.deltas, [d.T for d in case.layer.deltas])
    ]
    merged = properties.result(replace(case, server_lr=1.0), **AVERAGE, rank=min(case.layer.W.shape))
    return all(len(S) <= 2 or float(S[2]) < 0.99 * float(S[1]) for S in gaps) and oracle.is_separated(merged, 2)


@pytest.mark.parametrize("inner", ["average", "ties", "from"])
@pytest.mark.parametrize("noise", [0.0, 1e-12, 1e-8, 1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("r", [1, 3, 20])
def test_near_identical_and_rank_deficient_inputs_stay_bounded(inner, noise, r):
    g = generator(10)
    theta = normal(30, r, g=g) @ normal(r, 20, g=g)
    near = [theta + noise * theta.norm() / 25 * normal(30, 20, g=g) for _ in range(5)]
    for dtype in (torch.float32, torch.float64):
        states, zero = [{"w": each.to(dtype)} for each in near], {"w": torch.zeros(30, 20, dtype=dtype)}
        for rank in (1, 4, None):
            merged, _ = merge(states, zero, "ctm", inner=inner, rank=rank)
            assert float(merged["w"].norm()) <= math.sqrt(5) * max(float(each.norm()) for each in near) * (1 + 1e-5)


def test_beta_0_gives_small_updates_their_share_of_the_directions():
    """A long update of rank 2 and two short ones, on directions of their own: at rank 3 beta = 1 keeps the long one."""
    eye = torch.eye(6, dtype=torch.float64)
    long = 100 * (torch.outer(eye[0], eye[0]) + 0.3 * torch.outer(eye[1], eye[1]))
    states = [{"w": long}, {"w": torch.outer(eye[2], eye[2])}, {"w": torch.outer(eye[3], eye[3])}]
    options = {"reference": {"w": torch.zeros(6, 6, dtype=torch.float64)}, "inner": "task-arithmetic", "rank": 3}
    own = merge(states, method="ctm", beta=0.0, **options)[0]["w"].diagonal()
    assert own.tolist() == pytest.approx([100, 0, 1, 1, 0, 0], abs=1e-9)
    own = merge(states, method="ctm", beta=1.0, **options)[0]["w"].diagonal()
    assert own[:2].tolist() == pytest.approx([100, 30], abs=1e-9) and float(own[2:].sum()) == pytest.approx(1)


@pytest.mark.parametrize(("method", "place"), [("ctm", ctm), ("core-ties", core_space)])
@pytest.mark.parametrize("make", [adapter_case, tensor_case])
def test_bases_are_found_once_for_all_coefficients(method, place, make, monkeypatch):
    counts, found = [], place.bases
    monkeypatch.setattr(place, "bases", lambda *args: counts.append(1) or found(*args))
    case = make(2, n=3)
    merge(case.states, case.reference or None, method, coefficient="auto", validate=lambda state: 0.0)
    assert len(counts) == 1


@given(adapter_cases(n=3, start="trained"))
@settings(max_examples=10)
def test_a_factor_that_all_share_cuts_nothing_and_stays(case):
    """FFA-LoRA's clients: their updates have the A's rows alone, and their average that rank."""
    states = [{A_KEY: case.states[0][A_KEY], B_KEY: state[B_KEY]} for state in case.states]
    merged, _ = merge(states, method="ctm", inner="average")
    expected, _ = merge(states, method="average")
    A, found = states[0][A_KEY], oracle.product(merged[B_KEY], merged[A_KEY])
    size = max(float(oracle.product(state[B_KEY], A).norm()) for state in states)
    assert oracle.relative_error(found, oracle.product(expected[B_KEY], expected[A_KEY]), size) <= 1e-10


def test_the_model_scope_is_for_weights():
    case = tensor_case(1, n=3)
    options = {"inner": "from", "inner_options": {"scope": "model"}, "rank": 5}
    found = properties.result(case, method="ctm", **options)
    assert oracle.relative_error(found, properties.result(case, k=1.0, scope="model")) <= 1e-12


# --- The two subspaces ------------------------------------------------------------------------------------------------


def rotated(X: Tensor) -> Tensor:
    """The same matrices in coordinates of their own directions."""
    left, right = (torch.linalg.svd(torch.cat(list(x), 1)).U for x in (X, X.mT))
    return left.T @ X @ right


def test_one_matrix_gives_its_leading_singular_vectors():
    X = rotated(normal(1, 9, 7, g=generator(0)))
    U, V = tucker.tucker2(X, 3, 1e-12, 100, 1e-12)
    assert oracle.relative_error(U @ U.T @ X[0] @ V @ V.T, oracle.truncated(X[0], 3)) <= 1e-12


@pytest.mark.parametrize("shape", [(4, 9, 7), (8, 5, 20), (3, 6, 6)])
def test_every_step_keeps_more_and_the_last_is_stationary(shape):
    X, kept = rotated(normal(*shape, g=generator(1))), []
    for steps in range(1, 40):
        U, V = tucker.tucker2(X, 3, 0.0, steps, 1e-12)
        assert torch.allclose(U.T @ U, torch.eye(3).double()) and torch.allclose(V.T @ V, torch.eye(3).double())
        kept.append(float((U.T @ X @ V).square().sum()))
    assert all(later >= earlier * (1 - 1e-14) for earlier, later in zip(kept, kept[1:], strict=False))
    U, V = tucker.tucker2(X, 3, 0.0, 3000, 1e-12)
    for own, other in ((X @ V, U), (X.mT @ U, V)):
        gram = (own @ own.mT).sum(0)
        assert oracle.relative_error(other @ (other.T @ gram @ other), gram @ other) <= 1e-5


# --- Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"beta": -0.1}, "beta: expected 0 to 1"),
        ({"beta": math.nan}, "beta: expected 0 to 1"),
        ({"inner": "ctm"}, "inner: expected one of from.*found 'ctm'"),
        ({"inner": "svc"}, "inner: expected"),
        ({"inner": "regmean"}, "inner: expected"),
        ({"inner": "core-ties"}, "inner: expected"),
        ({"inner": "fisher"}, "inner: expected"),
        ({"inner_options": {"coefficient": 0.5}}, "inner_options: expected a mapping.*coefficient"),
        ({"inner_options": {"scope": "model"}}, "scope: expected layer"),
        ({"coefficient": math.nan}, "coefficient: expected a finite number"),
        ({"coefficient": "auto"}, "coefficient: expected validate="),
    ],
)
def test_wrong_settings_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        CtM(**options)
