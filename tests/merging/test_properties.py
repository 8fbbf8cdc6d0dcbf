"""Properties of FroM and the averages alone, over sampled cases; those that every method claims are in test_methods."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedfrom import FactorAverage, merge
from fedfrom.merging.solve import SOLVERS
from tests.merging import oracle, properties
from tests.merging.samples import A_KEY, B_KEY, TENSOR, Case, adapter_case, adapter_cases, tensor_cases

CASES = adapter_cases() | tensor_cases()


def orders(case: Case) -> st.SearchStrategy[list[int]]:
    return st.permutations(range(len(case.states)))


@given(adapter_cases(start="trained"), st.data())
@settings(max_examples=20)
def test_order_of_clients_alternating(case, data):
    properties.assert_order_of_clients_changes_nothing(case, data.draw(orders(case)), solver="alternating")


@pytest.mark.parametrize("kind", ["adapter", "tensor"])
@given(st.data())
@settings(max_examples=30)
def test_order_of_clients_whose_norms_tie(kind, data):
    """Permuted entries: equal norms, other content; k = 0 leaves the weights equal too."""
    case = data.draw(adapter_cases(n=2, start="fresh", r=2) if kind == "adapter" else tensor_cases(shape=(6,), n=2))
    if kind == "adapter":
        states = case.states + [{A_KEY: state[A_KEY], B_KEY: -state[B_KEY]} for state in case.states]
        reference = None
    else:
        reference = {TENSOR: torch.zeros_like(case.states[0][TENSOR])}
        states = case.states + [{TENSOR: state[TENSOR].flip(0)} for state in case.states]
        states += [{TENSOR: -state[TENSOR]} for state in case.states]
    order = data.draw(st.permutations(range(len(states))))
    for k in (0.0, 1.0):
        merged, report = merge(states, reference, k=k)
        moved, moved_report = merge([states[i] for i in order], reference, k=k)
        assert all(torch.equal(merged[key], moved[key]) for key in merged)
        assert moved_report.layers[0].weights == [report.layers[0].weights[i] for i in order]
        assert moved_report.layers[0].lambda_max == report.layers[0].lambda_max


@pytest.mark.parametrize("k", [0.0, 0.5, 1.0, math.inf])
@given(CASES, st.data())
@settings(max_examples=25)
def test_two_halves_of_a_client(k, case, data):
    which = data.draw(st.integers(0, len(case.states) - 1))
    if TENSOR not in case.states[0]:  # where sigma_r = sigma_{r+1} rounding decides between two best matrices
        T = case.layer.target(case.layer.weights(k, case.examples, 1.0), case.server_lr)
        assume(oracle.is_separated(T, case.out_rank))
    properties.assert_two_halves_of_a_client_count_as_the_whole(case, which, 1e-9, k=k)


@given(adapter_cases(start="fresh") | adapter_cases(start="trained") | tensor_cases())
def test_p_1_and_k_0_is_fedavg_on_products(case):
    properties.assert_is_fedavg(case, 1e-12, k=0.0, examples_power=1.0)
    properties.assert_is_fedavg(case, 1e-12, method="average", examples_power=1.0)


@pytest.mark.parametrize("k", [0.0, math.inf])
@given(adapter_cases(start="trained", idle=1, n=3) | tensor_cases(idle=1, n=3))
def test_extremes_with_a_client_that_trained_nothing(k, case):
    layer, report = case.layer, properties.run(case, k=k)[1].layers[0]
    loudest = max(range(3), key=lambda i: layer.norms[i])
    expected = [1 / 3] * 3 if k == 0 else [float(i == loudest) for i in range(3)]
    assert report.weights == pytest.approx(expected, abs=1e-15)
    T = layer.target(expected, case.server_lr)
    if TENSOR not in case.states[0]:
        assume(oracle.is_separated(T, case.out_rank))
        T = oracle.truncated(T, case.out_rank)
    assert oracle.relative_error(properties.result(case, k=k), T, float(layer.W.norm() + T.norm())) <= 1e-10


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("k", [0.0, 1.0, math.inf])
def test_zero_deltas(solver, k):
    case = adapter_case(0, idle=3, start="fresh")
    merged, report = merge(case.states, k=k, solver=solver)
    assert not merged[B_KEY].any() and torch.isfinite(merged[A_KEY]).all()
    assert report.layers[0].weights == pytest.approx([1 / 3] * 3)


@given(adapter_cases(start="trained"), st.sampled_from([0.0, 1.0]))
@settings(max_examples=20)
def test_copies_are_as_good_as_the_same_tensors(case, k):
    """Clients that were each sent a copy of W, as after a trip through a file, and W itself."""
    copies = [{key: value.clone() for key, value in case.reference.items()} for _ in case.states]
    T = case.layer.target(case.layer.weights(k), case.server_lr)
    assume(oracle.is_separated(T, case.out_rank))
    found = properties.result(replace(case, received=copies), k=k)
    assert oracle.relative_error(found, properties.result(case, k=k), float(case.layer.W.norm())) <= 1e-9


@given(adapter_cases(start="trained", examples=True, out=None))
def test_factor_average_is_the_mean_of_the_factors(case):
    merged, report = merge(case.states, case.reference, FactorAverage(examples_power=1.0), examples=case.examples)
    share = torch.tensor(case.examples, dtype=torch.float64)
    for key in (A_KEY, B_KEY):
        expected = sum(float(w) * state[key] for w, state in zip(share / share.sum(), case.states, strict=True))
        assert oracle.relative_error(merged[key], expected) <= 1e-12
    assert [layer.name for layer in report.layers] == [A_KEY, B_KEY]


def test_factor_average_is_not_the_average_of_products():
    case = adapter_case(0)
    factors, _ = merge(case.states, method="factor-average")
    T = case.layer.target([1 / 3] * 3)
    assert oracle.relative_error(oracle.product(factors[B_KEY], factors[A_KEY]), oracle.truncated(T, 3)) > 0.5
