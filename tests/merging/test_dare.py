"""DARE: what its masks leave, what they leave in the mean, and what they are drawn from."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from fedfrom import merge
from tests.merging import oracle, properties
from tests.merging.formulas import CASES, RANDOM, label
from tests.merging.samples import (
    A_KEY,
    B_KEY,
    TENSOR,
    adapter_case,
    generator,
    normal,
    tensor_case,
)


@pytest.mark.parametrize("kind", ["tensor", "adapter"])
def test_dare_keeps_or_drops_each_entry_of_each_client(kind):
    """Two clients: each entry of the result is one of the four that masks can leave."""
    density = 0.5
    case = (
        tensor_case(14, shape=(30, 20), n=2) if kind == "tensor" else adapter_case(14, d_out=30, d_in=20, n=2, out=20)
    )
    w = case.layer.weights(2.0)
    a, b = (delta / density for delta in case.layer.deltas)
    zero = torch.zeros_like(a)
    agree = torch.where(a * b > 0, (a + b) / 2, torch.where((a + b >= 0) == (a >= 0), a, b))
    outcomes = {
        "dare": [zero, a, b, a + b],
        "dare-ties": [zero, a, b, agree],
        "dare-from": [zero, w[0] * a, w[1] * b, w[0] * a + w[1] * b],
    }
    for method, possible in outcomes.items():
        options = {"k": 2.0} if method == "dare-from" else {}
        found = properties.result(case, method=method, density=density, **options) - case.layer.W
        distance = torch.stack([(found - each).abs() for each in possible])
        assert float(distance.min(dim=0).values.max()) < 1e-12
        seen = distance.argmin(dim=0).flatten().bincount(minlength=4)
        # 600 entries, 150 expected of each: 6 standard deviations are 64, a chance below 1e-7
        assert method == "dare-ties" or (seen - 150).abs().max() < 64  # where two outcomes are often one


@pytest.mark.parametrize("kind", ["tensor", "adapter"])
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_dares_expectation_is_the_merged_update(kind, density):
    """16 rows of 20000 (adapters: 2000) equal entries: their mean, against an exact standard error.

    Beyond 5.5 of them with a chance of 4e-8 a row: 6e-7 for all 16.
    """
    draws, n, g = 20_000 if kind == "tensor" else 2_000, 3, generator(15)
    values = normal(n, 16, g=g)
    if kind == "tensor":
        states = [{TENSOR: row[:, None].repeat(1, draws)} for row in values]
        reference = {TENSOR: torch.zeros(16, draws, dtype=torch.float64)}
        merged, _ = merge(states, reference, method="dare", density=density, coefficient=0.7)
        found = merged[TENSOR]
    else:
        ones = torch.ones(1, draws, dtype=torch.float64)
        states = [{A_KEY: ones, B_KEY: row[:, None].clone()} for row in values]
        merged, _ = merge(states, method="dare", density=density, coefficient=0.7, rank=16)
        found = merged[B_KEY] @ merged[A_KEY]
    error = 0.7 * (values.square().sum(0) * (1 - density) / density / draws).sqrt()
    z = (found.mean(dim=1) - 0.7 * values.sum(0)) / error
    assert float(z.abs().max()) < 5.5
    assert float(found.var(dim=1).div(error.square() * draws).log().abs().max()) < 0.4  # the spread is the binomial's


@pytest.mark.parametrize(
    "method, like",
    [("dare", "task-arithmetic"), ("dare-ties", "ties"), ("dare-from", "from"), ("knots-dare-ties", "knots-ties")],
)
@given(CASES)
@settings(max_examples=15)
def test_dare_at_density_1_is_its_method(method, like, case):
    if TENSOR not in case.states[0]:
        case = replace(case, rank=min(case.layer.W.shape))
    expected = properties.result(case, method=like, **({"density": 1.0} if "ties" in like else {}))
    found = properties.result(case, method=method, density=1.0)
    size = float(case.layer.W.norm() + sum(case.layer.norms))
    assert oracle.relative_error(found, expected, size) <= 1e-11


@pytest.mark.parametrize("options", RANDOM, ids=label)
def test_dare_draws_from_its_seed_alone(options):
    for case in (adapter_case(16, start="trained"), tensor_case(16)):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = properties.result(case, seed=3, **options)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        assert torch.equal(properties.result(case, seed=3, **options), first)
        assert not torch.equal(properties.result(case, seed=4, **options), first)


def test_dare_masks_differ_between_layers_and_clients():
    ones = {"a": torch.ones(1000), "b": torch.ones(1000)}
    zero = {key: torch.zeros(1000) for key in ones}
    one, _ = merge([ones], zero, method="dare", density=0.5)
    assert not torch.equal(one["a"], one["b"])
    two, _ = merge([ones, ones], zero, method="dare", density=0.5)
    assert set(two["a"].tolist()) == {0.0, 2.0, 4.0}
