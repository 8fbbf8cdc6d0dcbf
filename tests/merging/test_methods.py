"""Every merging method against its paper's formula on dense float64 matrices, and what is identically true of it."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedfrom import merge, methods
from tests.merging import oracle, properties
from tests.merging.formulas import (
    CASES,
    PRODUCTS,
    RANDOM,
    assert_report_is_dense,
    by_formula,
    label,
    on_products,
    update,
)
from tests.merging.samples import (
    DTYPES,
    TENSOR,
    adapter_case,
    adapter_cases,
    merged_product,
    tensor_case,
    tensor_cases,
    with_grams,
)


@by_formula
@given(tensor_cases(examples=True, dtype=torch.float64), st.integers(0, 99))
@settings(max_examples=15)
def test_tensors_by_formula(options, case, seed):
    case = with_grams(case, seed) if options["method"] == "regmean" else case
    change = update(replace(case, statistics=case.statistics if case.layer.W.ndim == 2 else None), **options)
    expected = case.layer.W + case.server_lr * change
    merged, report = properties.run(case, **options)
    size = float(case.layer.W.norm() + change.norm())
    assert oracle.relative_error(merged[TENSOR], expected, size) <= 1e-12
    assert_report_is_dense(case, report, change, options.get("examples_power", 0.0), options.get("k", 0.0))


@by_formula
@given(adapter_cases(examples=True), st.integers(0, 99))
@settings(max_examples=20)
def test_adapters_by_formula(options, case, seed):
    """Ranks and alphas of their own, parts of the reference sent, rank in other than rank out, server_lr 0.5."""
    case = with_grams(case, seed) if options["method"] == "regmean" else case
    change = update(case, **options)
    T = case.layer.W + case.server_lr * change
    assume(oracle.is_separated(T, case.out_rank))
    merged, report = properties.run(case, **options)
    expected, size = oracle.truncated(T, case.out_rank), float(case.layer.W.norm() + change.norm())
    # KnOTS divides by singular values, RegMean by a Gram matrix
    assert oracle.relative_error(merged_product(merged, report), expected, size) <= 1e-8
    assert_report_is_dense(case, report, change, options.get("examples_power", 0.0), options.get("k", 0.0))


# --- Properties -------------------------------------------------------------------------------------------------------


@on_products
@given(CASES, st.data())
@settings(max_examples=12)
def test_order_of_clients(options, case, data):
    order = data.draw(st.permutations(range(len(case.states))))
    properties.assert_order_of_clients_changes_nothing(with_grams(case), order, **options)


@on_products
@given(CASES)
@settings(max_examples=5)
def test_inputs_are_unchanged(options, case):
    case = with_grams(case)
    before = [{key: value.clone() for key, value in each.items()} for each in case.statistics]
    properties.assert_inputs_are_unchanged(case, **options)
    for each, was in zip(case.statistics, before, strict=True):
        assert all(torch.equal(each[key], was[key]) for key in was)


@pytest.mark.parametrize("dtype", DTYPES)
@on_products
def test_dtype_and_layout(options, dtype):
    for case in (
        adapter_case(0, dtype=dtype, start="trained", examples=True),
        tensor_case(0, dtype=dtype, examples=True),
        tensor_case(0, shape=(3,), dtype=dtype, examples=True),
    ):
        case = with_grams(case)
        properties.assert_dtype_and_layout_are_kept(case, **options)
        as_dtype = [{key: value.to(dtype) for key, value in each.items()} for each in case.statistics]
        properties.assert_dtype_and_layout_are_kept(replace(case, statistics=as_dtype), **options)


# sums add up, and what drops entries or has none left does not give one client back
MEANS = [
    {"method": "from", "k": 1.0},
    {"method": "from", "k": 2.0},
    {"method": "from", "k": -1.0},
    {"method": "from", "k": 0.5, "examples_power": 0.5},
    {"method": "from", "k": math.inf, "scope": "model"},
    {"method": "average", "examples_power": 1.0},
    {"method": "soup"},
    {"method": "task-arithmetic", "form": "mean"},
    {"method": "ties", "density": 1.0},
    {"method": "ties", "density": 1.0, "majority": "frequency", "scope": "model"},
    {"method": "dare", "density": 1.0, "form": "mean"},
    {"method": "dare-ties", "density": 1.0},
    {"method": "dare-from", "density": 1.0},
    {"method": "regmean"},
    {"method": "lorm"},
    {"method": "knots-ta", "form": "mean"},
    {"method": "knots-ties", "density": 1.0},
    {"method": "knots-dare-ties", "density": 1.0},
    {"method": "core-ties", "density": 1.0},
    {"method": "core-dare-ties", "density": 1.0},
    {"method": "actmat", "rho": 0.5},
    {"method": "svc", "inner": "from", "inner_options": {"k": 2.0}},
    {"method": "ctm", "inner": "average"},
    {"method": "ctm", "inner_options": {"density": 1.0}},
]


@pytest.mark.parametrize("options", MEANS, ids=label)
@given(CASES)
@settings(max_examples=15)
def test_identical_clients(options, case):
    # KnOTS divides by singular values, RegMean by Gram matrices; LoRM alternates until a step is 1e-9 of the result:
    # 3e-7 off at most in 60 cases, where steps shrink slowly
    limits = {"from": 1e-12, "average": 1e-12, "soup": 1e-12, "lorm": 1e-6}
    limit = limits.get(options["method"], 1e-11)
    properties.assert_identical_clients_give_what_one_gives(with_grams(case), limit, **options)


@on_products
@pytest.mark.parametrize("start", ["trained", "cut"])
def test_zero_deltas(options, start):
    """Nobody trained: the reference, at its rank; copies of it count as it does."""
    case = with_grams(adapter_case(1, start=start, idle=3, examples=True))
    found = properties.result(case, **options)
    assert oracle.relative_error(found, case.layer.W) <= 1e-12
    case = with_grams(tensor_case(1, idle=3, examples=True))
    assert torch.equal(properties.result(case, **options), case.layer.W)


@on_products
def test_zero_deltas_of_fresh_adapters(options):
    case = with_grams(adapter_case(1, start="fresh", idle=3, examples=True))
    assert not properties.result(case, **options).any()


# one more client that trained nothing: TIES' entries don't vote, norms have no weight, sums get nothing
INDIFFERENT = [
    {"method": "from", "k": 1.0},
    {"method": "from", "k": -1.0},
    {"method": "task-arithmetic"},
    {"method": "ties", "density": 0.4},
    {"method": "ties", "density": 0.4, "scope": "model"},
    {"method": "ties", "density": 0.4, "majority": "frequency"},
    {"method": "dare-from", "density": 1.0},
    {"method": "dare-ties", "density": 1.0},
    {"method": "knots-ta"},
    {"method": "knots-ties", "density": 0.4},
]


@pytest.mark.parametrize("options", INDIFFERENT, ids=label)
@given(adapter_cases(start="trained", n=3) | tensor_cases(n=3))
@settings(max_examples=15)
def test_one_more_client_that_trained_nothing_changes_nothing(options, case):
    """Its state is a copy, as after a trip through a file."""
    if TENSOR not in case.states[0]:
        case = replace(case, rank=min(case.layer.W.shape))
    idle = {key: value.clone() for key, value in case.reference.items()}
    layer = oracle.Layer([*case.layer.sent, case.layer.W], [case.layer.W] * 4, case.layer.W)
    examples = None if case.examples is None else [*case.examples, 7]
    more = replace(case, states=[*case.states, idle], layer=layer, examples=examples)
    expected = properties.result(case, **options)
    size = float(case.layer.W.norm() + expected.norm())
    assert oracle.relative_error(properties.result(more, **options), expected, size) <= 1e-10


@pytest.mark.parametrize("method", ["average", "task-arithmetic", "regmean", "fisher"])
def test_one_that_trained_nothing_pulls_means_towards_what_it_was_sent(method):
    case = with_grams(tensor_case(2, n=2, idle=1))
    same = [next(iter(case.statistics[0].values()))] * 2
    ones = [{TENSOR: torch.ones_like(case.layer.W)}] * 2
    beside = ones if method == "fisher" else [{TENSOR.removesuffix(".weight"): gram} for gram in same]
    options = {"form": "mean"} if method == "task-arithmetic" else {}
    found = properties.result(replace(case, statistics=beside), method=method, **options)
    assert oracle.relative_error(found, case.layer.W + case.layer.deltas[1] / 2) <= 1e-12


@pytest.mark.parametrize(
    "options", [o for o in PRODUCTS if o["method"] not in ("from", "lorm", *(r["method"] for r in RANDOM))], ids=label
)
def test_equal_examples_count_as_none(options):
    options = {**options, "examples_power": 1.0}
    for case in (adapter_case(3, start="trained"), tensor_case(3)):
        found = properties.result(replace(with_grams(case), examples=[5] * 3), **options)
        expected = properties.result(with_grams(case), **{**options, "examples_power": 0.0})
        assert oracle.relative_error(found, expected) <= 1e-12


@given(CASES)
@settings(max_examples=20)
def test_mean_form_with_coefficient_1_and_the_soup_are_the_average(case):
    for p in (0.0, 1.0):
        expected, _ = properties.run(case, method="average", examples_power=p)
        for options in ({"method": "task-arithmetic", "form": "mean"}, {"method": "soup"}):
            found, _ = properties.run(case, examples_power=p, **options)
            assert all(torch.equal(found[key], expected[key]) for key in expected)


# --- Names and errors -------------------------------------------------------------------------------------------------


def test_every_name_is_tested_here():
    named = {options["method"] for options in PRODUCTS} | {"fisher", "factor-average", "greedy-soup"}
    assert named == set(methods())


@pytest.mark.parametrize(
    "option, values, names",
    [
        (
            "density",
            [0, 0.0, 1.5, -0.1, math.nan, math.inf],
            [name for name in methods() if "ties" in name or "dare" in name],
        ),
        ("form", ["median", None], ["task-arithmetic", "dare", "knots-ta", "core-dare-ties"]),
        ("majority", ["sum", None], [name for name in methods() if "ties" in name]),
        ("scope", ["all", None], ["from", "ties", "dare-from", "knots-ties", "core-ties"]),
        ("scope", ["model"], ["knots-ties", "core-ties"]),
        (
            "coefficient",
            [math.nan, math.inf],
            ["task-arithmetic", "ties", "dare", "knots-ta", "knots-ties", "tsv", "iso", "iso-cts", "core-ties", "ctm"],
        ),
        ("common_space_fraction", [-0.1, 1.1, math.nan, None], ["iso-cts"]),
        ("beta", [-0.1, 1.1, math.nan, None], ["ctm"]),
        ("floor", [0.0, -1.0, math.nan, math.inf], ["fisher"]),
        ("off_diagonal", [-0.1, 1.1, math.nan], ["regmean", "lorm"]),
        ("validate", [None, 3], ["greedy-soup"]),
        ("examples_power", [-1.0, math.nan, math.inf], [name for name in methods() if name != "greedy-soup"]),
        ("nonsense", [1], methods()),
    ],
)
def test_options_out_of_range(option, values, names):
    case = with_grams(tensor_case(0))
    for name in names:
        for value in values:
            with pytest.raises(ValueError, match=option):
                merge(**case.arguments(), method=name, **{option: value})
