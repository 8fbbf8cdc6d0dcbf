"""ACTMat by its equations on dense float64 matrices of the whole layer, FroM at its end, and where it is refused."""

import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedfrom import merge
from tests.merging import oracle, properties
from tests.merging.formulas import shares
from tests.merging.samples import (
    A_KEY,
    B_KEY,
    DTYPES,
    MODULE,
    TENSOR,
    adapter_case,
    adapter_cases,
    generator,
    normal,
    tensor_case,
    tensor_cases,
)


def dense(deltas, w, rho):
    """(sum_t w_t theta_t C_t)(sum_t w_t C_t)^+, C_t = (1 - rho) theta_t^T theta_t + rho ||theta_t||^2 / d_in I."""
    d = deltas[0].shape[1]
    C = [(1 - rho) * x.T @ x + rho * x.square().sum() / d * torch.eye(d, dtype=torch.float64) for x in deltas]
    top, bottom = (
        sum(a * b for a, b in zip(w, each, strict=True))
        for each in ([x @ c for x, c in zip(deltas, C, strict=True)], C)
    )
    values, vectors = torch.linalg.eigh(bottom)
    kept = values > 1e-11 * values[-1]
    # an independent oracle is exact where nothing lies between rounding and a thousandth of the largest
    assume(bool((values[kept] > 1e-6 * values[-1]).all()))
    return top @ (vectors[:, kept] / values[kept]) @ vectors[:, kept].T


@pytest.mark.parametrize("rho", [0.0, 0.1, 0.7, 1.0])
@given(
    case=adapter_cases(examples=True, moved=1.0) | tensor_cases(examples=True, shape=(7, 5), moved=1.0),
    p=st.sampled_from([0.0, 1.0]),
)
@settings(max_examples=20)
def test_by_formula(rho, case, p):
    change = dense(case.layer.deltas, shares(case, p).tolist(), rho)
    bound = sum(norm**2 for norm in case.layer.norms) ** 0.5
    options = {"method": "actmat", "rho": rho, "examples_power": p}
    if float(change.norm()) > bound * (1 + 1e-6):
        with pytest.raises(ValueError, match="ACTMat interpolates"):
            properties.run(case, **options)
        return
    T = case.layer.W + case.server_lr * change
    is_tensor = TENSOR in case.states[0]
    assume(is_tensor or oracle.is_separated(T, case.out_rank))
    expected = T if is_tensor else oracle.truncated(T, case.out_rank)
    assume(abs(float(change.norm()) - bound) > 1e-5 * bound or len(case.states) == 1)
    size = float(case.layer.W.norm() + change.norm())
    assert oracle.relative_error(properties.result(case, **options), expected, size) <= 1e-8


@given(adapter_cases(examples=True) | tensor_cases(examples=True, shape=(6, 8)), st.sampled_from([0.0, 1.0]))
@settings(max_examples=40)
def test_rho_1_is_from_at_k_2(case, p):
    T = case.layer.target(case.layer.weights(2.0, case.examples, p), case.server_lr)
    assume(TENSOR in case.states[0] or oracle.is_separated(T, case.out_rank))
    expected = properties.result(case, method="from", k=2.0, examples_power=p)
    found = properties.result(case, method="actmat", rho=1.0, examples_power=p)
    assert oracle.relative_error(found, expected, float(case.layer.W.norm()) + sum(case.layer.norms)) <= 1e-9


@pytest.mark.parametrize("dtype", DTYPES)
def test_properties(dtype):
    """What one client sends comes back; those that trained nothing, scale and order change nothing."""
    options = {"method": "actmat", "rho": 0.3}
    for case in (
        adapter_case(0, dtype=dtype, start="trained", examples=True),
        tensor_case(0, dtype=dtype, examples=True),
        tensor_case(0, shape=(3,), dtype=dtype, examples=True),
        adapter_case(0, dtype=dtype, start="configs"),
    ):
        properties.assert_order_of_clients_changes_nothing(case, [2, 0, 1], **options)
        properties.assert_inputs_are_unchanged(case, **options)
        properties.assert_dtype_and_layout_are_kept(case, **options)
        limit = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 2e-2)
        properties.assert_identical_clients_give_what_one_gives(case, limit, **options)


def test_idle_clients_and_more_than_32():
    options = {"method": "actmat", "rho": 0.5}
    case = adapter_case(1, n=3, idle=1)
    others = case.permuted([1, 2])
    assert oracle.relative_error(properties.result(case, **options), properties.result(others, **options)) <= 1e-10
    idle = adapter_case(1, n=3, idle=3, start="trained")
    assert oracle.relative_error(properties.result(idle, **options), idle.layer.W) <= 1e-12
    merged, _ = properties.run(adapter_case(2, n=40, r=1, d_out=50, d_in=40), **options)
    assert all(torch.isfinite(value).all() for value in merged.values())
    properties.assert_weight_0_is_left_out(adapter_case(3, n=4), 1, 1e-9, rank=9, **options)


@pytest.mark.parametrize("key", ["embed_tokens.weight", "bias"])
def test_tables_and_what_is_no_matrix_are_averaged(key):
    states = [{key: normal(*((5,) if key == "bias" else (6, 5)), g=generator(i))} for i in range(3)]
    zero = {key: torch.zeros_like(states[0][key])}
    assert torch.equal(merge(states, zero, "actmat")[0][key], merge(states, zero, "average")[0][key])


def test_an_orthogonal_pair_is_added_up_and_a_close_one_refused_by_name():
    """Rows that are independent: theta* does on each what that update does, at sqrt(T) rms exactly or far beyond."""
    u, e = torch.eye(4, dtype=torch.float64)[:1].T, torch.eye(4, dtype=torch.float64)
    apart = [{A_KEY: e[i : i + 1], B_KEY: u} for i in (1, 2)]
    merged, _ = merge(apart, method="actmat", rank=2)
    assert torch.allclose(merged[B_KEY] @ merged[A_KEY], u @ (e[1:2] + e[2:3]))
    opposed = [{A_KEY: e[1:2], B_KEY: u}, {A_KEY: e[1:2] + 0.01 * e[2:3], B_KEY: -u}]
    with pytest.raises(
        ValueError, match=rf"^'{re.escape(MODULE)}': expected .*sqrt\(T\) = 1\.41 .*rho nearer 1"
    ) as caught:
        merge(opposed, method="actmat")
    assert "\n" not in str(caught.value)
    merge(opposed, method="actmat", rho=1.0)
    with pytest.raises(ValueError, match="'w': expected a merged update"):
        states = [{"w": state[B_KEY] @ state[A_KEY]} for state in opposed]
        merge(states, {"w": torch.zeros(4, 4, dtype=torch.float64)}, "actmat")


@pytest.mark.parametrize("rho", [-0.1, 1.1, float("nan"), "a", None])
def test_rho_out_of_range(rho):
    with pytest.raises(ValueError, match="rho: expected 0 to 1"):
        merge(adapter_case(0).states, method="actmat", rho=rho)
