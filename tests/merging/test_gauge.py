"""What the factors that leave the server look like."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfrom import LowRank, merge
from tests.merging import oracle
from tests.merging.samples import A_KEY, B_KEY, MODULE, adapter_case, adapter_cases, factors, generator, normal


def assert_gauge(B, A, atol=1e-12):
    """A orthonormal, each row's largest entry positive; B's columns orthogonal, descending; none dead."""
    r, d_in = A.shape
    free = min(r, d_in)
    assert torch.allclose(A[:free] @ A[:free].T, torch.eye(free, dtype=A.dtype), atol=atol)
    assert torch.allclose(torch.linalg.vector_norm(A, dim=1), torch.ones(r, dtype=A.dtype), atol=atol)
    sizes = torch.linalg.vector_norm(B, dim=0)
    assert bool((sizes[:-1] >= sizes[1:] * (1 - 1e-12)).all())
    gram = B.T @ B
    assert torch.allclose(gram, torch.diag(gram.diagonal()), atol=atol * max(1.0, float(sizes.max()) ** 2))
    alive = A[sizes > 1e-9 * sizes.max()]
    if len(alive):
        assert bool((alive.gather(1, alive.abs().argmax(1, keepdim=True)) > 0).all())


@pytest.mark.parametrize("solver", ["svd", "alternating"])
@given(st.data())
def test_gauge(solver, data):
    case = data.draw(adapter_cases())
    merged, _ = merge(**case.arguments(), rank=case.rank, solver=solver)
    if case.reference is None and len(case.states) == 1 or not torch.equal(merged[A_KEY], case.states[0][A_KEY]):
        assert_gauge(merged[B_KEY], merged[A_KEY])


@given(adapter_cases(out=None, server_lr=1.0, start="fresh"))
def test_leading_parts_are_the_best_approximations(case):
    merged, _ = merge(**case.arguments())
    T = case.layer.target(case.layer.weights(1.0))
    for r in range(1, min(T.shape) + 1):
        if r <= merged[A_KEY].shape[0] and oracle.is_separated(T, r):
            found = oracle.product(merged[B_KEY][:, :r], merged[A_KEY][:r])
            assert oracle.relative_error(found, oracle.truncated(T, r), float(T.norm())) <= 1e-10


def test_completion_of_a_deficient_product():
    """Two clients of rank 1 in factors of rank 4: A has four orthonormal rows, B two zero columns."""
    g = generator(0)
    states = []
    for _ in range(2):
        B, A = factors(12, 9, 4, g)
        B[:, 1:] = 0
        states.append({A_KEY: A, B_KEY: B})
    merged, report = merge(states)
    assert_gauge(merged[B_KEY], merged[A_KEY])
    assert torch.equal(merged[B_KEY][:, 2:], torch.zeros(12, 2, dtype=torch.float64))
    again, _ = merge([dict(state) for state in states])
    assert all(torch.equal(merged[key], again[key]) for key in merged)
    renamed, _ = merge([{key.replace("query", "value"): t for key, t in state.items()} for state in states])
    other = renamed[A_KEY.replace("query", "value")]
    assert torch.allclose(other[:2], merged[A_KEY][:2]) and not torch.allclose(other[2:], merged[A_KEY][2:])
    assert report.layers[0].energy_dropped < 1e-28


def test_zero_product():
    states = [{A_KEY: normal(3, 9, g=generator(i)), B_KEY: torch.zeros(12, 3, dtype=torch.float64)} for i in range(2)]
    for solver in ("svd", "alternating"):
        merged, report = merge(states, solver=solver)
        assert_gauge(merged[B_KEY], merged[A_KEY])
        assert not merged[B_KEY].any() and report.layers[0].excess == 0.0 and report.layers[0].energy_dropped == 0.0


def test_completion_beyond_the_width_is_unit_rows():
    A = LowRank(*factors(5, 3, 6, generator(0))).truncate(3)
    assert A.A.shape == (3, 3)
    merged, _ = merge([{A_KEY: normal(6, 3, g=generator(i)), B_KEY: normal(5, 6, g=generator(i + 2))} for i in (0, 1)])
    assert merged[A_KEY].shape == (6, 3)
    assert_gauge(merged[B_KEY], merged[A_KEY])


def test_the_global_generator_is_left_alone():
    case = adapter_case(0, r=4, spectrum="fast")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    merge(case.states, solver="alternating", rank=7)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("scalings", [None, (2.0, 5.0, 1.0)])
def test_frozen_A_stays_and_the_product_is_exact(scalings):
    g = generator(4)
    A, B = normal(3, 9, g=g), [normal(12, 3, g=g) for _ in range(3)]
    states = [{A_KEY: A.clone(), B_KEY: each} for each in B]
    s = scalings or (1.0, 1.0, 1.0)
    configs = None if scalings is None else [{"r": 3, "lora_alpha": 3 * s_i} for s_i in scalings]
    merged, report = merge(states, configs=configs, k=2.0)
    zeros = torch.zeros(12, 9, dtype=torch.float64)
    layer = oracle.Layer([oracle.product(b, A, s_i) for b, s_i in zip(B, s, strict=True)], [zeros] * 3, zeros)
    w = layer.weights(2.0)
    assert torch.equal(merged[A_KEY], A)
    mean = sum(w_i * s_i * b for w_i, s_i, b in zip(w, s, B, strict=True))
    assert oracle.relative_error(merged[B_KEY], mean) <= 1e-14
    assert report.layers[0].objective == pytest.approx(layer.objective(mean @ A, w), rel=1e-9)
    # asked for less than it has, it is solved like any other
    cut, _ = merge(states, configs=configs, k=2.0, rank=2)
    assert_gauge(cut[B_KEY], cut[A_KEY])


def test_frozen_A_with_reference_and_scaling():
    g = generator(5)
    A, W = normal(3, 9, g=g), normal(12, 3, g=g)
    states = [{A_KEY: A.clone(), B_KEY: W + 0.1 * normal(12, 3, g=g)} for _ in range(3)]
    config = {"r": 3, "lora_alpha": 6}
    merged, report = merge(
        states,
        {A_KEY: A, B_KEY: W},
        configs=[config] * 3,
        reference_config=config,
        k=1.0,
        server_lr=0.5,
        as_reference=True,
    )
    w = report.layers[0].weights
    expected = W + 0.5 * sum(w_i * (state[B_KEY] - W) for w_i, state in zip(w, states, strict=True))
    assert torch.equal(merged[A_KEY], A)
    assert oracle.relative_error(merged[B_KEY], expected) <= 1e-14


def test_rank_asked_for_is_the_rank_that_comes_out():
    """Also above the clients', and where A is frozen."""
    g = generator(6)
    for A in ([normal(3, 9, g=g)] * 2, [normal(3, 9, g=g) for _ in range(2)]):
        states = [{A_KEY: a, B_KEY: normal(12, 3, g=g)} for a in A]
        for rank in (1, 3, 5, 9):
            merged, _ = merge(states, rank=rank)
            assert merged[A_KEY].shape == (rank, 9) and merged[B_KEY].shape == (12, rank)


EMBEDDING = "base_model.model.embed"


@pytest.mark.parametrize("rank", [None, 2])
def test_embeddings_swap_the_roles(rank):
    """A is r x vocabulary and starts at zero, B is standard normal: so they leave."""
    g = generator(7)
    vocabulary, d, r = 40, 16, 3
    a_key, b_key = f"{EMBEDDING}.lora_embedding_A", f"{EMBEDDING}.lora_embedding_B"
    states = [{a_key: normal(r, vocabulary, g=g), b_key: normal(d, r, g=g)} for _ in range(3)]
    merged, report = merge(states, rank=rank)
    rank = rank or r
    assert merged[a_key].shape == (rank, vocabulary) and merged[b_key].shape == (d, rank)
    zeros = torch.zeros(d, vocabulary, dtype=torch.float64)
    layer = oracle.Layer([oracle.product(state[b_key], state[a_key]) for state in states], [zeros] * 3, zeros)
    T = layer.target(layer.weights(1.0))
    assert oracle.relative_error(oracle.product(merged[b_key], merged[a_key]), oracle.truncated(T, rank)) <= 1e-12
    B = merged[b_key]
    assert torch.allclose(B.T @ B, d * torch.eye(rank, dtype=torch.float64), atol=1e-10)  # entries of size 1
    sizes = torch.linalg.vector_norm(merged[a_key], dim=1)
    assert bool((sizes[:-1] >= sizes[1:]).all())
    assert report.layers[0].rank_out == rank


def test_module_name_is_the_layers_name():
    case = adapter_case(0)
    assert merge(case.states)[1].layers[0].name == MODULE


# --- Balanced ---------------------------------------------------------------------------------------------------------


@given(adapter_cases(start="trained"))
def test_a_balanced_product_is_the_same_in_factors_of_equal_size(case):
    one, _ = merge(**case.arguments(), rank=case.rank)
    other, report = merge(**case.arguments(), rank=case.rank, gauge="balanced")
    B, A = other[B_KEY], other[A_KEY]
    expected = oracle.product(one[B_KEY], one[A_KEY])
    assert oracle.relative_error(oracle.product(B, A), expected, float(expected.norm())) <= 1e-12
    if torch.equal(A, one[A_KEY]):  # kept as the clients had it
        return
    sizes, lengths = torch.linalg.vector_norm(B, dim=0), torch.linalg.vector_norm(A, dim=1)
    fresh = torch.tensor(3**-0.5, dtype=torch.float64)
    torch.testing.assert_close(
        lengths, torch.maximum((sizes * lengths).sqrt(), fresh.expand(len(A))), rtol=1e-12, atol=0
    )
    assert (torch.diff(sizes * lengths) <= 1e-12 * (sizes * lengths).max()).all()


def test_rows_without_a_column_leave_as_fresh_ones():
    states = [{A_KEY: normal(3, 9, g=generator(i)), B_KEY: torch.zeros(12, 3, dtype=torch.float64)} for i in range(2)]
    merged, _ = merge(states, gauge="balanced")
    torch.testing.assert_close(merged[A_KEY] @ merged[A_KEY].T, torch.eye(3, dtype=torch.float64) / 3)
    assert not merged[B_KEY].any()


def test_small_updates_keep_their_digits_in_float16():
    g = generator(0)
    pairs = [(1e-5 * normal(384, 8, g=g), normal(8, 384, g=g) / 34) for _ in range(3)]
    exact, _ = merge([{B_KEY: B, A_KEY: A} for B, A in pairs], method="average")
    half = [{B_KEY: 64 * B, A_KEY: A / 64} for B, A in pairs]  # as balanced clients have them
    half = [{key: tensor.half() for key, tensor in state.items()} for state in half]
    true = oracle.product(exact[B_KEY], exact[A_KEY])
    errors = {}
    for gauge in ("orthonormal", "balanced"):
        merged, _ = merge(half, method="average", gauge=gauge)
        assert merged[B_KEY].dtype == torch.float16
        found = oracle.product(merged[B_KEY].double(), merged[A_KEY].double())
        errors[gauge] = float((found - true).norm() / true.norm())
    assert errors["balanced"] < 6e-4 < 3e-3 < errors["orthonormal"]


def test_an_embeddings_rows_are_no_shorter_than_fresh_ones():
    key = "base_model.model.embed.lora_embedding_"
    g = generator(0)
    states = [{f"{key}A": 0.1 * normal(2, 30, g=g), f"{key}B": normal(8, 2, g=g)} for _ in range(2)]
    for gauge in ("orthonormal", "balanced"):
        merged, _ = merge(states, method="average", gauge=gauge)
        lengths = torch.linalg.vector_norm(merged[f"{key}B"], dim=0)
        assert (lengths >= 8**0.5 * (1 - 1e-12)).all()


def test_another_gauge_is_refused():
    with pytest.raises(ValueError, match="^gauge: expected one of orthonormal, balanced, found 'aligned'$"):
        merge([{A_KEY: normal(3, 9, g=generator(0)), B_KEY: normal(12, 3, g=generator(1))}], gauge="aligned")
