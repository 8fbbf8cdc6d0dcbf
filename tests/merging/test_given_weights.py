"""`weights=`: what the user multiplies each client by, divided by the sum where the method normalises."""

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedfrom import FroM, merge, methods
from fedfrom.merging.methods.frobenius import weights
from fedfrom.merging.weights import mean_weight
from tests.merging import oracle, properties
from tests.merging.samples import (
    A_KEY,
    B_KEY,
    TENSOR,
    Case,
    adapter_case,
    adapter_cases,
    fishers,
    tensor_case,
    tensor_cases,
    with_grams,
)

NORMALISING = [
    {"method": "from", "k": 1.0},
    {"method": "from", "k": 0.5, "examples_power": 0.5, "scope": "model"},
    {"method": "from", "k": math.inf},
    {"method": "average", "examples_power": 1.0},
    {"method": "soup"},
    {"method": "factor-average", "examples_power": 1.0},
    {"method": "task-arithmetic", "form": "mean", "coefficient": 0.7, "examples_power": 1.0},
    {"method": "knots-ta", "form": "mean"},
    {"method": "dare", "form": "mean", "density": 1.0},
    {"method": "dare-from", "density": 1.0, "k": 2.0},
    {"method": "regmean", "examples_power": 0.5},
    {"method": "lorm"},
    {"method": "fisher", "examples_power": 0.5},
    {"method": "actmat", "rho": 1.0},
]
SUMS = [
    {"method": "task-arithmetic", "coefficient": 0.7},
    {"method": "knots-ta"},
    {"method": "dare", "density": 1.0},
]
ELECTIONS = [
    {"method": "ties", "density": 0.4, "examples_power": 0.5},
    {"method": "ties", "density": 0.4, "scope": "model", "majority": "frequency"},
    {"method": "dare-ties", "density": 0.5},
    {"method": "dare-ties", "density": 0.5, "form": "mean"},
    {"method": "knots-ties", "density": 0.4},
    {"method": "knots-dare-ties", "density": 0.5},
]
SPECTRAL = [
    {"method": "tsv", "coefficient": 0.7},
    {"method": "iso", "examples_power": 0.5},
    {"method": "iso-cts"},
    {"method": "core-ties", "density": 0.4},
    {"method": "core-dare-ties", "density": 0.5},
    {"method": "ctm", "inner_options": {"density": 0.4}, "rank": 2},
    {"method": "ctm", "inner": "from", "beta": 0.0},
]
DRAWN = [{"method": "dare", "density": 0.5}, {"method": "dare-from", "density": 0.5}]
COUNTING = [{"method": "svc", "inner": "average"}]  # a client twice is two of the n
EVERY = [*NORMALISING, *SUMS, *ELECTIONS, *SPECTRAL, *DRAWN, *COUNTING]
CASES = adapter_cases(examples=True) | tensor_cases(examples=True)
WEIGHTS = st.sampled_from([0.0, 0.3, 1.0, 2.0, 1e-100])


def label(options: dict[str, Any]) -> str:
    return "-".join(map(str, options.values()))


def ready(case: Case, options: dict[str, Any]) -> Case | None:
    """The case with the statistics that the method needs; None where the method can't have it."""
    if options["method"] == "fisher":
        case = replace(case, statistics=fishers(case))
    elif options["method"] in ("regmean", "lorm"):
        case = with_grams(case)
    if options["method"] in ("fisher", "factor-average") and TENSOR not in case.states[0]:  # of one rank and scaling
        return None if case.configs or case.received else replace(case, rank=None)
    return case


def whole(case: Case) -> Case:
    """The case with all of the product's rank, where rounding does not decide what is cut."""
    return case if TENSOR in case.states[0] or case.rank is None else replace(case, rank=min(case.layer.W.shape))


def drawn(data: st.DataObject, case: Case) -> list[float]:
    own = data.draw(st.lists(WEIGHTS, min_size=len(case.states), max_size=len(case.states)))
    assume(any(own))
    return own


# --- The formulas ----------------------------------------------------------------------------------------------------


@given(
    st.lists(st.just(0.0) | st.floats(1e-3, 1e3), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.5, 1.0, 8.0, math.inf]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.data(),
)
def test_weights_are_multiplied_and_sum_to_1(norms, k, p, data):
    n = len(norms)
    examples = data.draw(st.none() | st.lists(st.integers(1, 10**6), min_size=n, max_size=n))
    own = data.draw(st.lists(st.sampled_from([0.0, 0.3, 1.0, 7.0]), min_size=n, max_size=n))
    assume(any(own))
    found = weights(norms, k, examples, p, own)
    assert found.tolist() == pytest.approx(oracle.weights(norms, k, examples, p, own), rel=1e-12, abs=1e-300)
    assert float(found.sum()) == pytest.approx(1, abs=1e-15 * n)


@pytest.mark.parametrize(
    ("norms", "k", "examples", "own", "expected"),
    [
        ([1.0, 2.0, 9.0], math.inf, None, [1.0, 1.0, 0.0], [0.0, 1.0, 0.0]),  # the largest of those that count
        ([2.0, 2.0, 1.0], math.inf, None, [1.0, 3.0, 9.0], [0.25, 0.75, 0.0]),  # ties share by weight
        ([0.0, 0.0, 5.0], 1.0, None, [1.0, 3.0, 0.0], [0.25, 0.75, 0.0]),  # nobody who counts trained: as k = 0
        ([1.0, 1.0, 1e300], 1e308, None, [1.0, 3.0, 0.0], [0.25, 0.75, 0.0]),
        ([1.0, 1.0, 1.0], 0.0, [7, 7, 10**6], [1.0, 3.0, 0.0], [0.25, 0.75, 0.0]),
        ([1.0, 1.0], 0.0, None, [5e-324, 5e-324], [0.5, 0.5]),
        ([1.0, 1.0], 0.0, None, [1e308, 1e308], [0.5, 0.5]),
    ],
)
def test_extremes_are_exact(norms, k, examples, own, expected):
    power = 1e308 if examples else 0.0
    assert weights(norms, k, examples, power, own).tolist() == pytest.approx(expected, abs=1e-15)


def test_the_mean_weight_is_by_examples_and_exact_where_all_are_equal():
    assert mean_weight([2.0, 5.0], [1, 3], 1.0) == pytest.approx((2 + 15) / 4, rel=1e-15)
    assert mean_weight([2.0, 5.0], [1, 3], 0.0) == 3.5
    for same in (0.3, 1.0, 1e308):
        assert mean_weight([same] * 3, [1, 5, 7], 0.5) == same
    assert mean_weight(None, [1, 5], 1.0) == 1.0


@pytest.mark.parametrize("p", [0.0, 1.0])
@given(CASES, st.data())
@settings(max_examples=15)
def test_sums_are_multiplied_and_means_are_divided_by_formula(p, case, data):
    """theta* of Task Arithmetic is sum_i u_i theta_i n_i^p / mean n^p, of FroM sum_i w_i theta_i."""
    case = whole(case)
    own = drawn(data, case)
    case = replace(case, weights=own)
    share = torch.tensor(case.examples, dtype=torch.float64) ** p
    c = [u * float(s) for u, s in zip(own, share / share.mean(), strict=True)]
    w = case.layer.weights(1.0, case.examples, p, own)
    for options, by in (({"method": "task-arithmetic"}, c), ({"method": "from"}, w)):
        T = case.layer.target(by, case.server_lr)
        if TENSOR not in case.states[0]:
            assume(oracle.is_separated(T, case.out_rank))
            T = oracle.truncated(T, case.out_rank)
        size = float(case.layer.W.double().norm()) + sum(case.layer.norms)
        assert oracle.relative_error(properties.result(case, examples_power=p, **options), T, size) <= 1e-9
        reported = properties.run(case, examples_power=p, **options)[1].layers[0]
        norms = case.layer.weights(0.0 if options["method"] == "task-arithmetic" else 1.0, case.examples, p, own)
        assert reported.weights == pytest.approx(norms, rel=1e-9, abs=1e-300)
        assert reported.clients_effective == pytest.approx(1 / sum(each**2 for each in norms), rel=1e-9)
        assert reported.lambda_max == pytest.approx(case.layer.lambda_max(norms), abs=1e-9)


# --- PEFT's `weights` ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [[2.0, 0.3, 1.0, 0.0], [1e-3, 5.0, 5.0, 40.0]])
@pytest.mark.parametrize("kind", ["tensor", "adapter"])
@pytest.mark.filterwarnings("ignore:The density")  # of PEFT, at density 1
def test_sums_and_ties_are_pefts(own, kind):
    """An adapter as the product that PEFT's functions are given; none is cut: 4 clients of rank 3, rank 12 of 13."""
    peft = pytest.importorskip("peft.utils.merge_utils")
    adapters = {"d_out": 13, "d_in": 14, "n": 4, "out": 13}
    case = tensor_case(4, shape=(13, 11), n=4) if kind == "tensor" else adapter_case(4, **adapters)
    case, given_weights = replace(case, weights=own), torch.tensor(own, dtype=torch.float64)
    deltas = [delta.clone() for delta in case.layer.deltas]
    expected = {"task-arithmetic": peft.task_arithmetic(deltas, given_weights)}
    for majority in ("total", "frequency"):
        expected[f"ties {majority}"] = peft.ties(deltas, given_weights, 0.3, majority)
        expected[f"dare-ties {majority}"] = peft.ties(deltas, given_weights, 1.0, majority)
    for name, change in expected.items():
        method, _, majority = name.partition(" ")
        options = {"density": 1.0 if method == "dare-ties" else 0.3, "majority": majority} if majority else {}
        found = properties.result(case, method=method, **options)
        size = float(case.layer.W.norm() + change.norm())
        assert oracle.relative_error(found, case.layer.W + change, size) <= 1e-13, name


# --- Properties ------------------------------------------------------------------------------------------------------


def test_every_method_is_here():
    assert {options["method"] for options in EVERY} | {"greedy-soup"} == set(methods())


@pytest.mark.parametrize("options", EVERY, ids=label)
@given(CASES)
@settings(max_examples=8)
def test_equal_weights_count_as_none(options, case):
    assume((case := ready(case, options)) is not None)
    properties.assert_equal_weights_count_as_none(case, **options)


@pytest.mark.parametrize("options", NORMALISING, ids=label)
@given(CASES, st.sampled_from([2.0, 0.3, 5e-324, 1e308]))
@settings(max_examples=8)
def test_weights_in_common_cancel_where_the_method_normalises(options, case, same):
    assume((case := ready(case, options)) is not None)
    merged, _ = properties.run(case, **options)
    found, _ = properties.run(replace(case, weights=[same] * len(case.states)), **options)
    assert all(torch.equal(found[key], merged[key]) for key in merged)


@pytest.mark.parametrize("options", [*SUMS, *[o for o in ELECTIONS if o.get("form") != "mean"]], ids=label)
@given(CASES)
@settings(max_examples=8)
def test_weights_in_common_are_a_coefficient_where_it_does_not(options, case):
    own = options.get("coefficient", 1.0)
    doubled, _ = properties.run(case, **{**options, "coefficient": 2 * own})
    found, _ = properties.run(replace(case, weights=[2.0] * len(case.states)), **options)
    assert all(torch.equal(found[key], doubled[key]) for key in doubled)


@pytest.mark.parametrize("server_lr", [0.5, "safe"])
@pytest.mark.parametrize("options", [*NORMALISING, *SUMS], ids=label)
@given(adapter_cases(examples=True, n=3) | tensor_cases(examples=True, n=3), st.integers(0, 2), st.data())
@settings(max_examples=8)
def test_weight_0_is_left_out(options, server_lr, case, which, data):
    if server_lr == "safe" and options.get("k") == math.inf:  # which is refused
        server_lr = 1.0
    case = ready(replace(case, server_lr=server_lr), options)
    assume(case is not None)
    case = whole(replace(case, weights=data.draw(st.none() | st.permutations([0.3, 1.0, 2.0]))))
    if TENSOR not in case.states[0] and options["method"] not in ("fisher", "factor-average"):
        others = [i for i in range(3) if i != which]
        case = replace(case, rank=case.rank or min(case.layer.W.shape))
        assume(max(case.permuted(others).layer.norms) > 0)
    # Gram matrices are divided by, and LoRM's iteration stops at 1e-9
    limit = {"regmean": 1e-9, "lorm": 1e-6}.get(options["method"], 1e-10)
    properties.assert_weight_0_is_left_out(case, which, limit, **options)


@pytest.mark.parametrize("options", [o for o in NORMALISING if "examples_power" not in o] + SUMS, ids=label)
@given(adapter_cases(n=3) | tensor_cases(n=3), st.integers(0, 2))
@settings(max_examples=8)
def test_weight_2_is_the_client_twice(options, case, which):
    assume((case := ready(case, options)) is not None)
    if TENSOR not in case.states[0] and options["method"] not in ("fisher", "factor-average"):
        case = replace(case, rank=min(case.layer.W.shape))
    limit = {"regmean": 1e-9, "lorm": 1e-6}.get(options["method"], 1e-10)
    properties.assert_weight_2_is_the_client_twice(case, which, limit, **options)


@pytest.mark.parametrize("kind", ["adapters", "tensors"])
@pytest.mark.parametrize(
    "options", [{"method": "from"}, {"method": "task-arithmetic"}, {"method": "average"}], ids=label
)
def test_of_many_clients_and_of_large_tensors_too(kind, options):
    """Cosines of more than 32 adapters are sketched, and large tensors summed a block at a time."""
    if kind == "adapters":
        case = adapter_case(5, d_out=24, d_in=20, n=36, start="trained", examples=True, out=20)
    else:
        case = tensor_case(5, shape=(700, 200), n=3, examples=True)
    own = [(0.3, 1.0, 2.0)[i % 3] for i in range(len(case.states))]
    properties.assert_equal_weights_count_as_none(case, **options)
    properties.assert_weight_0_is_left_out(replace(case, weights=own), 1, 1e-10, **options)
    properties.assert_weight_2_is_the_client_twice(case, 2, 1e-10, **{**options, "examples_power": 0.0})
    case = replace(case, weights=own)
    properties.assert_order_of_clients_changes_nothing(case, list(range(len(own)))[::-1], **options)


@pytest.mark.parametrize("options", EVERY, ids=label)
@given(CASES, st.data())
@settings(max_examples=10)
def test_order_of_clients(options, case, data):
    assume((case := ready(case, options)) is not None)
    case = replace(case, weights=drawn(data, case))
    order = data.draw(st.permutations(range(len(case.states))))
    properties.assert_order_of_clients_changes_nothing(case, order, **options)


@pytest.mark.parametrize("method", ["from", "ties", "dare"])
def test_order_of_one_update_with_several_weights(method):
    """Copies of one client, whose norm, examples and content tie: their weights part them."""
    for case in (tensor_case(3, n=4), adapter_case(3, n=4, start="trained")):
        case = replace(case.permuted([0, 0, 0, 1]), weights=[0.1, 0.7, 0.3, 0.2])
        for order in ([2, 1, 0, 3], [1, 2, 3, 0]):
            properties.assert_order_of_clients_changes_nothing(case, order, method=method)


# --- Where nothing is an update --------------------------------------------------------------------------------------


def test_buffers_and_tensors_without_a_reference_are_a_mean_by_weight():
    """Also in a sum; of integers the largest of those that count."""
    states = [
        {
            "new": torch.full((2,), v),
            "bn.running_mean": torch.full((2,), v),
            "n": torch.tensor(int(v)),
            "w": torch.ones(2),
        }
        for v in (1.0, 5.0, 9.0)
    ]
    reference = {"bn.running_mean": torch.zeros(2), "w": torch.zeros(2)}
    for method in ("from", "task-arithmetic", "ties", "dare"):
        merged, report = merge(states, reference, method, weights=[3, 1, 0])
        assert merged["new"].tolist() == merged["bn.running_mean"].tolist() == [2.0, 2.0]
        assert merged["n"] == 5
        assert {layer.name: layer.weights for layer in report.layers}["new"] == [0.75, 0.25, 0.0]


def test_the_rank_of_a_client_of_weight_0_does_not_count():
    ranks = (3, 1)
    states = [
        {A_KEY: torch.ones(r, 9, dtype=torch.float64), B_KEY: torch.ones(12, r, dtype=torch.float64)} for r in ranks
    ]
    configs = [{"r": r, "lora_alpha": 1} for r in ranks]
    assert merge(states, configs=configs)[1].layers[0].rank_out == 3
    assert merge(states, configs=configs, weights=[0, 1])[1].layers[0].rank_out == 1


# --- k = "auto", clip, greedy soup -----------------------------------------------------------------------------------


def test_bounds_of_auto_count_the_clients_that_have_weight():
    """At k = 1 the two that count weigh 8 to 1: 1 / sum w^2 = 1.25 is half of two and more, but not half of three."""
    g = torch.Generator().manual_seed(0)
    states = [{"w": torch.randn(50, generator=g, dtype=torch.float64)} for _ in range(3)]
    zero = {"w": torch.zeros(50, dtype=torch.float64)}
    states[0]["w"] *= 8 * states[1]["w"].norm() / states[0]["w"].norm()
    method = FroM(k="auto", search={"k": [0.0, 1.0]}, validate=lambda state: float(state["w"].norm()))
    own, _ = merge(states[:2], zero, method)
    found, report = merge(states, zero, method, weights=[1, 1, 0])
    assert report.layers[0].k == 1.0 and report.layers[0].clients_effective < 1.5
    assert oracle.relative_error(found["w"], own["w"]) <= 1e-14


def test_the_median_of_clip_still_sees_a_client_of_weight_0():
    states, zero = [{"w": torch.full((4,), v)} for v in (1.0, 2.0, 3.0)], {"w": torch.zeros(4)}
    _, report = merge(states, zero, "average", clip=1.0, weights=[0, 1, 1])
    assert report.layers[0].clipped == pytest.approx([1, 1, 2 / 3])


def test_greedy_soup_passes_the_weights_of_its_subset_and_leaves_out_weight_0():
    states = [{"w": torch.full((2,), v)} for v in (100.0, 1.0, 4.0, 7.0)]
    seen = []

    def validate(state):
        seen.append(float(state["w"][0]))
        return -abs(seen[-1] - 2.0)

    merged, report = merge(states, method="greedy-soup", validate=validate, weights=[0, 2, 1, 1])
    assert report.clients == ["client 1", "client 2"] and 100.0 not in seen
    assert merged["w"].tolist() == [2.0, 2.0]
    assert report.layers[0].weights == pytest.approx([2 / 3, 1 / 3])


# --- What is refused, and what is kept -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [{}, {"method": "greedy-soup", "validate": lambda state: 0.0}])
@pytest.mark.parametrize(
    ("own", "words"),
    [
        ([1, True, 1], ["bob", "weight", "True"]),
        ([1, -1, 1], ["bob", "weight", "-1"]),
        ([1, 1, math.nan], ["cem", "weight", "nan"]),
        ([math.inf, 1, 1], ["ann", "weight", "inf"]),
        ([1, 10**400, 1], ["bob", "weight"]),
        ([1, "2", 1], ["bob", "weight", "'2'"]),
        ([1, None, 1], ["bob", "weight", "None"]),
        ([0, 0.0, 0], ["weights", "above 0"]),
        ([1, 1], ["weights", "3", "found 2", "none for cem"]),
        ([1, 1, 1, 1], ["weights", "3", "found 4", "cem"]),
        ([], ["weights", "found 0", "ann"]),
        (2.0, ["weights", "one number a client", "2.0"]),
        ("211", ["weights", "one number a client", "'211'"]),
        ({"ann": 1, "bob": 1, "cem": 1}, ["weights", "one number a client"]),
    ],
)
def test_weights_that_are_refused(method, own, words):
    states = [{"w": torch.ones(2)}] * 3
    with pytest.raises(ValueError) as caught:
        merge(states, names=["ann", "bob", "cem"], weights=own, **method)
    assert all(word in str(caught.value) for word in ("expected", "found", *words)), caught.value


@pytest.mark.parametrize(
    "own", [(2, 1), [2.0, 1], np.array([2.0, 1.0]), np.array([2, 1], dtype=np.float32), [Fraction(2), Fraction(1)]]
)
def test_numbers_of_any_kind_are_weights_and_the_report_has_them(own):
    states = [{"w": torch.ones(2)}, {"w": torch.full((2,), 4.0)}]
    merged, report = merge(states, method="average", weights=own)
    assert merged["w"].tolist() == [2.0, 2.0]
    assert report.method["weights"] == [2.0, 1.0]
    assert type(report).from_dict(report.to_dict()) == report
    assert "weights" not in merge(states)[1].method
