"""KnOTS in the convention of its released code: S on the V_i, one threshold over all LoRA modules, S above 1e-5."""

import math

import pytest
import torch

from fedfrom import merge
from tests.merging import oracle, properties
from tests.merging.formulas import ties
from tests.merging.samples import A_KEY, B_KEY, TENSOR, adapter_case, generator, normal, tensor_case

OPTIONS = {"method": "knots-ties", "convention": "released"}


def basis(deltas):
    """U and S V_i of [theta_1 ... theta_n] = U S [V_1 ... V_n], S above 1e-5; signs: each row's largest entry +."""
    U, S, Vh = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
    kept = S > 1e-5
    U, SV = U[:, kept], S[kept, None] * Vh[kept]
    signs = torch.stack([row[row.abs().argmax()].sign() for row in SV])
    return U * signs, list((signs[:, None] * SV).split(deltas[0].shape[1], dim=1))


def threshold(parts, density):
    every = torch.cat([part.flatten().abs() for part in parts]).sort(descending=True).values
    return float(every[math.floor(density * len(every)) - 1]) * (1 - 1e-12)


@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_two_modules_and_a_head_by_formula(order, size):
    """Of other sizes, so that one threshold over both keeps other shares of them; the head is trimmed for itself."""
    g, density, n = generator(3), 0.3, 3
    case = adapter_case(1, n=n)
    modules = {
        "a": [5 * d * size for d in case.layer.deltas],
        "b": [d * size for d in adapter_case(2, n=n).layer.deltas],
    }
    others = adapter_case(2, n=n).states
    head = [normal(4, 6, g=g) for _ in range(n)]
    states = []
    for i in order:
        state = {key.replace("query", "a"): value for key, value in case.states[i].items()}
        state |= {key.replace("query", "b"): value for key, value in others[i].items()}
        state = {
            key: value * (5 if ".a." in key else 1) * size if "lora_B" in key else value for key, value in state.items()
        }
        states.append({**state, TENSOR: head[i]})
    reference = {key: torch.zeros_like(value) for key, value in states[0].items() if key == TENSOR}
    configs = [{"r": 3, "lora_alpha": 3}] * n
    merged, _ = merge(states, reference, configs=configs, **OPTIONS, density=density, coefficient=0.7, rank=9)
    found = {name: basis(deltas) for name, deltas in modules.items()}
    least = [threshold([found[name][1][i] for name in modules], density) for i in range(n)]
    kept = {
        name: sum(int((p.abs() >= t).sum()) for p, t in zip(found[name][1], least, strict=True)) for name in modules
    }
    assert kept["a"] > 3 * kept["b"]
    for name in modules:
        U, parts = found[name]
        expected = U @ ties(parts, density, "total", torch.full((n,), 0.7, dtype=torch.float64), least)
        A, B = merged[A_KEY.replace("query", name)], merged[B_KEY.replace("query", name)]
        assert oracle.relative_error(B @ A, expected) <= 1e-10
    expected = ties(head, density, "total", torch.full((n,), 0.7, dtype=torch.float64))
    assert oracle.relative_error(merged[TENSOR], expected) <= 1e-12


def test_small_directions_are_left_out_whatever_the_unit():
    case = adapter_case(4, n=2)
    small = [{A_KEY: state[A_KEY], B_KEY: state[B_KEY] * 1e-9} for state in case.states]
    assert not merge(small, **OPTIONS)[0][B_KEY].any()
    assert merge(small, method="knots-ties")[0][B_KEY].any()


@pytest.mark.parametrize("method", ["knots-ties", "knots-dare-ties"])
@pytest.mark.parametrize("start", ["fresh", "trained", "cut", "configs"])
def test_properties(method, start):
    options = {"method": method, "convention": "released", "density": 0.4}
    for case in (adapter_case(5, start=start, n=4), tensor_case(5, n=4), adapter_case(5, start=start, n=1)):
        n = len(case.states)
        properties.assert_order_of_clients_changes_nothing(case, [*range(1, n), 0], **options)
        properties.assert_inputs_are_unchanged(case, **options)
        full = {**options, "density": 1.0}
        properties.assert_identical_clients_give_what_one_gives(case, 1e-11, **full)
    idle = adapter_case(5, start=start, n=3, idle=3)
    assert oracle.relative_error(properties.result(idle, **options), idle.layer.W) <= 1e-12


def test_plain_tensors_are_merged_by_the_method_itself():
    case = tensor_case(7, n=3)
    assert torch.equal(properties.result(case, **OPTIONS), properties.result(case, method="ties"))


def test_a_convention_that_is_none_is_named():
    with pytest.raises(ValueError, match="convention: expected one of paper, released, found 'mine'"):
        merge(adapter_case(0).states, method="knots-ties", convention="mine")
