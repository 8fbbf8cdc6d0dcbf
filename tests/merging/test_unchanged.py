"""A factor that no client changed stays to the bit, with every method whose result lies in its span."""

import pytest
import torch
from torch import Tensor

from fedfrom import merge
from tests.merging import oracle
from tests.merging.samples import A_KEY, B_KEY, State, dense, generator, merged_product, normal

ALWAYS = ["from", "average", "soup", "task-arithmetic", "knots-ta"]  # weighted sums of the updates
WHERE_IT_LIES_THERE = {"ties": {"density": 1.0}, "dare": {"density": 1.0}, "knots-ties": {"density": 1.0}}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
D_OUT, D_IN, RANK = 12, 9, 3
EMBEDDING = {A_KEY: "m.words.lora_embedding_B", B_KEY: "m.words.lora_embedding_A"}


def reference(dtype: torch.dtype) -> State:
    g = generator(0)
    return {A_KEY: normal(RANK, D_IN, g=g, dtype=dtype), B_KEY: normal(D_OUT, RANK, g=g, dtype=dtype)}


def clients(W: State, stays: str, n: int = 3) -> list[State]:
    """Clients that changed the other factor alone."""
    moved = B_KEY if stays == A_KEY else A_KEY
    g = generator(1)
    return [{**W, moved: W[moved] + (0.3 * normal(*W[moved].shape, g=g)).to(W[moved].dtype)} for _ in range(n)]


def as_embedding(state: State) -> State:
    """The same factors as PEFT holds them of an embedding: transposed, A under the name of B."""
    return {EMBEDDING[key]: value.T.contiguous() for key, value in state.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stays", [A_KEY, B_KEY])
@pytest.mark.parametrize("method", ALWAYS)
@pytest.mark.parametrize("alphas", [(6, 6, 6), (6, 4, 10)])
def test_with_a_reference(method, stays, dtype, alphas):
    """Also where clients of other alphas hold B in their own scaling."""
    W = reference(dtype)
    states = clients(W, stays)
    if stays == B_KEY:
        states = [{**s, B_KEY: W[B_KEY] * (6 / alpha)} for s, alpha in zip(states, alphas, strict=True)]
    configs = [{"r": RANK, "lora_alpha": alpha} for alpha in alphas]
    given = {"configs": configs, "reference_config": {"r": RANK, "lora_alpha": 6}, "as_reference": True}
    merged, report = merge(states, W, method, server_lr=0.5, **given)
    assert torch.equal(merged[stays], W[stays])
    ref = [
        oracle.product(state[B_KEY] if stays == B_KEY else W[B_KEY] * (6 / alpha), W[A_KEY], alpha / RANK)
        for state, alpha in zip(states, alphas, strict=True)
    ]
    deltas = [dense(s, alpha / RANK) - r for s, alpha, r in zip(states, alphas, ref, strict=True)]
    weights = torch.tensor(report.layers[0].weights, dtype=torch.float64)
    factor = 3 if method in ("task-arithmetic", "knots-ta") else 1
    change = factor * sum(w * delta for w, delta in zip(weights, deltas, strict=True))
    expected = dense(W, 2.0) + 0.5 * change
    assert oracle.relative_error(dense(merged, 2.0), expected) <= max(4 * torch.finfo(dtype).eps, 1e-12)
    assert report.layers[0].energy_dropped <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stays", [A_KEY, B_KEY])
@pytest.mark.parametrize("method", ALWAYS)
@pytest.mark.parametrize("scaled", [False, True])
def test_of_adapters_that_share_a_factor(method, stays, dtype, scaled):
    """Without a reference, as FFA-LoRA's clients are merged from their folders."""
    states = clients(reference(dtype), stays)
    configs = [{"r": RANK, "lora_alpha": alpha} for alpha in (6, 3, 12)] if scaled else None
    merged, report = merge(states, method=method, configs=configs)
    assert torch.equal(merged[stays], states[0][stays])
    weights = report.layers[0].weights
    factor = 3 if method in ("task-arithmetic", "knots-ta") else 1
    scalings = [2.0, 1.0, 4.0] if scaled else [1.0] * 3
    expected = factor * sum(w * dense(s, c) for w, s, c in zip(weights, states, scalings, strict=True))
    assert oracle.relative_error(merged_product(merged, report), expected) <= max(4 * torch.finfo(dtype).eps, 1e-12)


@pytest.mark.parametrize("stays", [A_KEY, B_KEY])
@pytest.mark.parametrize("method", WHERE_IT_LIES_THERE)
@pytest.mark.parametrize("with_reference", [False, True])
def test_other_methods_keep_it_where_their_result_lies_in_its_span(method, stays, with_reference):
    """As that of identical clients does, of whom every entry is kept."""
    W = reference(torch.float64)
    [state] = clients(W, stays, n=1)
    given = {"reference": W, "as_reference": True} if with_reference else {}
    merged, _ = merge([state, state], method=method, **given, **WHERE_IT_LIES_THERE[method])
    kept = stays if with_reference else A_KEY  # identical clients share both factors: A stays
    assert torch.equal(merged[kept], state[kept])
    factor = 2 if method == "dare" else 1
    start = dense(W) if with_reference else torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    assert oracle.relative_error(dense(merged), start + factor * (dense(state) - start)) <= 1e-12
    # trimmed, it does not lie there, and both factors are solved for
    trimmed, _ = merge(clients(W, stays), method="ties", density=0.3, **given)
    assert not torch.equal(trimmed[stays], W[stays])


@pytest.mark.parametrize("stays", [A_KEY, B_KEY])
def test_of_an_embedding(stays):
    W = reference(torch.float32)
    states = [as_embedding(state) for state in clients(W, stays)]
    merged, _ = merge(states, as_embedding(W), as_reference=True)
    assert torch.equal(merged[EMBEDDING[stays]], as_embedding(W)[EMBEDDING[stays]])


def test_a_fresh_B_of_zeros_does_not_hold_A_back():
    """Of B = 0, A = B^+ T would be zero, and dead: without a reference both are solved for; with one A stays W's."""
    W = reference(torch.float32)
    W[B_KEY] = torch.zeros_like(W[B_KEY])
    states = clients(W, B_KEY)
    merged, _ = merge(states)
    assert torch.linalg.matrix_rank(merged[A_KEY]) == RANK and not merged[B_KEY].any()
    merged, _ = merge(states, W, as_reference=True)
    assert torch.linalg.matrix_rank(merged[A_KEY]) == RANK and not merged[B_KEY].any()


def test_a_smaller_rank_changes_both():
    W = reference(torch.float64)
    for stays in (A_KEY, B_KEY):
        merged, report = merge(clients(W, stays), W, as_reference=True, rank=2)
        assert not torch.equal(merged[stays], W[stays]) and report.layers[0].rank_out == 2


def test_one_client_that_changed_it_changes_both():
    W = reference(torch.float64)
    for stays in (A_KEY, B_KEY):
        states: list[dict[str, Tensor]] = clients(W, stays)
        states[1][stays] = states[1][stays] * (1 + 2.0**-40)
        merged, _ = merge(states, W, as_reference=True)
        assert not torch.equal(merged[stays], W[stays])
