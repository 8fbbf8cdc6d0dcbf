"""TIES and KnOTS: thresholds over a whole model, the shared basis, and what neither may depend on."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedfrom import LowRank, merge
from fedfrom.merging.linalg.alignment import align
from fedfrom.merging.methods.ties import Ties
from fedfrom.merging.updates import DenseUpdates, Destination
from tests.merging import oracle, properties
from tests.merging.formulas import (
    ties,
    update,
)
from tests.merging.samples import (
    A_KEY,
    B_KEY,
    MODULE,
    adapter_case,
    adapter_cases,
    generator,
    merged_product,
    normal,
    tensor_cases,
)


@pytest.mark.parametrize("scope", ["layer", "model"])
@given(adapter_cases(n=1, server_lr=1.0) | tensor_cases(n=1, server_lr=1.0))
@settings(max_examples=15)
def test_ties_of_one_model_at_density_1_is_that_model(scope, case):
    properties.assert_identical_clients_give_what_one_gives(case, 1e-12, method="ties", density=1.0, scope=scope)


@pytest.mark.parametrize("server_lr", [1.0, 0.5])
@pytest.mark.parametrize("examples_power", [0.0, 1.0])
def test_ties_of_the_whole_model(server_lr, examples_power):
    """The original's: one threshold a client over an adapter and two tensors of other sizes; buffers are left out."""
    g, n, density = generator(9), 3, 0.25
    a = adapter_case(9, d_out=6, d_in=5, n=n, r=2, start="configs")
    W = {"head": normal(4, 3, g=g), "norm": normal(7, g=g), "bn.running_mean": normal(7, g=g)}
    moved = [{key: value + normal(*value.shape, g=g) for key, value in W.items()} for _ in range(n)]
    for state in moved:
        state["head"] = W["head"] + 3 * (state["head"] - W["head"])
    reference = {**W, A_KEY: torch.zeros(2, 5, dtype=torch.float64), B_KEY: torch.zeros(6, 2, dtype=torch.float64)}
    deltas = {key: [state[key] - W[key] for state in moved] for key in ("head", "norm")} | {MODULE: a.layer.sent}
    thresholds = []
    for i in range(n):
        flat = torch.cat([each[i].flatten().abs() for each in deltas.values()]).sort(descending=True).values
        thresholds.append(float(flat[math.floor(density * len(flat)) - 1]) * (1 - 1e-12))
    examples = [3, 1, 2]
    factors = n * torch.tensor(oracle.weights([1.0] * n, 0, examples, examples_power), dtype=torch.float64)
    merged, report = merge(
        [{**state, **plain} for state, plain in zip(a.states, moved, strict=True)],
        reference,
        configs=a.configs,
        reference_config={"r": 2, "lora_alpha": 2},
        examples=examples,
        server_lr=server_lr,
        **{"method": "ties", "scope": "model", "density": density, "rank": 5, "examples_power": examples_power},
    )
    kept = {
        key: sum(int((d.abs() >= t).sum()) for d, t in zip(each, thresholds, strict=True))
        for key, each in deltas.items()
    }
    assert len({round(kept[key] / (n * deltas[key][0].numel()), 2) for key in kept}) == 3  # not a share in each layer
    for key, each in deltas.items():
        change = server_lr * ties(each, density, "total", factors, thresholds)
        found = merged_product(merged, report) if key == MODULE else merged[key] - W[key]
        assert oracle.relative_error(found, change) <= 1e-12, key


def test_ties_result_with_knots_does_not_depend_on_the_signs_of_singular_vectors():
    """A row of all V_i negated: elected signs and means are negated with it. Even elections go to +, so not there."""
    parts = align([LowRank(s[B_KEY], s[A_KEY]) for s in adapter_case(10, n=3).states])[2]
    flip = torch.tensor([(-1.0) ** i for i in range(len(parts[0]))], dtype=torch.float64)[:, None]

    def merged(method, parts):
        updates = DenseUpdates(parts, "layer")
        ones = torch.ones(len(parts), dtype=torch.float64)
        return method.change(updates, ones, Destination(None, 1.0, 0)).tensor

    for majority in ("total", "frequency"):
        method = Ties(density=0.7 if majority == "total" else 1.0, majority=majority)
        assert torch.equal(merged(method, [flip * part for part in parts]), flip * merged(method, parts))
    even = Ties(density=1.0, majority="frequency")
    assert not torch.equal(merged(even, [flip * part for part in parts[:2]]), flip * merged(even, parts[:2]))


@given(adapter_cases(examples=True), st.sampled_from(["sum", "mean"]), st.sampled_from([0.0, 0.7, 1.0]))
def test_knots_with_task_arithmetic_is_task_arithmetic(case, form, coefficient):
    options = {"coefficient": coefficient, "form": form, "examples_power": 0.5}
    change = update(case, "task-arithmetic", **options)
    T = case.layer.W + case.server_lr * change
    assume(oracle.is_separated(T, case.out_rank))
    expected = properties.result(case, method="task-arithmetic", **options)
    size = float(case.layer.W.norm() + sum(case.layer.norms))
    # a gap of 1 % between singular values leaves 2 of 14 digits uncertain
    limit = 1e-12 if case.out_rank >= min(T.shape) else 1e-10
    assert oracle.relative_error(properties.result(case, method="knots-ta", **options), expected, size) <= limit


@pytest.mark.parametrize("d_out, d_in, r", [(12, 9, 3), (9, 12, 3), (5, 30, 4), (30, 5, 4), (40, 50, 1)])
def test_knots_basis(d_out, d_in, r):
    """U diag(S) V_i is theta_i, U's columns and the rows of [V_1 ... V_n] are orthonormal, signs are settled."""
    case = adapter_case(11, d_out=d_out, d_in=d_in, r=r, n=3)
    U, S, parts = align([LowRank(state[B_KEY], state[A_KEY]) for state in case.states])
    V = torch.cat(parts, dim=1)
    eye = torch.eye(len(S), dtype=torch.float64)
    assert torch.allclose(U.T @ U, eye, atol=1e-12) and torch.allclose(V @ V.T, eye, atol=1e-12)
    assert len(S) == min(3 * r, d_out, 3 * d_in) and (S.diff() <= 0).all()
    for part, delta in zip(parts, case.layer.deltas, strict=True):
        assert oracle.relative_error(U @ torch.diag(S) @ part, delta) <= 1e-12
    assert (V.gather(1, V.abs().argmax(dim=1, keepdim=True)) > 0).all()


def test_knots_holds_what_the_updates_share_once():
    case = adapter_case(12, d_out=40, d_in=30, r=2, n=4, start="trained")
    W = LowRank(case.reference[B_KEY], case.reference[A_KEY])
    U, S, parts = align([LowRank(state[B_KEY], state[A_KEY]) - W for state in case.states])
    assert len(S) == 10  # not 2 (2 + 2) columns for each of 4
    for part, delta in zip(parts, case.layer.deltas, strict=True):
        assert oracle.relative_error(U @ torch.diag(S) @ part, delta) <= 1e-12
