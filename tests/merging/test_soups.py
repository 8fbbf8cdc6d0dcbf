"""Greedy soups: whom they take, and what scores do not tell."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfrom import merge
from tests.merging import oracle
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
def test_greedy_soup_that_likes_one_client_returns_it(kind):
    case = tensor_case(17, n=4, examples=True) if kind == "tensor" else adapter_case(17, n=4, start="trained")
    key = TENSOR if kind == "tensor" else B_KEY

    def product(state):
        return state[key] if kind == "tensor" else state[B_KEY] @ state[A_KEY]

    for liked in range(4):
        target = product(case.states[liked])
        merged, report = merge(
            **case.arguments(),
            method="greedy-soup",
            validate=lambda state, target=target: -float((product(state) - target).norm()),
        )
        assert oracle.relative_error(product(merged), target) <= 1e-12
        assert report.clients == [f"client {liked}"]


@given(st.integers(0, 10**6), st.integers(1, 5))
@settings(max_examples=20)
def test_greedy_soup_is_never_below_the_best_alone(seed, n):
    case = tensor_case(seed, n=n, examples=True)
    goal = normal(7, 5, g=generator(seed + 1))
    calls = []

    def validate(state):
        calls.append(-float((state[TENSOR] - goal).norm()))
        return calls[-1]

    merged, report = merge(**case.arguments(), method="greedy-soup", validate=validate, examples_power=1.0)
    assert len(calls) == 2 * n - 1
    score = -float((merged[TENSOR] - goal).norm())
    assert score >= max(calls[:n])
    chosen = [int(name.removeprefix("client ")) for name in report.clients]
    assert chosen == sorted(chosen)
    own = replace(case, states=[case.states[i] for i in chosen], examples=[case.examples[i] for i in chosen])
    expected, _ = merge(**own.arguments(), method="average", examples_power=1.0)
    assert torch.equal(merged[TENSOR], expected[TENSOR])


def test_greedy_soup_takes_all_where_each_helps_or_none_matters():
    case = adapter_case(18, n=3, examples=True)
    merged, report = merge(**case.arguments(), method="greedy-soup", validate=lambda state: 0.0)
    expected, _ = merge(**case.arguments(), method="average")
    assert all(torch.equal(merged[key], expected[key]) for key in expected) and len(report.clients) == 3


def test_greedy_soup_leaves_out_who_scores_nan_and_refuses_where_all_do():
    states = [{"w": torch.full((2,), float(i))} for i in (1, 2, 3)]

    def validate(state):
        return math.nan if float(state["w"][0]) in (2.0, 1.5, 2.5) else 0.0

    merged, report = merge(states, method="greedy-soup", validate=validate)
    assert report.clients == ["client 0"] and torch.equal(merged["w"], states[0]["w"])  # with client 2 the mean is 2
    with pytest.raises(ValueError, match=r"validate: expected a number .*, found none"):
        merge(states, method="greedy-soup", validate=lambda state: math.nan)


def test_greedy_soup_without_a_validation_function():
    with pytest.raises(ValueError, match="validate"):
        merge([{"w": torch.ones(2)}], method="greedy-soup")
