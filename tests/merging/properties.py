"""What a merging method claims, each property once: to be run over sampled cases, for every method that claims it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedfrom import merge
from tests.merging import oracle
from tests.merging.samples import TENSOR, Case, merged_product


def run(case: Case, **options: Any) -> tuple[dict[str, torch.Tensor], Any]:
    if case.rank is not None:
        options = {"rank": case.rank, **options}
    return merge(**case.arguments(), **options)


def result(case: Case, **options: Any) -> torch.Tensor:
    """What the merged state stands for: the tensor, or the product of the factors."""
    merged, report = run(case, **options)
    return merged[TENSOR].double() if TENSOR in merged else merged_product(merged, report)


def assert_order_of_clients_changes_nothing(case: Case, order: list[int], **options: Any) -> None:
    """To the bit: the state, the layer's numbers, and the lists that go by client, permuted."""
    merged, report = run(case, **options)
    moved, moved_report = run(case.permuted(order), **options)
    assert moved.keys() == merged.keys()
    for key, value in merged.items():
        assert torch.equal(moved[key], value), key
    for found, expected in zip(moved_report.layers, report.layers, strict=True):
        lists = {
            name: [values[i] for i in order] if (values := getattr(expected, name)) else []
            for name in ("norms", "weights", "ranks_in", "clipped", "cosines_merged")
        }
        lists["cosines"] = [[expected.cosines[i][j] for j in order] for i in order] if expected.cosines else []
        assert found == replace(expected, **lists)


def assert_inputs_are_unchanged(case: Case, **options: Any) -> None:
    states = [*case.states, *(case.received or []), *([case.reference] if case.reference else [])]
    before = [{key: value.clone() for key, value in state.items()} for state in states]
    configs = [dict(config) for config in case.configs or []]
    merged, _ = run(case, **options)
    for state, was in zip(states, before, strict=True):
        assert all(torch.equal(state[key], was[key]) for key in was)
        assert not {t.untyped_storage().data_ptr() for t in state.values()} & {
            t.untyped_storage().data_ptr() for t in merged.values()
        }
    assert (case.configs or []) == configs


def assert_dtype_and_layout_are_kept(case: Case, **options: Any) -> None:
    merged, _ = run(case, **options)
    like = case.reference or case.states[0]
    assert list(merged) == list(like)
    for key, value in merged.items():
        assert value.dtype == case.dtype and value.device == like[key].device and value.is_contiguous()
        assert value.ndim == like[key].ndim and not value.requires_grad


def assert_identical_clients_give_what_one_gives(case: Case, limit: float, **options: Any) -> None:
    """n copies of one client: W + alpha theta, whatever the weights, at any rank that holds it."""
    same = case.permuted([0] * len(case.states))
    if TENSOR not in case.states[0]:
        options = {**options, "rank": min(case.layer.W.shape)}
    expected = case.layer.W.double() + case.server_lr * case.layer.deltas[0]
    size = float(case.layer.W.double().norm() + case.layer.sent[0].double().norm())
    assert oracle.relative_error(result(replace(same, rank=None), **options), expected, size) <= limit


def assert_two_halves_of_a_client_count_as_the_whole(case: Case, which: int, limit: float, **options: Any) -> None:
    """p = 1: the same update twice, with half the examples each, weighs what the one did, for every k."""
    n = len(case.states)
    halved = case.permuted([*range(n), which])
    examples = list(case.examples or [1] * n)
    whole = replace(case, examples=[2 * count for count in examples])
    parts = [2 * count for count in examples]
    parts[which] = examples[which]
    halved = replace(halved, examples=[*parts, examples[which]])
    weights = run(whole, examples_power=1.0, **options)[1].layers[0].weights
    found = run(halved, examples_power=1.0, **options)[1].layers[0].weights
    assert found[which] + found[-1] == pytest.approx(weights[which], rel=1e-12)
    assert [w for i, w in enumerate(found[:-1]) if i != which] == pytest.approx(
        [w for i, w in enumerate(weights) if i != which], rel=1e-12, abs=1e-300
    )
    expected, size = result(whole, examples_power=1.0, **options), float(case.layer.W.double().norm())
    size += float(expected.norm())
    assert oracle.relative_error(result(halved, examples_power=1.0, **options), expected, size) <= limit


def assert_is_fedavg(case: Case, limit: float, **options: Any) -> None:
    """sum_i n_i W_i / sum_i n_i of tensors or products, where every client was sent W; adapters at a rank that fits."""
    share = torch.tensor(case.examples or [1] * len(case.states), dtype=torch.float64)
    expected = sum(float(w) * sent.double() for w, sent in zip(share / share.sum(), case.layer.sent, strict=True))
    if TENSOR not in case.states[0]:
        options = {**options, "rank": min(expected.shape)}
    found = result(replace(case, rank=None, server_lr=1.0), **options)
    assert oracle.relative_error(found, expected, float(expected.norm())) <= limit


def assert_equal_weights_count_as_none(case: Case, **options: Any) -> None:
    """To the bit, and all that the report says of the layers."""
    merged, report = run(case, **options)
    found, its = run(replace(case, weights=[1.0] * len(case.states)), **options)
    assert all(torch.equal(found[key], merged[key]) for key in merged)
    assert its.layers == report.layers


def assert_weight_0_is_left_out(case: Case, which: int, limit: float, **options: Any) -> None:
    """One client of weight 0, or without it: one result, and the others' weights."""
    others = [i for i in range(len(case.states)) if i != which]
    own = list(case.weights or [1.0] * len(case.states))
    own[which] = 0.0
    case = replace(case, weights=own)
    without, zeroed = case.permuted(others), run(case, **options)[1].layers[0]
    layer = run(without, **options)[1].layers[0]
    assert zeroed.weights[which] == 0
    assert [zeroed.weights[i] for i in others] == pytest.approx(layer.weights, rel=1e-12, abs=1e-300)
    assert (zeroed.rank_out, zeroed.k, zeroed.kind) == (layer.rank_out, layer.k, layer.kind)
    for name in ("clients_effective", "lambda_max", "server_lr", "interference"):
        assert getattr(zeroed, name) == pytest.approx(getattr(layer, name), rel=1e-6, abs=1e-9), name
    expected, size = result(without, **options), float(case.layer.W.double().norm())
    size += float(expected.norm())
    assert oracle.relative_error(result(case, **options), expected, size) <= limit


def assert_weight_2_is_the_client_twice(case: Case, which: int, limit: float, **options: Any) -> None:
    """And weight 3 thrice: weights 1, 1, ... but for that client's."""
    n = len(case.states)
    for weight in (2, 3):
        own: list[float] = [float(weight if i == which else 1) for i in range(n)]
        copies = case.permuted([*range(n), *[which] * (weight - 1)])
        expected, size = result(copies, **options), float(case.layer.W.double().norm())
        size += float(expected.norm())
        assert oracle.relative_error(result(replace(case, weights=own), **options), expected, size) <= limit
