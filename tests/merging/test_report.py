"""The report's numbers are the oracle's, and json can write them."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfrom import merge
from tests.merging import oracle
from tests.merging.samples import adapter_case, adapter_cases, merged_product, tensor_case, tensor_cases


@pytest.mark.parametrize("solver", ["svd", "alternating"])
@given(adapter_cases(), st.sampled_from([0.0, 0.5, 2.0, math.inf]))
@settings(max_examples=80)
def test_numbers_of_an_adapter(solver, case, k):
    merged, report = merge(**case.arguments(), rank=case.rank, k=k, solver=solver)
    found, layer = merged_product(merged, report), report.layers[0]
    w = case.layer.weights(k, case.examples)
    T, size = case.layer.target(w, case.server_lr), case.layer.size(w)
    scale = float(T.norm()) ** 2
    assert layer.kind == "adapter" and layer.has_reference == (case.reference is not None)
    assert layer.norms == pytest.approx(case.layer.norms, rel=1e-8)
    # k = infinity: a norm within 1e-6 of the largest, decided by rounding, does not occur in these samples
    assert layer.weights == pytest.approx(w, rel=1e-6, abs=1e-300)
    assert layer.clients_effective == pytest.approx(1 / sum(x * x for x in w), rel=1e-6)
    residual = float((found - T).square().sum())
    assert layer.energy_dropped == pytest.approx(residual / scale if scale else 0.0, rel=1e-6, abs=1e-12)
    objective = case.layer.objective(found, w, case.server_lr)
    assert layer.objective == pytest.approx(objective, rel=1e-6, abs=1e-12 * scale)
    best = float((oracle.truncated(T, case.out_rank) - T).square().sum())
    # the difference of two numbers of T's size
    assert layer.excess == pytest.approx((residual - best) / size, rel=1e-3, abs=1e-12 * (1 + scale / size))
    assert layer.lambda_max == pytest.approx(case.layer.lambda_max(w), rel=1e-6)
    assert (layer.iterations > 0) == (solver == "alternating")


@given(tensor_cases(), st.sampled_from([0.0, 0.5, 2.0]))
def test_numbers_of_a_tensor(case, k):
    merged, report = merge(**case.arguments(), k=k)
    layer, w = report.layers[0], case.layer.weights(k, case.examples)
    assert layer.kind == "tensor" and layer.ranks_in == [] and layer.rank_out == 0
    assert layer.norms == pytest.approx(case.layer.norms, rel=1e-12)
    assert layer.weights == pytest.approx(w, rel=1e-10)
    objective = case.layer.objective(merged[layer.name], w, case.server_lr)
    assert layer.objective == pytest.approx(objective, rel=1e-6, abs=1e-13 * case.layer.size(w))
    assert layer.lambda_max == pytest.approx(case.layer.lambda_max(w), rel=1e-9)


def test_lambda_max_of_two_opposed_clients():
    case = tensor_case(0, n=1)
    key, W = next(iter(case.reference.items()))
    theta = case.states[0][key] - W
    for other, expected in ((-theta, 1.0), (theta, 1.0)):
        _, report = merge([{key: W + theta}, {key: W + other}], case.reference)
        assert report.layers[0].lambda_max == pytest.approx(expected)


@pytest.mark.parametrize("k", [1.0, math.inf])
@pytest.mark.parametrize("configs", [False, True])
def test_json(k, configs):
    case = adapter_case(0, start="configs" if configs else "trained")
    _, report = merge(**case.arguments(), k=k, names=["ann", "bob", "eve"])
    written = json.dumps(report.to_dict())
    read = json.loads(written)
    assert read["clients"] == ["ann", "bob", "eve"] and read["method"]["name"] == "FroM"
    assert read["layers"][0]["weights"] == report.layers[0].weights
    assert read["method"]["server_lr"] == 1.0
