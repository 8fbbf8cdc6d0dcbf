"""Every merging method against its paper's formula on dense float64 matrices, and what is identically true of it."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedfrom import LowRank, merge, methods
from fedfrom.merging.methods.base import Context
from fedfrom.merging.methods.knots import align
from fedfrom.merging.methods.regmean import divide
from fedfrom.merging.methods.ties import Ties
from tests.merging import oracle, properties
from tests.merging.samples import (
    A_KEY,
    B_KEY,
    DTYPES,
    MODULE,
    TENSOR,
    Case,
    adapter_case,
    adapter_cases,
    fishers,
    generator,
    merged_product,
    normal,
    tensor_case,
    tensor_cases,
    with_grams,
)

# --- The formulas, written from the papers ---------------------------------------------------------------------------


def shares(case: Case, p: float) -> Tensor:
    """n_i^p / sum."""
    return torch.tensor(oracle.weights([1.0] * len(case.states), 0.0, case.examples, p), dtype=torch.float64)


def ties(deltas: list[Tensor], density: float, majority: str, factors: Tensor, thresholds: Any = None) -> Tensor:
    """TIES, Algorithm 1: the floor(density d) largest entries; sign of the sum or of most, + where even; their mean."""
    trimmed = []
    for i, delta in enumerate(deltas):
        if thresholds is None:
            order = delta.flatten().abs().argsort(descending=True)
            mask = torch.zeros(delta.numel(), dtype=torch.bool)
            mask[order[: math.floor(density * delta.numel())]] = True
            mask = mask.reshape(delta.shape)
        else:
            mask = delta.abs() >= thresholds[i]
        trimmed.append(torch.where(mask, delta, 0.0))
    stack = torch.stack(trimmed)
    positive = (stack if majority == "total" else stack.sign()).sum(0) >= 0
    agrees = torch.where(positive, stack > 0, stack < 0)
    scaled = stack * factors.reshape(-1, *[1] * deltas[0].ndim)
    count = agrees.sum(0)
    return torch.where(count > 0, torch.where(agrees, scaled, 0.0).sum(0) / count.clamp(min=1), 0.0)


def shrunk(gram: Tensor, a: float) -> Tensor:
    return torch.where(torch.eye(len(gram), dtype=torch.bool), gram, a * gram)


def regmean(deltas: list[Tensor], grams: list[Tensor], w: Tensor, a: float) -> Tensor:
    """RegMean, Eq. 2, transposed: theta sum_i w_i G_i = sum_i w_i theta_i G_i."""
    G = [w_i * shrunk(gram, a) for w_i, gram in zip(w, grams, strict=True)]
    return torch.linalg.solve(sum(G), sum(theta @ g for theta, g in zip(deltas, G, strict=True)), left=False)


def are_apart(S: Tensor) -> bool:
    return bool((S[:-1] > 1.01 * S[1:]).all())


def is_cut_clearly(part: Tensor, density: float) -> bool:
    sizes, kept = part.abs().flatten().sort(descending=True).values, math.floor(density * part.numel())
    return kept == 0 or kept == len(sizes) or bool(sizes[kept - 1] > sizes[kept] * (1 + 1e-6))


def knots(deltas: list[Tensor], density: float, merge_parts: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """KnOTS: U S merged(V_1, ..., V_n) of [theta_1 ... theta_n] = U S [V_1 ... V_n]."""
    U, S, Vh = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
    rank = int((1e-10 * S[0] < S).sum())
    Vh = Vh[:rank]
    # where singular values tie, or entries at the edge of the trim, rounding decides
    split = Vh.split(deltas[0].shape[1], dim=1)
    assume(are_apart(S[:rank]) and all(is_cut_clearly(part, density) for part in split))
    # frequency: even elections go to +, so that signs matter; each row's largest entry is positive
    assume(Vh.shape[1] == 1 or bool((Vh.abs().topk(2).values.diff(dim=1) < -1e-9).all()))
    signs = torch.stack([row[row.abs().argmax()].sign() for row in Vh])
    parts = list((Vh * signs[:, None]).split(deltas[0].shape[1], dim=1))
    return (U[:, :rank] * signs) @ torch.diag(S[:rank]) @ merge_parts(parts)


def update(case: Case, method: str, **o: Any) -> Tensor:
    """theta* of a case's layer, by the method's formula."""
    deltas, n = case.layer.deltas, len(case.states)
    w = shares(case, o.get("examples_power", 0.0))
    c = o.get("coefficient", 1.0)
    if method == "from":
        w = case.layer.weights(o.get("k", 1.0), case.examples, o.get("examples_power", 0.0))
        w = torch.tensor(w, dtype=torch.float64)
    if method in ("from", "average", "soup"):
        return case.layer.update(w.tolist())
    if method in ("task-arithmetic", "knots-ta"):
        return case.layer.update((c * w * (n if o.get("form", "sum") == "sum" else 1)).tolist())
    density, majority = o.get("density", 0.2), o.get("majority", "total")
    if method == "ties":
        return ties(deltas, density, majority, c * n * w)
    if method == "knots-ties":
        if deltas[0].ndim != 2 or TENSOR in case.states[0]:  # plain tensors are not aligned
            return ties(deltas, density, majority, c * n * w)
        return knots(deltas, density, lambda parts: ties(parts, density, majority, c * n * w))
    if method in ("regmean", "lorm"):
        if case.statistics is None or not (found := [next(iter(each.values())) for each in case.statistics]):
            return case.layer.update(w.tolist())
        return regmean(deltas, found, w, o.get("off_diagonal", 0.9))
    raise AssertionError(method)


FORMULAS = [
    {"method": "from", "k": 0.5, "examples_power": 0.5},
    {"method": "average", "examples_power": 1.0},
    {"method": "soup"},
    {"method": "task-arithmetic", "coefficient": 0.7},
    {"method": "task-arithmetic", "coefficient": -0.7, "form": "mean", "examples_power": 1.0},
    {"method": "task-arithmetic", "examples_power": 1.0},
    {"method": "ties", "density": 0.4},
    {"method": "ties", "density": 0.3, "majority": "frequency", "coefficient": 0.6, "examples_power": 0.5},
    {"method": "knots-ta", "coefficient": 0.7, "examples_power": 1.0},
    {"method": "knots-ties", "density": 0.4},
    {"method": "knots-ties", "density": 0.3, "majority": "frequency", "coefficient": 0.6, "examples_power": 0.5},
    {"method": "regmean"},
    {"method": "regmean", "off_diagonal": 0.1, "examples_power": 1.0},
]
RANDOM = [
    {"method": "dare", "density": 0.5},
    {"method": "dare-ties", "density": 0.5, "majority": "frequency"},
    {"method": "dare-from", "density": 0.5, "k": 2.0},
    {"method": "knots-dare-ties", "density": 0.5},
]
PRODUCTS = [
    *FORMULAS,
    {"method": "ties", "density": 0.4, "scope": "model"},
    {"method": "lorm", "off_diagonal": 0.5},
    *RANDOM,
]


def label(options: dict[str, Any]) -> str:
    return "-".join(map(str, options.values()))


by_formula = pytest.mark.parametrize("options", FORMULAS, ids=label)
on_products = pytest.mark.parametrize("options", PRODUCTS, ids=label)
CASES = adapter_cases(examples=True) | tensor_cases(examples=True)


def assert_report_is_dense(case: Case, report: Any, change: Tensor, p: float, k: float = 0.0) -> None:
    """The weights, lambda_max and the interference of a layer, by their formulas."""
    layer, w = report.layers[0], case.layer.weights(k, case.examples, p)
    assert layer.weights == pytest.approx(w, rel=1e-9, abs=1e-15)
    assert layer.lambda_max == pytest.approx(case.layer.lambda_max(w), abs=1e-9)
    size = case.layer.size(w)
    lost = sum(w_i * float((change - delta).square().sum()) for w_i, delta in zip(w, case.layer.deltas, strict=True))
    assert layer.interference == pytest.approx(lost / size if size else 0.0, rel=1e-6, abs=1e-9)
    if report.method["name"] in ("FroM", "Average"):
        assert 0 <= layer.interference <= 1 + 1e-12


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


# --- Properties ------------------------------------------------------------------------------------------------------


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
    {"method": "from", "k": 2.0},
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
]


@pytest.mark.parametrize("options", MEANS, ids=label)
@given(CASES)
@settings(max_examples=15)
def test_identical_clients(options, case):
    properties.assert_identical_clients_give_what_one_gives(with_grams(case), 1e-11, **options)


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


# --- Identities ------------------------------------------------------------------------------------------------------


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


@given(CASES)
@settings(max_examples=20)
def test_mean_form_with_coefficient_1_and_the_soup_are_the_average(case):
    for p in (0.0, 1.0):
        expected, _ = properties.run(case, method="average", examples_power=p)
        for options in ({"method": "task-arithmetic", "form": "mean"}, {"method": "soup"}):
            found, _ = properties.run(case, examples_power=p, **options)
            assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("method", ["regmean", "lorm"])
@given(adapter_cases(examples=True) | tensor_cases(shape=(7, 5), examples=True))
@settings(max_examples=20)
def test_regmean_with_equal_grams_is_the_mean(method, case):
    if TENSOR not in case.states[0]:
        case = replace(case, rank=min(case.layer.W.shape))
    same = with_grams(case).statistics[0]
    expected = case.layer.target(shares(case, 1.0).tolist(), case.server_lr)
    found = properties.result(replace(case, statistics=[same] * len(case.states)), method=method, examples_power=1.0)
    assert oracle.relative_error(found, expected, float(case.layer.W.norm() + expected.norm())) <= 1e-11


def test_regmean_is_the_least_squares_fit_of_all_clients_outputs():
    """Its own claim, from inputs, with a = 1: no weights reproduce the clients' outputs better."""
    case, g = tensor_case(4, shape=(6, 5), n=3), generator(0)
    inputs = [normal(50, 5, g=g) for _ in range(3)]
    case = replace(case, statistics=[{TENSOR.removesuffix(".weight"): x.T @ x / 50} for x in inputs])
    expected = torch.linalg.lstsq(
        torch.cat(inputs), torch.cat([x @ W.T for x, W in zip(inputs, case.layer.sent, strict=True)])
    ).solution.T
    assert oracle.relative_error(properties.result(case, method="regmean", off_diagonal=1.0), expected) <= 1e-12
    alone = replace(case, reference=None, layer=replace(case.layer, W=torch.zeros_like(case.layer.W)))
    assert oracle.relative_error(properties.result(alone, method="regmean", off_diagonal=1.0), expected) <= 1e-12


def test_regmean_without_inputs_in_a_column_keeps_the_reference_there():
    case = with_grams(tensor_case(5, shape=(6, 5)))
    for each in case.statistics:
        for gram in each.values():
            gram[2], gram[:, 2] = 0.0, 0.0
    found = properties.result(case, method="regmean")
    assert torch.equal(found[:, 2], case.layer.W[:, 2]) and torch.isfinite(found).all()


@pytest.mark.parametrize("start", ["tensor", "fresh", "trained"])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_fisher_by_formula(start, p):
    """Key by key: on adapters of the factors, which are not products."""
    case = tensor_case(6, examples=True) if start == "tensor" else adapter_case(6, start=start, examples=True)
    case = replace(case, statistics=fishers(case), server_lr=1.0 if start == "fresh" else 0.5)
    w = shares(case, p)
    merged, report = merge(**case.arguments(), method="fisher", floor=0.01, examples_power=p)
    for key, found in merged.items():
        W = torch.zeros_like(found) if case.reference is None else case.reference[key]
        F = [w_i * (each[key] + 0.01) for w_i, each in zip(w, case.statistics, strict=True)]
        change = sum(f * (state[key] - W) for f, state in zip(F, case.states, strict=True)) / sum(F)
        assert oracle.relative_error(found, W + case.server_lr * change) <= 1e-13
        layer = next(layer for layer in report.layers if layer.name == key)
        deltas = [state[key] - W for state in case.states]
        lost = sum(float(w_i * (change - delta).square().sum()) for w_i, delta in zip(w, deltas, strict=True))
        assert layer.interference == pytest.approx(
            lost / sum(float(w_i * delta.square().sum()) for w_i, delta in zip(w, deltas, strict=True)), rel=1e-9
        )


@pytest.mark.parametrize("start", ["tensor", "fresh", "trained"])
def test_fisher_with_equal_weights_is_the_mean_of_the_factors(start):
    case = tensor_case(7) if start == "tensor" else adapter_case(7, start=start)
    for same in (fishers(case)[0], {key: torch.zeros_like(value) for key, value in case.states[0].items()}):
        found, _ = merge(**replace(case, statistics=[same] * 3).arguments(), method="fisher")
        expected, _ = merge(**case.arguments(), method="factor-average")
        assert all(oracle.relative_error(found[key], expected[key]) <= 1e-14 for key in expected)


def test_fisher_properties():
    for case in (tensor_case(8, n=4, examples=True), adapter_case(8, n=4, start="trained", examples=True)):
        case = replace(case, statistics=fishers(case))
        properties.assert_order_of_clients_changes_nothing(case, [2, 0, 3, 1], method="fisher", examples_power=0.5)
        properties.assert_inputs_are_unchanged(case, method="fisher")
        alone = replace(case, states=case.states[:1], examples=None, statistics=case.statistics[:1])
        found, _ = merge(**alone.arguments(), method="fisher")
        assert all(oracle.relative_error(found[key], case.states[0][key]) <= 1e-14 for key in found)
    for dtype in DTYPES:
        case = adapter_case(8, start="trained", dtype=dtype)
        properties.assert_dtype_and_layout_are_kept(replace(case, statistics=fishers(case)), method="fisher")


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
    ones = torch.ones(3, dtype=torch.float64)
    for majority in ("total", "frequency"):
        method = Ties(density=0.7 if majority == "total" else 1.0, majority=majority)
        found = method.combine([flip * part for part in parts], ones, Context())
        assert torch.equal(found, flip * method.combine([part.clone() for part in parts], ones, Context()))
    even = Ties(density=1.0, majority="frequency")
    found = even.combine([flip * part for part in parts[:2]], ones[:2], Context())
    assert not torch.equal(found, flip * even.combine([part.clone() for part in parts[:2]], ones[:2], Context()))


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


# --- LoRM ------------------------------------------------------------------------------------------------------------


def lorm_objective(product: Tensor, case: Case, w: Tensor, a: float) -> float:
    """sum_i w_i ||(BA - W - alpha theta_i) G_i^1/2||_F^2."""
    total = 0.0
    for w_i, delta, each in zip(w, case.layer.deltas, case.statistics, strict=True):
        difference = product - case.layer.W.double() - case.server_lr * delta
        total += float(w_i * (difference @ shrunk(each[MODULE], a) * difference).sum())
    return total


def test_regmean_divides_by_a_singular_gram_matrix_too():
    """Fewer inputs than columns: the pseudo-inverse's answer, not one blown up by a pivot of rounding."""
    inputs = normal(5, 12, g=generator(3))
    gram = inputs.T @ inputs
    rows = normal(4, 12, g=generator(4)) @ gram
    expected = rows @ torch.linalg.pinv(gram, hermitian=True)
    assert oracle.relative_error(divide(rows, gram), expected) <= 1e-9
    regular = gram + torch.eye(12, dtype=torch.float64)
    assert oracle.relative_error(divide(rows, regular) @ regular, rows) <= 1e-12


@given(adapter_cases(examples=True), st.integers(0, 99))
@settings(max_examples=20)
def test_lorm_at_full_rank_is_regmean(case, seed):
    case = replace(with_grams(case, seed), rank=min(case.layer.W.shape))
    expected = properties.result(case, method="regmean", examples_power=1.0)
    found = properties.result(case, method="lorm", examples_power=1.0)
    assert oracle.relative_error(found, expected, float(case.layer.W.norm() + expected.norm())) <= 1e-9


@given(adapter_cases(examples=True), st.integers(0, 99))
@settings(max_examples=60)
def test_lorm_reaches_the_optimum_of_its_objective(case, seed):
    """T M^1/2's truncated SVD, M = sum_i w_i G_i, times M^-1/2, is the best of this rank: W and theta* cut together."""
    case, a = with_grams(case, seed), 0.5
    w = shares(case, 1.0)
    M = sum(w_i * shrunk(each[MODULE], a) for w_i, each in zip(w, case.statistics, strict=True))
    values, vectors = torch.linalg.eigh(M)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    T = case.layer.W + case.server_lr * update(case, "regmean", off_diagonal=a, examples_power=1.0)
    best = torch.linalg.solve(root, oracle.truncated(T @ root, case.out_rank), left=False)
    options = {"off_diagonal": a, "examples_power": 1.0}
    size = lorm_objective(torch.zeros_like(T), case, w, a)
    found = lorm_objective(properties.result(case, method="lorm", **options), case, w, a)
    assert found - lorm_objective(best, case, w, a) <= 1e-6 * size
    cut = lorm_objective(properties.result(case, method="regmean", **options), case, w, a)
    assert found <= cut + 1e-6 * size


def test_lorm_beats_regmean_cut_to_the_rank():
    """Where inputs are not white the best matrix of a rank is another one: by 10 % and more here."""
    case = with_grams(adapter_case(13, d_out=20, d_in=16, r=4, n=3, out=4))
    for each in case.statistics:
        scale = torch.logspace(-1.5, 1.5, 16, dtype=torch.float64)
        each[MODULE] = scale[:, None] * each[MODULE] * scale
    w = shares(case, 0.0)
    lorm, cut = (
        lorm_objective(properties.result(case, method=method, off_diagonal=1.0), case, w, 1.0)
        for method in ("lorm", "regmean")
    )
    assert lorm < 0.9 * cut


# --- DARE ------------------------------------------------------------------------------------------------------------


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


# --- Soups -----------------------------------------------------------------------------------------------------------


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


# --- Names and errors ------------------------------------------------------------------------------------------------


def test_every_name_is_tested_here():
    named = {options["method"] for options in PRODUCTS} | {"fisher", "factor-average", "greedy-soup"}
    assert named == set(methods())


@pytest.mark.parametrize(
    "option, values, names",
    [
        (
            "density",
            [0, 0.0, 1.5, -0.1, math.nan, math.inf],
            ["ties", "dare", "dare-ties", "dare-from", "knots-ties", "knots-dare-ties"],
        ),
        ("form", ["median", None], ["task-arithmetic", "dare", "knots-ta"]),
        ("majority", ["sum", None], ["ties", "dare-ties", "knots-ties", "knots-dare-ties"]),
        ("scope", ["all", None], ["from", "ties", "dare-from", "knots-ties"]),
        ("scope", ["model"], ["knots-ties"]),
        ("coefficient", [math.nan, math.inf], ["task-arithmetic", "ties", "dare", "knots-ta", "knots-ties"]),
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


@pytest.mark.parametrize("method, helper", [("regmean", "gram"), ("lorm", "gram"), ("fisher", "fisher")])
def test_missing_statistics_name_the_client_and_the_helper(method, helper):
    case = adapter_case(0, start="trained")
    for statistics in (None, [{MODULE: torch.eye(9)}, None, {MODULE: torch.eye(9)}], [{MODULE: torch.eye(9)}, {}, {}]):
        with pytest.raises(ValueError) as caught:
            merge(**replace(case, statistics=statistics).arguments(), method=method)
        assert f"client {0 if statistics is None else 1}" in str(caught.value)
        assert f"fedfrom.client.{helper}" in str(caught.value)


@pytest.mark.parametrize("kind", ["tensor", "adapter"])
@pytest.mark.parametrize("method", ["regmean", "lorm", "fisher"])
def test_wrong_statistics_name_the_client_and_the_layer(method, kind):
    case = tensor_case(0) if kind == "tensor" else adapter_case(0, start="trained")
    case = replace(case, statistics=fishers(case)) if method == "fisher" else with_grams(case)
    name = next(iter(case.statistics[0]))
    right = case.statistics[1][name]
    spoiled = right.clone()
    spoiled[0, 0] = math.nan
    for wrong in (right[:-1, :-1], right[:1], right.flatten(), spoiled):
        statistics = [case.statistics[0], {**case.statistics[1], name: wrong}, case.statistics[2]]
        with pytest.raises(ValueError) as caught:
            merge(**replace(case, statistics=statistics).arguments(), method=method)
        for word in ("client 1", name, "expected", "found"):
            assert word in str(caught.value)
    elsewhere = {key if key != name else "elsewhere": value for key, value in case.statistics[2].items()}
    statistics = [*case.statistics[:2], elsewhere]
    with pytest.raises(ValueError, match="client 2.*expected statistics"):
        merge(**replace(case, statistics=statistics).arguments(), method=method)
