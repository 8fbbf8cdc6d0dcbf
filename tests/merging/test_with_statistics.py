"""RegMean, LoRM and Fisher: their optima, and statistics that are missing or wrong."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedfrom import merge
from fedfrom.merging.methods.regmean import divide
from tests.merging import oracle, properties
from tests.merging.formulas import (
    shares,
    shrunk,
    update,
)
from tests.merging.samples import (
    DTYPES,
    MODULE,
    TENSOR,
    Case,
    adapter_case,
    adapter_cases,
    fishers,
    generator,
    normal,
    tensor_case,
    tensor_cases,
    with_grams,
)

# --- RegMean ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["regmean", "lorm"])
@given(adapter_cases(examples=True) | tensor_cases(shape=(7, 5), examples=True))
@settings(max_examples=20)
def test_regmean_with_equal_grams_is_the_mean(method, case):
    if TENSOR not in case.states[0]:
        case = replace(case, rank=min(case.layer.W.shape))
    same = with_grams(case).statistics[0]
    expected = case.layer.target(shares(case, 1.0).tolist(), case.server_lr)
    found = properties.result(replace(case, statistics=[same] * len(case.states)), method=method, examples_power=1.0)
    assert oracle.relative_error(found, expected, float(case.layer.W.norm() + expected.norm())) <= 1e-11


def test_regmean_is_the_least_squares_fit_of_all_clients_outputs():
    """Its own claim, from inputs, with a = 1: no weights reproduce the clients' outputs better."""
    case, g = tensor_case(4, shape=(6, 5), n=3), generator(0)
    inputs = [normal(50, 5, g=g) for _ in range(3)]
    case = replace(case, statistics=[{TENSOR.removesuffix(".weight"): x.T @ x / 50} for x in inputs])
    expected = torch.linalg.lstsq(
        torch.cat(inputs), torch.cat([x @ W.T for x, W in zip(inputs, case.layer.sent, strict=True)])
    ).solution.T
    assert oracle.relative_error(properties.result(case, method="regmean", off_diagonal=1.0), expected) <= 1e-12
    alone = replace(case, reference=None, layer=replace(case.layer, W=torch.zeros_like(case.layer.W)))
    assert oracle.relative_error(properties.result(alone, method="regmean", off_diagonal=1.0), expected) <= 1e-12


def test_regmean_without_inputs_in_a_column_keeps_the_reference_there():
    case = with_grams(tensor_case(5, shape=(6, 5)))
    for each in case.statistics:
        for gram in each.values():
            gram[2], gram[:, 2] = 0.0, 0.0
    found = properties.result(case, method="regmean")
    assert torch.equal(found[:, 2], case.layer.W[:, 2]) and torch.isfinite(found).all()


def test_regmean_divides_by_a_singular_gram_matrix_too():
    """Fewer inputs than columns: the pseudo-inverse's answer, not one blown up by a pivot of rounding."""
    inputs = normal(5, 12, g=generator(3))
    gram = inputs.T @ inputs
    rows = normal(4, 12, g=generator(4)) @ gram
    expected = rows @ torch.linalg.pinv(gram, hermitian=True)
    assert oracle.relative_error(divide(rows, gram), expected) <= 1e-9
    regular = gram + torch.eye(12, dtype=torch.float64)
    assert oracle.relative_error(divide(rows, regular) @ regular, rows) <= 1e-12


# --- LoRM -------------------------------------------------------------------------------------------------------------


def lorm_objective(product: Tensor, case: Case, w: Tensor, a: float) -> float:
    """sum_i w_i ||(BA - W - alpha theta_i) G_i^1/2||_F^2."""
    total = 0.0
    for w_i, delta, each in zip(w, case.layer.deltas, case.statistics, strict=True):
        difference = product - case.layer.W.double() - case.server_lr * delta
        total += float(w_i * (difference @ shrunk(each[MODULE], a) * difference).sum())
    return total


@given(adapter_cases(examples=True), st.integers(0, 99))
@settings(max_examples=20)
def test_lorm_at_full_rank_is_regmean(case, seed):
    case = replace(with_grams(case, seed), rank=min(case.layer.W.shape))
    expected = properties.result(case, method="regmean", examples_power=1.0)
    found = properties.result(case, method="lorm", examples_power=1.0)
    assert oracle.relative_error(found, expected, float(case.layer.W.norm() + expected.norm())) <= 1e-9


@given(adapter_cases(examples=True), st.integers(0, 99))
@settings(max_examples=60)
def test_lorm_reaches_the_optimum_of_its_objective(case, seed):
    """T M^1/2's truncated SVD, M = sum_i w_i G_i, times M^-1/2, is the best of this rank: W and theta* cut together."""
    case, a = with_grams(case, seed), 0.5
    w = shares(case, 1.0)
    M = sum(w_i * shrunk(each[MODULE], a) for w_i, each in zip(w, case.statistics, strict=True))
    values, vectors = torch.linalg.eigh(M)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    T = case.layer.W + case.server_lr * update(case, "regmean", off_diagonal=a, examples_power=1.0)
    best = torch.linalg.solve(root, oracle.truncated(T @ root, case.out_rank), left=False)
    options = {"off_diagonal": a, "examples_power": 1.0}
    size = lorm_objective(torch.zeros_like(T), case, w, a)
    found = lorm_objective(properties.result(case, method="lorm", **options), case, w, a)
    assert found - lorm_objective(best, case, w, a) <= 1e-6 * size
    cut = lorm_objective(properties.result(case, method="regmean", **options), case, w, a)
    assert found <= cut + 1e-6 * size


def test_lorm_beats_regmean_cut_to_the_rank():
    """Where inputs are not white the best matrix of a rank is another one: by 10 % and more here."""
    case = with_grams(adapter_case(13, d_out=20, d_in=16, r=4, n=3, out=4))
    for each in case.statistics:
        scale = torch.logspace(-1.5, 1.5, 16, dtype=torch.float64)
        each[MODULE] = scale[:, None] * each[MODULE] * scale
    w = shares(case, 0.0)
    lorm, cut = (
        lorm_objective(properties.result(case, method=method, off_diagonal=1.0), case, w, 1.0)
        for method in ("lorm", "regmean")
    )
    assert lorm < 0.9 * cut


# --- Fisher -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["tensor", "fresh", "trained"])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_fisher_by_formula(start, p):
    """Key by key: on adapters of the factors, which are not products."""
    case = tensor_case(6, examples=True) if start == "tensor" else adapter_case(6, start=start, examples=True)
    case = replace(case, statistics=fishers(case), server_lr=1.0 if start == "fresh" else 0.5)
    w = shares(case, p)
    merged, report = merge(**case.arguments(), method="fisher", floor=0.01, examples_power=p)
    for key, found in merged.items():
        W = torch.zeros_like(found) if case.reference is None else case.reference[key]
        F = [w_i * (each[key] + 0.01) for w_i, each in zip(w, case.statistics, strict=True)]
        change = sum(f * (state[key] - W) for f, state in zip(F, case.states, strict=True)) / sum(F)
        assert oracle.relative_error(found, W + case.server_lr * change) <= 1e-13
        layer = next(layer for layer in report.layers if layer.name == key)
        deltas = [state[key] - W for state in case.states]
        lost = sum(float(w_i * (change - delta).square().sum()) for w_i, delta in zip(w, deltas, strict=True))
        assert layer.interference == pytest.approx(
            lost / sum(float(w_i * delta.square().sum()) for w_i, delta in zip(w, deltas, strict=True)), rel=1e-9
        )


@pytest.mark.parametrize("start", ["tensor", "fresh", "trained"])
def test_fisher_with_equal_weights_is_the_mean_of_the_factors(start):
    case = tensor_case(7) if start == "tensor" else adapter_case(7, start=start)
    for same in (fishers(case)[0], {key: torch.zeros_like(value) for key, value in case.states[0].items()}):
        found, _ = merge(**replace(case, statistics=[same] * 3).arguments(), method="fisher")
        expected, _ = merge(**case.arguments(), method="factor-average")
        assert all(oracle.relative_error(found[key], expected[key]) <= 1e-14 for key in expected)


def test_fisher_properties():
    for case in (tensor_case(8, n=4, examples=True), adapter_case(8, n=4, start="trained", examples=True)):
        case = replace(case, statistics=fishers(case))
        properties.assert_order_of_clients_changes_nothing(case, [2, 0, 3, 1], method="fisher", examples_power=0.5)
        properties.assert_inputs_are_unchanged(case, method="fisher")
        alone = replace(case, states=case.states[:1], examples=None, statistics=case.statistics[:1])
        found, _ = merge(**alone.arguments(), method="fisher")
        assert all(oracle.relative_error(found[key], case.states[0][key]) <= 1e-14 for key in found)
    for dtype in DTYPES:
        case = adapter_case(8, start="trained", dtype=dtype)
        properties.assert_dtype_and_layout_are_kept(replace(case, statistics=fishers(case)), method="fisher")


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, helper", [("regmean", "gram"), ("lorm", "gram"), ("fisher", "fisher")])
def test_missing_statistics_name_the_client_and_the_helper(method, helper):
    case = adapter_case(0, start="trained")
    for statistics in (None, [{MODULE: torch.eye(9)}, None, {MODULE: torch.eye(9)}], [{MODULE: torch.eye(9)}, {}, {}]):
        with pytest.raises(ValueError) as caught:
            merge(**replace(case, statistics=statistics).arguments(), method=method)
        assert f"client {0 if statistics is None else 1}" in str(caught.value)
        assert f"fedfrom.client.{helper}" in str(caught.value)


@pytest.mark.parametrize("kind", ["tensor", "adapter"])
@pytest.mark.parametrize("method", ["regmean", "lorm", "fisher"])
def test_wrong_statistics_name_the_client_and_the_layer(method, kind):
    case = tensor_case(0) if kind == "tensor" else adapter_case(0, start="trained")
    case = replace(case, statistics=fishers(case)) if method == "fisher" else with_grams(case)
    name = next(iter(case.statistics[0]))
    right = case.statistics[1][name]
    spoiled = right.clone()
    spoiled[0, 0] = math.nan
    for wrong in (right[:-1, :-1], right[:1], right.flatten(), spoiled):
        statistics = [case.statistics[0], {**case.statistics[1], name: wrong}, case.statistics[2]]
        with pytest.raises(ValueError) as caught:
            merge(**replace(case, statistics=statistics).arguments(), method=method)
        for word in ("client 1", name, "expected", "found"):
            assert word in str(caught.value)
    elsewhere = {key if key != name else "elsewhere": value for key, value in case.statistics[2].items()}
    statistics = [*case.statistics[:2], elsewhere]
    with pytest.raises(ValueError, match="client 2.*expected statistics"):
        merge(**replace(case, statistics=statistics).arguments(), method=method)
