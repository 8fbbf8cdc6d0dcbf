"""SVC by its equations on dense float64 matrices, around several methods, and what is identically true of it."""

import pytest
import torch
from hypothesis import assume, given, settings

from fedfrom import merge
from fedfrom.merging import SVC
from tests.merging import oracle, properties
from tests.merging.formulas import are_apart, is_cut_clearly, update
from tests.merging.samples import TENSOR, adapter_case, adapter_cases, tensor_case, tensor_cases

INNER = {
    "task-arithmetic": {"coefficient": 0.7},
    "average": {},
    "from": {"k": 2.0},
    "ties": {"density": 0.4},
}


def calibrated(theta, deltas, floor):
    """gamma_r = n / sum_i max(floor, <a_r, a_ir> / ||a_ir||^2), a_r = u_r^T theta, a_ir = u_r^T theta_i."""
    U, S, Vh = torch.linalg.svd(theta, full_matrices=False)
    kept = int((1e-10 * S[0] < S).sum())
    assume(are_apart(S[:kept]))
    new = torch.zeros_like(theta)
    for r in range(kept):
        total, merged = 0.0, U[:, r] @ theta
        for delta in deltas:
            own = U[:, r] @ delta
            size = float(own.norm() / delta.norm()) if delta.any() else 0.0
            assume(size < 1e-14 or size > 1e-3)  # between them rounding is enlarged
            total += max(floor, float(merged @ own / (own @ own)) if size > 1e-3 else 0.0)
        new += len(deltas) / total * S[r] * torch.outer(U[:, r], Vh[r])
    return new


@pytest.mark.parametrize("floor", [1.0, 0.3])
@pytest.mark.parametrize("inner", INNER)
@given(case=adapter_cases(examples=True, spectrum="slow") | tensor_cases(examples=True, shape=(7, 5)))
@settings(max_examples=15)
def test_by_formula(inner, floor, case):
    options = INNER[inner]
    if inner == "ties":
        assume(all(is_cut_clearly(delta, options["density"]) for delta in case.layer.deltas))
    theta = update(case, inner, **options)
    assume(float(theta.norm()) > 1e-3 * max(case.layer.norms))
    # a client of weight 0 is not among the n
    change = calibrated(theta, [d for d in case.layer.deltas if inner != "from" or d.any()], floor)
    T = case.layer.W + case.server_lr * change
    is_tensor = TENSOR in case.states[0]
    assume(is_tensor or oracle.is_separated(T, case.out_rank))
    found = properties.result(case, method="svc", inner=inner, inner_options=options, floor=floor)
    expected = T if is_tensor else oracle.truncated(T, case.out_rank)
    size = float(case.layer.W.norm() + change.norm())
    # updates of 0.1 % of W have lost three digits, and responses of a thousandth of an update three more
    assert oracle.relative_error(found, expected, size) <= 1e-7


@pytest.mark.parametrize("make", [adapter_case, tensor_case])
def test_equal_updates_that_were_summed_come_out_as_one(make):
    case = make(0, n=3).permuted([0, 0, 0])
    options = {"rank": 9} if make is adapter_case else {}
    found = properties.result(case, method="svc", **options)
    assert oracle.relative_error(found, case.layer.sent[0]) <= 1e-12


def test_orthogonal_updates_stay_and_no_singular_value_grows():
    eye = torch.eye(6, dtype=torch.float64)
    states = [{"w": torch.outer(eye[i], eye[i]) * (i + 1)} for i in range(3)]
    zero = {"w": torch.zeros(6, 6, dtype=torch.float64)}
    merged, _ = merge(states, zero, "svc")
    assert torch.allclose(merged["w"], merge(states, zero, "task-arithmetic")[0]["w"], rtol=1e-12)
    case = tensor_case(3, n=4)
    before = merge(**case.arguments(), method="task-arithmetic")[0][TENSOR] - case.layer.W
    after = merge(**case.arguments(), method="svc")[0][TENSOR] - case.layer.W
    S, smaller = torch.linalg.svdvals(before), torch.linalg.svdvals(after)
    assert (smaller <= S * (1 + 1e-12)).all() and smaller.sum() < 0.99 * S.sum()


@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "transformer.wte.weight", "bias", "conv.weight"])
def test_tables_and_what_is_no_matrix_are_the_inner_methods(key):
    shape = {"bias": (5,), "conv.weight": (4, 3, 2, 2)}.get(key, (6, 5))
    states = [{key: torch.randn(shape, generator=torch.Generator().manual_seed(i))} for i in range(3)]
    zero = {key: torch.zeros(shape)}
    assert torch.equal(merge(states, zero, "svc")[0][key], merge(states, zero, "task-arithmetic")[0][key])


@pytest.mark.parametrize("scale", [1e-150, 1e150])
@pytest.mark.parametrize("make", [adapter_case, tensor_case])
def test_scaling_all_updates_scales_the_result(make, scale):
    case = make(2, n=3)
    scaled = [{key: value if "lora_A" in key else value * scale for key, value in s.items()} for s in case.states]
    reference = None if case.reference is None else {key: value * scale for key, value in case.reference.items()}
    found = merge(scaled, reference, "svc")[0]
    for key, value in merge(case.states, case.reference, "svc")[0].items():
        assert oracle.relative_error(found[key] / (1 if "lora_A" in key else scale), value) <= 1e-9


def test_more_than_32_clients_and_one_of_weight_0():
    for case in (adapter_case(4, n=34, r=1, d_out=40, d_in=36), tensor_case(4, n=34)):
        merged, _ = properties.run(case, method="svc", rank=8)
        assert all(torch.isfinite(value).all() for value in merged.values())
    properties.assert_weight_0_is_left_out(adapter_case(5, n=4), 1, 1e-9, method="svc", rank=9)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"inner": "svc"}, "inner: expected one of from.*found 'svc'"),
        ({"inner": "factor-average"}, "inner: expected"),
        ({"inner": "greedy-soup"}, "inner: expected"),
        ({"inner_options": {"rank": 2}}, "inner_options: expected a mapping"),
        ({"inner_options": 3}, "inner_options: expected a mapping"),
        ({"inner_options": {"density": 0.5}}, "density"),
        ({"inner_options": {"coefficient": "auto"}}, "coefficient: expected validate="),
        ({"floor": 0.0}, "floor: expected a finite number > 0"),
    ],
)
def test_wrong_settings_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        SVC(**options)
