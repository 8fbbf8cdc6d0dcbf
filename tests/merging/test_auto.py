"""k="auto", server_lr="safe" and clip: what each layer gets is the oracle's, and never beyond the bounds."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedfrom import FroM, merge
from fedfrom.merging.linalg import stack
from fedfrom.merging.stability import attracts
from tests.merging import oracle
from tests.merging.properties import assert_order_of_clients_changes_nothing, result
from tests.merging.samples import TENSOR, Case, adapter_case, adapter_cases, merged_product, tensor_case, tensor_cases

GRID = (0.0, 0.25, 0.5, 1.0, 2.0)
BOTH_SIGNS = (-2.0, -1.0, -0.5, 0.0, 1.0)
CASES = st.one_of(adapter_cases(), tensor_cases())
CLIPS = st.sampled_from([0.5, 1.0, 2.0])


def product_of(case: Case, state: dict[str, Tensor]) -> Tensor:
    """What a merged state of the case stands for, where B carries the scaling or has none."""
    if TENSOR in state:
        return state[TENSOR].double()
    A, B = (next(value for key, value in state.items() if f"lora_{part}" in key) for part in "AB")
    return oracle.product(B, A)


def distance_to(case: Case, k: float) -> Any:
    """A validation function whose best state is the merge at that k."""
    wanted = result(case, k=k)
    return lambda state: -float((product_of(case, state) - wanted).norm())


def allowed(case: Case, k: float, alpha: float = 1.0, grid: tuple[float, ...] = GRID) -> float:
    """The next of the grid from k towards 0 that is within the bounds, by the oracle; 0 has none nearer."""
    n = len(case.states)
    for candidate in sorted((g for g in grid if 0 <= g <= k or k <= g <= 0), key=lambda g: -abs(g)):
        w = case.layer.weights(candidate, case.examples)
        largest = case.layer.lambda_max(w)
        most, least = alpha * (1 + max(0.0, candidate) * largest), 1 + candidate * largest
        bounded = n < 2 or largest < 1e-12 or (most < 2 * (1 - 1e-6) and least > -1e-6)
        if bounded and 1 / sum(x * x for x in w) >= n / 2:
            return candidate
    return 0.0


@pytest.mark.parametrize("wanted", GRID)
@given(case=st.one_of(adapter_cases(start="fresh"), tensor_cases()))
@settings(max_examples=30)
def test_auto_is_the_merge_with_the_k_it_names_within_bounds(wanted, case):
    case = dataclasses.replace(case, server_lr=1.0)
    within = allowed(case, wanted)
    options = {"k": "auto", "search": {"k": GRID}, "validate": distance_to(case, within)}
    merged, report = merge(**case.arguments(), rank=case.rank, **options)
    # several k can come to one merge: a single client, equal norms, a bound
    assert report.layers[0].k == allowed(case, report.method["k"]) or case.layer.size(case.layer.weights(0.0)) == 0
    fixed, _ = merge(**case.arguments(), rank=case.rank, k=within)
    assert report.validation[GRID.index(report.method["k"])][1] == max(score for _, score in report.validation)
    assert oracle.relative_error(product_of(case, merged), product_of(case, fixed)) < 1e-9


@pytest.mark.parametrize("wanted", BOTH_SIGNS)
@given(case=st.one_of(adapter_cases(start="fresh"), tensor_cases()))
@settings(max_examples=20)
def test_auto_falls_back_towards_0_from_both_sides(wanted, case):
    case = dataclasses.replace(case, server_lr=1.0)
    options = {
        "k": "auto",
        "search": {"k": BOTH_SIGNS},
        "validate": distance_to(case, allowed(case, wanted, grid=BOTH_SIGNS)),
    }
    _, report = merge(**case.arguments(), rank=case.rank, **options)
    own = allowed(case, report.method["k"], grid=BOTH_SIGNS)
    assert report.layers[0].k == own or case.layer.size(case.layer.weights(0.0)) == 0


@given(CASES, st.sampled_from(GRID))
@settings(max_examples=60)
def test_no_layer_is_beyond_the_bounds(case, wanted):
    def validate(state: Any) -> float:
        return 0.0

    for grid in ((0.0, wanted), (wanted,)):
        _, report = merge(**case.arguments(), rank=case.rank, k="auto", search={"k": grid}, validate=validate)
        layer, n = report.layers[0], len(case.states)
        if layer.k != min(grid):
            assert case.server_lr * (1 + layer.k * layer.lambda_max) < 2 or n == 1
            assert layer.clients_effective >= n / 2 - 1e-9


def test_the_choice_is_by_score_ties_by_the_smaller_and_nan_is_not_taken():
    case = tensor_case(3, n=4)
    scores = {0.0: 1.0, 0.25: 3.0, 0.5: 3.0, 1.0: math.nan}
    answers = iter(scores.values())
    _, report = merge(**case.arguments(), k="auto", search={"k": tuple(scores)}, validate=lambda state: next(answers))
    assert report.method["k"] == 0.25
    assert dict(report.validation) == {0.0: 1.0, 0.25: 3.0, 0.5: 3.0, 1.0: -math.inf}
    assert json.loads(json.dumps(report.to_dict()))["method"]["k"] == 0.25
    with pytest.raises(ValueError, match="validate: expected a number"):
        merge(**case.arguments(), k="auto", validate=lambda state: math.nan)


def test_norms_and_factorisations_are_computed_once(monkeypatch: pytest.MonkeyPatch):
    case = adapter_case(1, d_out=60, d_in=50, n=3, r=2, start="trained")
    counts = {"factors": 0}
    cholesky, gram = torch.linalg.cholesky_ex, stack.Side.gram.fget

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts["factors"] += 1
        return cholesky(*args, **kwargs)

    def counted_gram(self: Any) -> Any:
        counts["gram"] += self._gram is None
        return gram(self)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted)
    monkeypatch.setattr(stack.Side, "gram", property(counted_gram))
    found = []
    for grid in ((0.5,), (0.0, 0.1, 0.2, 0.3, 0.5)):
        counts.update(factors=0, gram=0)
        merge(**case.arguments(), k="auto", search={"k": grid}, validate=lambda state: 0.0)
        found.append(dict(counts))
    assert found[1] == found[0] and found[0]["factors"] == 2 and found[0]["gram"] > 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"k": "auto"}, "validate"),
        ({"k": "auto", "validate": 3}, "validate: expected a function .*found 3"),
        ({"validate": 3}, "validate: expected a function .*found 3"),
        ({"k": 0.5, "validate": len}, r"validate: expected with k='auto' or .*found k=0\.5"),
        ({"k": 0.5, "search": {"k": (0, 1)}}, r"search: expected with k='auto' or .*found k=0\.5"),
        ({"k": "auto", "validate": len, "search": {"k": ()}}, r"search, 'k': .*at least one, found \(\)"),
        ({"k": "auto", "validate": len, "search": {"k": 0.5}}, r"search, 'k': .*at least one, found 0\.5"),
        ({"k": "auto", "validate": len, "search": {"k": ("auto",)}}, "search, 'k': expected numbers .*found 'auto'"),
        ({"k": "auto", "validate": len, "search": {"k": (0, True)}}, "search, 'k': expected numbers .*found True"),
        ({"k": "auto", "validate": len, "search": {"k": "01"}}, "search, 'k': expected numbers .*found '01'"),
        ({"k": "auto", "validate": len, "search": {}}, "search: expected a mapping from k or coefficient .*found {}"),
        ({"k": "auto", "validate": len, "search": (0, 1)}, r"search: expected a mapping .*found \(0, 1\)"),
        ({"k": "auto", "validate": len, "search": {"rank": (2,)}}, "search: expected k or coefficient, found 'rank'"),
        ({"k": "auto", "validate": len, "search": {"k": (-math.inf,)}}, "k: expected a number .*found -inf"),
        ({"k": "auto", "validate": len, "search": {"k": (math.nan,)}}, "k: expected a number .*found nan"),
        ({"k": -math.inf}, "k: expected a number .*found -inf"),
        ({"k": "auto", "validate": len, "grid": (0, 1)}, "grid"),
        ({"k": "best"}, "k: expected a number"),
    ],
)
def test_wrong_settings_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        merge(tensor_case(0).states, **options)
    with pytest.raises(ValueError, match="server_lr.*safe"):
        merge(tensor_case(0).states, server_lr="slow")
    with pytest.raises(ValueError, match="server_lr.*infinity.*'safe'"):
        merge(tensor_case(0).states, k=math.inf, server_lr="safe")
    for clip in (0.0, -1.0, math.nan, math.inf, "2"):
        with pytest.raises(ValueError, match="clip"):
            merge(tensor_case(0).states, clip=clip)


def test_without_search_the_default_is_tried_and_said():
    _, report = merge(tensor_case(0).states, k="auto", validate=lambda state: 0.0)
    assert [k for k, _ in report.validation] == list(GRID)
    settings_of = FroM(k="auto", validate=len).settings()
    assert settings_of["search"] == {"k": list(GRID)} and "validate" not in settings_of
    assert "search" not in FroM(k=0.5).settings()


def test_what_is_searched_can_be_any_sequence_and_is_written_as_json():
    methods = [
        FroM(k="auto", validate=len, search={"k": values}) for values in ([0, math.inf], np.array([0.0, math.inf]))
    ]
    assert methods[0] == methods[1] and hash(methods[0]) == hash(methods[1])
    assert json.loads(json.dumps(methods[0].settings(), allow_nan=False))["search"] == {"k": [0.0, "infinity"]}
    assert [method.k for method in methods[0].candidates()] == [0.0, math.inf]


BAD_SCORES = {
    "nothing": (lambda state: None, "returned None"),
    "text": (lambda state: "good", "returned 'good'"),
    "several numbers": (lambda state: torch.ones(2), r"returned tensor\(\[1\., 1\.\]\)"),
    "a number beyond any float": (lambda state: 10**400, "returned 1000"),
    "an error": (lambda state: {}["accuracy"], "raised KeyError: 'accuracy'"),
}


@pytest.mark.parametrize("options", [{"k": "auto"}, {"method": "greedy-soup"}], ids=str)
@pytest.mark.parametrize(("validate", "found"), BAD_SCORES.values(), ids=BAD_SCORES)
def test_a_score_that_is_no_number_is_an_error_that_names_validate(options, validate, found):
    with pytest.raises(ValueError, match=f"validate: expected a score, .*{found}") as caught:
        merge(tensor_case(0).states, validate=validate, **options)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("options", [{"k": "auto"}, {"method": "greedy-soup"}], ids=str)
def test_whatever_is_a_number_is_a_score(options):
    for value in (1, True, np.float32(2.0), torch.tensor([3.0])):
        merge(tensor_case(0).states, validate=lambda state, value=value: value, **options)


# --- The safe step ---


def quadratic_rounds(server_lr: Any, k: float, rounds: int) -> list[float]:
    """Two clients whose optima are -1 and +1 go all the way there each round: the global value, round by round."""
    W, path = torch.tensor([0.6], dtype=torch.float64), []
    for _ in range(rounds):
        states = [
            {TENSOR: torch.tensor([-1.0], dtype=torch.float64)},
            {TENSOR: torch.tensor([1.0], dtype=torch.float64)},
        ]
        merged, _ = merge(states, {TENSOR: W}, k=k, server_lr=server_lr)
        W = merged[TENSOR]
        path.append(float(W))
    return path


def test_two_opposed_clients_drift_to_the_nearest_below_minus_1_and_stay_at_minus_1():
    """1 - alpha (1 + k lambda): no step above 0 makes k below -1 stable, whatever it is; k in (-1, 0) never swings."""
    drifting = [abs(value) for value in quadratic_rounds("safe", -2.0, 12)]
    assert drifting[-1] == pytest.approx(1) and drifting == sorted(drifting)
    assert quadratic_rounds("safe", -1.0, 12) == pytest.approx([0.6] * 12)
    for k in (-0.9, -0.5):
        assert quadratic_rounds("safe", k, 1) == quadratic_rounds(1.0, k, 1)  # the most: 1
        path = [0.6, *quadratic_rounds(1.0, k, 40)]
        assert all(0 <= after <= before for before, after in zip(path, path[1:], strict=False))
        assert path[-1] / path[-2] == pytest.approx(-k, abs=0.02)  # 1 - (1 + k)
    assert attracts(-1.0, 1.0, 2) and not attracts(-1.1, 1.0, 2) and attracts(-1.1, 0.9, 2) and attracts(-9.0, 1.0, 1)
    opposed, search = [{TENSOR: torch.tensor([x])} for x in (-1.0, 1.0)], {"k": (-2, -0.5)}
    _, report = merge(opposed, {TENSOR: torch.zeros(1)}, k="auto", search=search, validate=lambda state: 1.0)
    assert report.method["k"] == -2 and report.layers[0].k == -0.5  # though both weigh the same


def test_two_opposed_clients_swing_for_ever_and_come_to_rest_with_a_safe_step():
    swinging = quadratic_rounds(1.0, 1.0, 40)
    assert abs(swinging[-1]) == pytest.approx(0.6) and swinging[-1] == pytest.approx(-swinging[-2])
    safe = quadratic_rounds("safe", 1.0, 40)
    assert abs(safe[-1]) < 1e-3
    # where nothing swings nothing is taken away
    assert quadratic_rounds("safe", 0.5, 40) == quadratic_rounds(1.0, 0.5, 40)


@given(CASES, st.sampled_from([0.0, 0.5, 1.0, 2.0, 8.0]))
@settings(max_examples=60)
def test_a_safe_step_is_the_most_within_the_bound(case, k):
    case = dataclasses.replace(case, server_lr="safe")
    merged, report = merge(**case.arguments(), rank=case.rank, k=k)
    layer = report.layers[0]
    bound = 1.8 / (1 + k * layer.lambda_max)
    assert layer.server_lr == pytest.approx(
        1.0 if len(case.states) == 1 or not layer.has_reference and layer.kind == "tensor" else min(1.0, bound)
    )
    again, _ = merge(**dataclasses.replace(case, server_lr=layer.server_lr).arguments(), rank=case.rank, k=k)
    assert all(torch.equal(merged[key], value) for key, value in again.items())


# --- Cosines and interference ---


@given(CASES)
@settings(max_examples=60)
def test_cosines_are_the_dense_ones(case):
    _, report = merge(**case.arguments(), rank=case.rank)
    deltas, norms = case.layer.deltas, case.layer.norms
    for i, row in enumerate(report.layers[0].cosines):
        for j, cosine in enumerate(row):
            expected = float((deltas[i] * deltas[j]).sum()) / (norms[i] * norms[j]) if norms[i] * norms[j] else 0.0
            assert cosine == pytest.approx(expected, abs=1e-6)  # updates of 0.1 % of W have lost six digits
    if report.layers[0].is_update:
        assert report.cosines() == pytest.approx(torch.tensor(report.layers[0].cosines).numpy(), abs=1e-6)
        assert report.interference == pytest.approx(report.layers[0].interference)


def test_cosines_of_whole_updates_and_none_above_32_clients():
    one, other = tensor_case(1, n=3), tensor_case(2, n=3)
    states = [{"a": s[TENSOR], "b": t[TENSOR]} for s, t in zip(one.states, other.states, strict=True)]
    _, report = merge(states, {"a": one.reference[TENSOR], "b": other.reference[TENSOR]})
    whole = [torch.cat([a.flatten(), b.flatten()]) for a, b in zip(one.layer.deltas, other.layer.deltas, strict=True)]
    expected = [[float(x @ y / (x.norm() * y.norm())) for y in whole] for x in whole]
    assert torch.allclose(torch.tensor(report.cosines()), torch.tensor(expected), atol=1e-6)
    many = tensor_case(1, n=33)
    _, report = merge(**many.arguments())
    assert report.layers[0].cosines == [] and report.cosines() == []


# --- Clipping ---


def clipped_oracle(case: Case, clip: float) -> oracle.Layer:
    """The layer with every delta shortened to `clip` times the median of the norms above zero."""
    norms = case.layer.norms
    heard = sorted(norm for norm in norms if norm > 0)
    if not heard:
        return case.layer
    middle = len(heard) // 2
    median = heard[middle] if len(heard) % 2 else (heard[middle - 1] + heard[middle]) / 2
    factors = [min(1.0, clip * median / norm) if norm > 0 else 1.0 for norm in norms]
    sent = [r.double() + f * d for r, f, d in zip(case.layer.received, factors, case.layer.deltas, strict=True)]
    return oracle.Layer(sent, case.layer.received, case.layer.W)


@given(CASES, CLIPS, st.sampled_from([0.0, 0.5, 1.0, 2.0]))
@settings(max_examples=120)
def test_a_clipped_merge_is_the_oracles_of_shortened_updates(case, clip, k):
    if TENSOR in case.states[0] and case.reference is None:
        return
    merged, report = merge(**case.arguments(), rank=case.rank, k=k, clip=clip)
    layer = clipped_oracle(case, clip)
    w = layer.weights(k, case.examples)
    T = layer.target(w, case.server_lr)
    found = merged[TENSOR] if TENSOR in merged else merged_product(merged, report)
    expected = T if TENSOR in merged else oracle.truncated(T, case.out_rank)
    if TENSOR in merged or oracle.is_separated(T, case.out_rank):
        assert oracle.relative_error(found, expected, float(T.norm()) + layer.size(w) ** 0.5) < 1e-9
    assert report.layers[0].weights == pytest.approx(w, rel=1e-6)
    assert report.layers[0].norms == pytest.approx(case.layer.norms, rel=1e-8)  # as sent


@given(CASES, CLIPS)
@settings(max_examples=40)
def test_clipping_keeps_the_order_of_clients_from_mattering(case, clip):
    order = list(reversed(range(len(case.states))))
    assert_order_of_clients_changes_nothing(case, order, clip=clip)


@pytest.mark.parametrize("method", ["from", "average", "ties", "dare", "knots-ties", "task-arithmetic", "dare-from"])
@pytest.mark.parametrize("make", [adapter_case, tensor_case])
def test_however_large_one_client_is_the_merge_is_the_same(method, make):
    """Beyond the bound only the direction counts: 1e3 times and 1e6 times too large come to the same."""
    results = []
    for size in (1e3, 1e6):
        case = make(5, n=5)
        loud = dict(case.states[0])
        for key, value in loud.items():
            if "lora_A" not in key:
                base = case.reference[key] if case.reference else torch.zeros_like(value)
                loud[key] = base + size * (value - base)
        states = [loud, *case.states[1:]]
        merged, _ = merge(states, case.reference, method, clip=1.5)
        results.append(merged[TENSOR] if TENSOR in merged else product_of(case, merged))
    assert torch.allclose(*results, rtol=1e-6, atol=1e-9)


def test_clipping_of_whole_updates_bounds_the_weights_too():
    case = tensor_case(5, n=5)
    loud = {TENSOR: case.reference[TENSOR] + 1e6 * (case.states[0][TENSOR] - case.reference[TENSOR])}
    _, report = merge([loud, *case.states[1:]], case.reference, scope="model", clip=1.0)
    assert report.layers[0].weights[0] < 0.5


def test_running_statistics_are_clipped_and_values_without_a_reference_are_not():
    g = torch.Generator().manual_seed(0)
    W = {"bn.running_mean": torch.zeros(4, dtype=torch.float64)}
    states = [{"bn.running_mean": 0.1 * torch.randn(4, dtype=torch.float64, generator=g)} for _ in range(4)]
    loud = {"bn.running_mean": torch.full((4,), 1e6, dtype=torch.float64)}
    merged, _ = merge([loud, *states], W, clip=2.0)
    assert float(merged["bn.running_mean"].norm()) < 1
    merged, _ = merge([loud, *states], None, clip=2.0)
    assert float(merged["bn.running_mean"].norm()) > 1e5


def test_what_goes_beside_a_module_is_clipped_by_its_own_norms():
    case = adapter_case(2, n=5, start="trained")
    bias = "base_model.model.encoder.layer.0.query.lora_B.bias"
    g = torch.Generator().manual_seed(0)
    states = [{**state, bias: torch.randn(12, dtype=torch.float64, generator=g)} for state in case.states]
    states[0][bias] = states[0][bias] * 1e6
    reference = {**case.reference, bias: torch.zeros(12, dtype=torch.float64)}
    merged, _ = merge(states, reference, clip=2.0)
    assert float(merged[bias].norm()) < 20


def test_the_order_of_sums_ignores_how_loud_a_clipped_client_was():
    """Clients clipped to one norm tie, and are parted by what they sent, not by the order they came in."""
    case = tensor_case(7, n=4)
    scaled = [
        {TENSOR: case.reference[TENSOR] + (i + 3) * 1e3 * (state[TENSOR] - case.reference[TENSOR])}
        for i, state in enumerate(case.states)
    ]
    one, _ = merge([case.states[0], *scaled], case.reference, clip=1e-6)
    other, _ = merge([*reversed(scaled), case.states[0]], case.reference, clip=1e-6)
    assert torch.equal(one[TENSOR], other[TENSOR])
