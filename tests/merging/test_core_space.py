"""Core Space: the bases that all updates share, and TIES and DARE-TIES on the cores, against dense float64 matrices."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedfrom import merge
from fedfrom.merging.linalg.directions import left_basis, with_fixed_signs
from tests.merging import oracle, properties
from tests.merging.formulas import are_apart, is_cut_clearly, ties
from tests.merging.samples import A_KEY, B_KEY, TENSOR, adapter_case, adapter_cases, generator, normal, tensor_case

METHODS = [{"method": "core-ties", "density": 1.0}, {"method": "core-dare-ties", "density": 1.0}]


def basis(side_by_side: Tensor) -> Tensor:
    """Left singular vectors over the numerical rank, each with its largest entry positive."""
    U, S, _ = torch.linalg.svd(side_by_side, full_matrices=False)
    U, S = U[:, 1e-9 * S[0] < S], S[1e-9 * S[0] < S]
    assume(are_apart(S) and float(S[-1]) >= 1e-3 * float(S[0]))
    largest = U.abs().sort(dim=0, descending=True).values
    assume(len(U) == 1 or bool((largest[0] > largest[1] * (1 + 1e-5)).all()))
    return U * torch.stack([column[column.abs().argmax()].sign() for column in U.T])


def core_ties(deltas: list[Tensor], density: float, majority: str, factors: Tensor) -> Tensor:
    """TIES on M_t = U^T theta_t V, U and V of the updates side by side and one above another (2509.17786)."""
    U, V = basis(torch.cat(deltas, dim=1)), basis(torch.cat([delta.T for delta in deltas], dim=1))
    cores = [U.T @ delta @ V for delta in deltas]
    cores = [torch.where(M.abs() > 1e-11 * M.norm(), M, 0.0) for M in cores]
    assume(all(is_cut_clearly(M, density) for M in cores))
    return U @ ties(cores, density, majority, factors) @ V.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density, majority", [(0.4, "total"), (1.0, "frequency"), (0.2, "frequency")])
@given(st.integers(0, 99), st.integers(1, 5), st.sampled_from(["fresh", "trained", "configs", "tensor"]))
@settings(max_examples=25)
def test_by_formula(dtype, density, majority, seed, n, start):
    """Weights and examples multiply what is left of a client's core, as in TIES."""
    if start == "tensor":
        case = tensor_case(seed, shape=(9, 14), n=n, dtype=dtype, examples=True)
    else:
        case = adapter_case(seed, d_out=30, d_in=24, n=n, dtype=dtype, start=start, examples=True, out=24)
    case = replace(case, weights=[0.5 + i for i in range(n)])
    share = torch.tensor(case.examples, dtype=torch.float64)
    factors = 0.7 * torch.tensor(case.weights, dtype=torch.float64) * share / share.mean()
    change = core_ties(case.layer.deltas, density, majority, factors)
    options = {"density": density, "majority": majority, "coefficient": 0.7, "examples_power": 1.0}
    found = properties.result(case, method="core-ties", **options)
    T = case.layer.W.double() + change
    limit = 1e-5 if dtype == torch.float32 else 1e-10
    assert oracle.relative_error(found, T, float(case.layer.W.double().norm() + change.norm())) <= limit


@pytest.mark.parametrize("options", METHODS, ids=lambda options: options["method"])
@pytest.mark.parametrize("kind", ["adapters", "matrices"])
def test_clients_that_share_no_direction_do_not_vote_on_each_other(options, kind):
    """Each entry of the cores is one client's, and zero but for rounding at the others: theta* is their sum."""
    g, n, r = generator(0), 4, 2
    left, right = torch.linalg.qr(normal(30, n * r, g=g)).Q, torch.linalg.qr(normal(24, n * r, g=g)).Q
    states = []
    for i in range(n):
        columns = slice(i * r, (i + 1) * r)
        states.append({A_KEY: normal(r, r, g=g) @ right[:, columns].T, B_KEY: left[:, columns] @ normal(r, r, g=g)})
    thetas = [oracle.product(state[B_KEY], state[A_KEY]) for state in states]
    if kind == "matrices":
        found = merge([{"w": theta} for theta in thetas], {"w": 0 * thetas[0]}, **options)[0]["w"]
    else:
        merged, _ = merge(states, rank=24, **options)
        found = oracle.product(merged[B_KEY], merged[A_KEY])
    assert oracle.relative_error(found, sum(thetas)) <= 1e-12


@pytest.mark.parametrize("options", METHODS, ids=lambda options: options["method"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_copies_of_an_adapter_but_for_rounding_add_no_direction(options, dtype):
    g, eps = generator(1), torch.finfo(dtype).eps
    A, B = normal(8, 60, g=g), normal(80, 8, g=g)
    states = [
        {key: (X * (1 + eps * normal(*X.shape, g=g) / 4)).to(dtype) for key, X in ((A_KEY, A), (B_KEY, B))}
        for _ in range(4)
    ]
    merged, _ = merge(states, rank=60, **options)
    mean = sum(oracle.product(state[B_KEY], state[A_KEY]) for state in states) / 4
    assert oracle.relative_error(oracle.product(merged[B_KEY], merged[A_KEY]), mean) <= eps
    if dtype != torch.bfloat16:  # in which an entry at the edge of the trim may be on its other side
        # the cores are diagonal: 3 of 64 entries are kept, which of 32 directions would be all that are not rounding
        options = {"method": "core-ties", "density": 0.05}
        found, expected = (merge(s, rank=60, **options)[0] for s in (states, [states[0]] * 4))
        found, expected = (oracle.product(state[B_KEY], state[A_KEY]) for state in (found, expected))
        assert oracle.relative_error(found, expected) <= 10 * eps


@given(adapter_cases(n=3, start="trained"))
@settings(max_examples=10)
def test_a_factor_that_all_share_stays_in_the_result(case):
    """FFA-LoRA's clients: every row of theta* lies in the span of the one A."""
    B = [state[B_KEY] for state in case.states]
    assume(len({tuple(b.shape) for b in B}) == 1 and case.configs is None)
    states = [{A_KEY: case.states[0][A_KEY], B_KEY: b} for b in B]
    merged, _ = merge(states, method="core-ties", density=0.5)
    A = states[0][A_KEY]
    found = oracle.product(merged[B_KEY], merged[A_KEY])
    assert oracle.relative_error(found @ torch.linalg.pinv(A) @ A, found, float(found.norm()) or 1.0) <= 1e-10


def test_dare_draws_by_the_size_of_updates_and_not_by_the_factors_they_came_in():
    case = adapter_case(2, d_out=30, d_in=24, n=3, r=3, out=24)
    scaled = [{A_KEY: s[A_KEY] * c, B_KEY: s[B_KEY] / c} for s, c in zip(case.states, (0.1, 9.0, 1.0), strict=True)]
    options = {"method": "core-dare-ties", "density": 0.5}
    expected = properties.result(case, **options)
    assert oracle.relative_error(properties.result(replace(case, states=scaled), **options), expected) <= 1e-10
    other = properties.result(case, **options, seed=1)
    assert oracle.relative_error(other, expected) > 0.1


@pytest.mark.parametrize("tolerance", [1e-12, 1e-7])
@pytest.mark.parametrize("shapes", [[(20, 3), (20, 4)], [(5, 30), (5, 2)], [(9, 9)]])
def test_left_basis(tolerance, shapes):
    """By the SVD and by the Gram matrix: orthonormal, descending, all that the matrices span."""
    g = generator(3)
    matrices = [normal(*shape, g=g) for shape in shapes]
    U, X = left_basis(matrices, tolerance), torch.cat(matrices, dim=1)
    assert U.shape == (len(X), min(X.shape))
    assert torch.allclose(U.T @ U, torch.eye(U.shape[1], dtype=torch.float64), atol=1e-12)
    assert torch.allclose(torch.linalg.vector_norm(U.T @ X, dim=1), torch.linalg.svdvals(X), rtol=1e-9)
    assert left_basis([0 * M for M in matrices], tolerance).shape[1] == 0


def test_signs_go_by_the_largest_entry_the_first_of_those_that_tie():
    like = torch.tensor([[1.0, -1.0, 0.0], [-3.0, 1.0 + 1e-9, 0.0], [2.0, 0.5, 0.0]], dtype=torch.float64)
    vectors = torch.ones(2, 3, dtype=torch.float64)
    assert with_fixed_signs(vectors, like).tolist() == [[-1.0, -1.0, 1.0]] * 2


def test_a_matrix_without_rank_and_one_client():
    for options in METHODS:
        one = tensor_case(4, shape=(6, 8), n=1)
        assert oracle.relative_error(properties.result(one, **options), one.layer.sent[0]) <= 1e-12
        column = tensor_case(4, shape=(6, 1), n=3)
        assert math.isfinite(float(properties.result(column, **options).norm()))
        assert TENSOR in column.states[0]
