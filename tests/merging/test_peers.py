"""The methods against others' code, where that is right: PEFT, mergekit, fusion-bench."""

import ast
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedfrom import LowRank, merge
from fedfrom.merging.linalg.alignment import align
from tests.merging import oracle
from tests.merging.samples import A_KEY, B_KEY, TENSOR, adapter_case, generator, normal, tensor_case


def merged_update(case, **options) -> Tensor:
    """theta* of a plain tensor's case, with server_lr 1."""
    merged, _ = merge(case.states, case.reference, examples=case.examples, statistics=case.statistics, **options)
    return merged[TENSOR] - case.reference[TENSOR]


def close(found: Tensor, expected: Tensor, case) -> bool:
    """Within the rounding of W + theta*."""
    return oracle.relative_error(found, expected, float(case.layer.W.norm() + expected.norm())) <= 1e-14


# --- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft.utils.merge_utils")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.99])
def test_ties_is_pefts(peft, seed, majority, density):
    case = tensor_case(seed, shape=(13, 11), n=4)
    expected = peft.ties(case.layer.deltas, torch.ones(4, dtype=torch.float64), density, majority)
    assert close(merged_update(case, method="ties", density=density, majority=majority), expected, case)


@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_ties_with_weights_is_pefts(peft, majority):
    case = tensor_case(4, shape=(13, 11), n=4, examples=True)
    share = torch.tensor(case.examples, dtype=torch.float64)
    expected = peft.ties(case.layer.deltas, 0.7 * 4 * share / share.sum(), 0.3, majority)
    options = {"density": 0.3, "majority": majority, "coefficient": 0.7, "examples_power": 1.0}
    assert close(merged_update(case, method="ties", **options), expected, case)


def test_task_arithmetic_is_pefts(peft):
    case = tensor_case(5, shape=(13, 11), n=4, examples=True)
    weights = torch.full((4,), 0.6, dtype=torch.float64)
    expected = peft.task_arithmetic(case.layer.deltas, weights)
    assert close(merged_update(case, method="task-arithmetic", coefficient=0.6), expected, case)
    share = torch.tensor(case.examples, dtype=torch.float64)
    expected = peft.task_arithmetic(case.layer.deltas, 0.6 * share / share.sum())
    found = merged_update(case, method="task-arithmetic", coefficient=0.6, form="mean", examples_power=1.0)
    assert close(found, expected, case)


@pytest.mark.parametrize("method", ["dare", "dare-ties-total", "dare-ties-frequency"])
@pytest.mark.parametrize("density", [0.2, 0.7])
def test_dare_has_pefts_distribution(peft, method, density):
    """Masks differ, the law does not: means over 20000 draws of 16 entries, and the mean squares.

    Two-sample tests at 5.5 standard errors: 64 of them fail by chance in fewer than 1 of 300 000 seeds.
    """
    draws, n = 20_000, 3
    values = normal(n, 16, g=generator(0))
    states = [{TENSOR: row[:, None].repeat(1, draws)} for row in values]
    deltas = [state[TENSOR] for state in states]
    zero = {TENSOR: torch.zeros(16, draws, dtype=torch.float64)}
    torch.manual_seed(0)  # PEFT draws from the global generator
    if method == "dare":
        found, _ = merge(states, zero, method="dare", density=density)
        expected = peft.dare_linear(deltas, torch.ones(n, dtype=torch.float64), density)
    else:
        majority = method.removeprefix("dare-ties-")
        found, _ = merge(states, zero, method="dare-ties", density=density, majority=majority)
        expected = peft.dare_ties(deltas, torch.ones(n, dtype=torch.float64), density, majority)
    for power in (1, 2):
        a, b = found[TENSOR] ** power, expected**power
        error = ((a.var(dim=1) + b.var(dim=1)) / draws).sqrt()
        assert float(((a.mean(dim=1) - b.mean(dim=1)).abs() / error).max()) < 5.5


# --- mergekit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_with_unit_weights_is_mergekits(seed, density):
    mergekit = pytest.importorskip("mergekit.merge_methods")
    case = tensor_case(seed, shape=(13, 11), n=4)
    expected = mergekit.merge_tensors(
        [case.reference[TENSOR], *(state[TENSOR] for state in case.states)],
        "ties",
        parameters={"weight": 1.0, "density": density},
        base_index=0,
    )
    expected = expected - case.reference[TENSOR]
    assert close(merged_update(case, method="ties", density=density), expected, case)


# --- fusion-bench ----------------------------------------------------------------------------------------------------


def functions_of(path: str) -> dict:
    """The functions that one of fusion-bench's files defines, without the dependencies that the package imports."""
    if (spec := importlib.util.find_spec("fusion_bench")) is None:
        pytest.skip("needs fusion-bench")
    source = Path(spec.submodule_search_locations[0], path).read_text()
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    future = ast.parse("from __future__ import annotations").body
    tree.body = [*future, *tree.body]
    namespace = {"torch": torch}
    exec(compile(tree, path, "exec"), namespace)
    return namespace


def grams(n: int, d: int, seed: int) -> list[Tensor]:
    inputs = [normal(2 * d, d, g=generator(1000 * seed + i)) for i in range(n)]
    return [x.T @ x / len(x) for x in inputs]


# fusion-bench holds a in float32: one that float32 has exactly is compared tightly
@pytest.mark.parametrize("off_diagonal, limit", [(1.0, 1e-13), (0.5, 1e-13), (0.9, 1e-8), (0.1, 1e-8)])
def test_regmean_is_fusion_benchs(off_diagonal, limit):
    regmean = functions_of("method/regmean/regmean.py")["merging_with_regmean_weights"]
    case = tensor_case(6, shape=(13, 11), n=4)
    module, given = TENSOR.removesuffix(".weight"), grams(4, 11, seed=0)
    case = replace(case, statistics=[{module: gram} for gram in given])
    # on the models, not the deltas: the reference cancels
    expected = regmean({TENSOR: case.layer.sent}, case.statistics, off_diagonal)[TENSOR]
    found = case.reference[TENSOR] + merged_update(case, method="regmean", off_diagonal=off_diagonal)
    assert oracle.relative_error(found, expected) <= limit


def test_fisher_is_fusion_benchs():
    fisher = functions_of("method/fisher_merging/fisher_merging.py")["merging_with_fisher_weights"]
    case = tensor_case(7, shape=(13, 11), n=4)
    given = [{TENSOR: normal(13, 11, g=generator(i)).square()} for i in range(4)]
    case = replace(case, statistics=given)
    ones = torch.ones(4, dtype=torch.float64)
    for floor in (1e-6, 1e-2):
        expected = fisher({TENSOR: case.layer.sent}, given, ones, False, floor)[TENSOR]
        found = case.reference[TENSOR] + merged_update(case, method="fisher", floor=floor)
        assert oracle.relative_error(found, expected) <= 1e-14


@pytest.mark.parametrize("d_out, d_in", [(12, 9), (9, 12), (40, 30)])
def test_knots_basis_is_fusion_benchs(d_out, d_in):
    subspace_alignment = functions_of("method/knots/knots_utils.py")["subspace_alignment"]
    case = adapter_case(8, d_out=d_out, d_in=d_in, n=3, r=2)
    U, S, parts = subspace_alignment(case.layer.deltas)
    own_U, own_S, own_parts = align([LowRank(state[B_KEY], state[A_KEY]) for state in case.states])
    assert torch.allclose(own_S, S, rtol=1e-12, atol=0)
    # a pair of singular vectors may change its sign together
    signs = torch.sign((own_U * U).sum(dim=0))
    assert torch.allclose(own_U, U * signs, atol=1e-11)
    for own, part in zip(own_parts, parts, strict=True):
        assert torch.allclose(own, part * signs[:, None], atol=1e-11)
