"""Rounding is no update: what clients of other alphas, re-saved adapters and singular Gram matrices leave of it."""

import pytest
import torch
from torch import Tensor

from fedfrom import merge, methods
from fedfrom.merging.clipping import clip_factors
from fedfrom.merging.linalg.rounding import is_rounding
from tests.merging import oracle
from tests.merging.samples import A_KEY, B_KEY, MODULE, State, dense, generator, merged_product, normal

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NEEDS_MORE = {"regmean", "lorm", "fisher", "greedy-soup"}  # statistics, or a function that scores
ON_PRODUCTS = [name for name in methods() if name not in NEEDS_MORE and name != "factor-average"]
BIAS = B_KEY.removesuffix("weight") + "bias"
RANK, ALPHA, OTHER = 8, 16.0, 12.0


def config(lora_alpha: float, r: int = RANK) -> dict[str, float]:
    return {"r": r, "lora_alpha": lora_alpha}


def start(dtype: torch.dtype, seed: int = 0, r: int = RANK) -> State:
    g = generator(seed)
    return {A_KEY: normal(r, 24, g=g, dtype=dtype), B_KEY: normal(32, r, g=g, dtype=dtype)}


def trained(W: State, seed: int, size: float = 0.1) -> State:
    g = generator(100 + seed)
    return {key: value + size * normal(*value.shape, g=g, dtype=value.dtype) for key, value in W.items()}


def merge_round(states: list[State], W: State, alphas: list[float], method: str = "from", **options):
    """One round of FedFroM's: clipped, at the global adapter's rank and alpha."""
    options = {"k": 0.5, **options} if method == "from" else options
    configs = [config(alpha, len(state[A_KEY])) for alpha, state in zip(alphas, states, strict=True)]
    given = {"configs": configs, "reference_config": config(ALPHA, len(W[A_KEY]))}
    return merge(states, W, method, clip=1.0, as_reference=True, **given, **options)


def update(merged: State, W: State) -> Tensor:
    return dense(merged) - dense(W)


# --- Clients of other alphas -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ON_PRODUCTS)
def test_clients_of_another_alpha_that_train_nothing_change_nothing(method, dtype):
    """What client.load makes of W at their alpha is what their delta is taken from: it is zero to the bit."""
    W = start(dtype)
    heard = [trained(W, 0), trained(W, 1)]
    idle = {A_KEY: W[A_KEY], B_KEY: W[B_KEY] * (ALPHA / OTHER)}
    options = {"rho": 1.0} if method == "actmat" else {}  # rho = 0 refuses updates from one A
    merged, report = merge_round([*heard, idle, idle, idle], W, [ALPHA] * 2 + [OTHER] * 3, method, **options)
    expected, same = merge_round([*heard, W, W, W], W, [ALPHA] * 5, method, **options)
    [layer], [other] = report.layers, same.layers
    assert layer.norms[2:] == [0, 0, 0] and layer.norms == other.norms
    assert layer.clipped == other.clipped and layer.weights == other.weights
    assert min(layer.clipped) > 0.5  # the trained ones are clipped to their own median, not to rounding
    assert all(torch.equal(merged[key], expected[key]) for key in merged)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_delta_is_what_the_client_changed_of_what_it_loaded(dtype):
    W = start(dtype)
    loaded = {A_KEY: W[A_KEY], B_KEY: W[B_KEY] * (ALPHA / OTHER)}
    sent = trained(loaded, 0, size=0.01)
    _, report = merge([sent], W, configs=[config(OTHER)], reference_config=config(ALPHA), as_reference=True)
    expected = (dense(sent) - dense(loaded)) * OTHER / RANK
    assert report.layers[0].norms[0] == pytest.approx(float(expected.norm()), rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [ALPHA, OTHER])
def test_a_client_of_a_larger_rank_that_trains_nothing_has_a_delta_of_zero(dtype, alpha):
    """It holds what it was sent in its leading rows and columns, then rows of its own beside columns of zero."""
    W, own = start(dtype, r=4), start(dtype, seed=1)[A_KEY][4:]
    B = torch.cat([W[B_KEY] * (ALPHA / 4 / (alpha / RANK)), torch.zeros(32, 4, dtype=dtype)], dim=1)
    idle = {A_KEY: torch.cat([W[A_KEY], own]), B_KEY: B}
    _, report = merge_round([trained(W, 0), idle], W, [ALPHA, alpha])
    assert report.layers[0].norms[1] == 0
    moved = {**idle, B_KEY: B + torch.cat([torch.zeros(32, 4), torch.ones(32, 4)], dim=1).to(dtype)}
    _, report = merge_round([trained(W, 0), moved], W, [ALPHA, alpha])
    expected = oracle.product(moved[B_KEY][:, 4:], own, alpha / RANK)
    assert report.layers[0].norms[1] == pytest.approx(float(expected.norm()), rel=1e-9)


RESCALED = {  # A and B of W at OTHER, by ways that a client may go that does not use client.load
    "in float64": lambda A, B, ratio: (A, (B.double() * ratio).to(B.dtype)),
    "in two steps": lambda A, B, ratio: (A, B * ALPHA / OTHER),
    "on A": lambda A, B, ratio: (A * ratio, B),
    "on both": lambda A, B, ratio: (A * ratio**0.5, B * ratio**0.5),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", RESCALED)
def test_rescaling_by_the_clients_own_way_is_no_update(way, dtype):
    W = start(dtype)
    A, B = RESCALED[way](W[A_KEY], W[B_KEY], ALPHA / OTHER)
    idle = {A_KEY: A, B_KEY: B}
    _, report = merge_round([trained(W, 0), trained(W, 1), *[idle] * 3], W, [ALPHA] * 2 + [OTHER] * 3)
    assert report.layers[0].norms[2:] == [0, 0, 0] and min(report.layers[0].clipped) > 0.5
    # the same difference of a client that had nothing to rescale is what it says: an update
    noisy = {A_KEY: W[A_KEY], B_KEY: torch.nextafter(W[B_KEY], torch.full_like(W[B_KEY], torch.inf))}
    assert merge_round([trained(W, 0), noisy], W, [ALPHA] * 2)[1].layers[0].norms[1] > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.3, 1.0, 3.5])
def test_small_updates_of_rescaled_adapters_are_heard(size, dtype):
    """A step moves small entries as far as large ones, even where it is less than an epsilon of the whole."""
    W = start(dtype)
    loaded = {A_KEY: W[A_KEY], B_KEY: W[B_KEY] * (ALPHA / OTHER)}
    step = size * torch.finfo(dtype).eps * loaded[B_KEY].double().norm() / loaded[B_KEY].numel() ** 0.5
    signs = torch.sign(normal(32, RANK, g=generator(5)))
    sent = {**loaded, B_KEY: (loaded[B_KEY].double() + step * signs).to(dtype)}
    _, report = merge([sent], W, configs=[config(OTHER)], reference_config=config(ALPHA), as_reference=True)
    expected = (dense(sent) - dense(loaded)) * OTHER / RANK
    assert report.layers[0].norms[0] == pytest.approx(float(expected.norm()), rel=1e-9) and float(expected.norm()) > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_of", [lambda b: b * (ALPHA / OTHER), lambda b: (b.double() * ALPHA / OTHER).to(b.dtype)])
def test_a_bias_of_another_alpha_is_no_update(bias_of, dtype):
    W = {**start(dtype), BIAS: normal(32, g=generator(7), dtype=dtype)}
    idle = {A_KEY: W[A_KEY], B_KEY: W[B_KEY] * (ALPHA / OTHER), BIAS: bias_of(W[BIAS])}
    heard = [trained(W, 0), trained(W, 1)]
    merged, _ = merge_round([*heard, *[idle] * 3], W, [ALPHA] * 2 + [OTHER] * 3)
    expected, _ = merge_round([*heard, W, W, W], W, [ALPHA] * 5)
    assert torch.equal(merged[BIAS], expected[BIAS]) and not torch.equal(merged[BIAS], W[BIAS])


def test_rounding_is_at_most_an_epsilon_and_two_places():
    x = normal(1000, g=generator(0)).float()
    eps = torch.finfo(torch.float32).eps
    assert is_rounding(x, x.double()) and is_rounding(x * 3 / 3, x.double())
    assert is_rounding(x, x.double() * (1 + 0.9 * eps)) and not is_rounding(x, x.double() * (1 + 1.1 * eps))
    one = x.double()
    one[0] *= 1 + 3 * eps
    assert not is_rounding(x, one)  # little of the whole, but more than its own places
    tiny = torch.full((4,), 2.0**-149)
    assert is_rounding(tiny, torch.zeros(4).double()) == is_rounding(tiny * 0, tiny.double()) is False
    assert is_rounding(torch.zeros(4), torch.zeros(4).double())


# --- Clipping: negligible updates ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("learners, others", [(2, 2), (2, 3), (4, 6), (7, 13)])
def test_a_majority_that_hardly_moves_a_layer_does_not_clip_those_who_learn(learners, others, dtype):
    """Such as by weight decay without a gradient: all of them shrink B by a little."""
    W = start(dtype)
    share = max(1e-4, 2 * torch.finfo(dtype).eps)
    decayed = {**W, B_KEY: W[B_KEY] * (1 - share)}
    heard = [trained(W, i, size=200 * share) for i in range(learners)]
    _, report = merge_round([*heard, *[decayed] * others], W, [ALPHA] * (learners + others))
    [layer] = report.layers
    assert 0 < max(layer.norms[learners:]) < 0.01 * min(layer.norms[:learners])
    assert min(layer.clipped or [1.0]) > 0.5


@pytest.mark.parametrize("clients, attackers", [(3, 1), (4, 1), (7, 2), (10, 3), (20, 6)])
@pytest.mark.parametrize("scale", [10.0, 1e3, 1e9])
def test_a_minority_of_large_updates_is_bounded_by_the_others(clients, attackers, scale):
    honest = [1.0 + 0.1 * i for i in range(clients - attackers)]
    factors = clip_factors([*[scale] * attackers, *honest], 1.0)
    assert all(scale * factor <= max(honest) for factor in factors[:attackers])


def test_small_honest_updates_within_a_hundredth_count():
    """Attackers who send large updates can't have the honest ones left out of the median."""
    honest = [0.02, 0.1, 0.5, 1.0, 1.0, 1.0, 1.5]
    most = max(c * n for c, n in zip(clip_factors([*[1e6] * 3, *honest], 1.0), [*[1e6] * 3, *honest], strict=True))
    assert most <= 1.5


# --- Directions of rounding ------------------------------------------------------------------------------------------


def resaved(state: State) -> State:
    """The same adapter but for its last places: what a conversion and back leaves."""
    return {key: ((value * 3).to(value.dtype) / 3).to(value.dtype) for key, value in state.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", [name for name in ON_PRODUCTS if name.startswith("knots")])
def test_an_adapter_given_again_with_other_last_places_changes_knots_by_rounding(method, dtype):
    """A difference in the last places is no direction: its rows of V would take the place of others in the trimming."""
    states = [start(dtype, seed) for seed in range(2)]
    options = {"density": 0.4} if "ties" in method else {}
    again, _ = merge([*states, resaved(states[0])], method=method, rank=16, **options)
    same, _ = merge([*states, states[0]], method=method, rank=16, **options)
    assert not torch.equal(resaved(states[0])[B_KEY], states[0][B_KEY])
    # elections of a sign that are all but even may go the other way
    assert oracle.relative_error(dense(again), dense(same)) <= 20 * torch.finfo(dtype).eps


# --- Gram matrices of few inputs -------------------------------------------------------------------------------------


def few_inputs(dtype: torch.dtype, inputs: int, seed: int) -> Tensor:
    """A (24, 24) Gram matrix of fewer inputs than columns, as a client computes and sends it."""
    X = normal(inputs, 24, g=generator(seed), dtype=torch.promote_types(dtype, torch.float32))
    return (X.T @ X / inputs).to(dtype)


@pytest.mark.parametrize("gram_dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("method", ["regmean", "lorm"])
@pytest.mark.parametrize("kind", ["adapter", "tensor"])
def test_gram_matrices_of_few_inputs_do_not_blow_up_the_update(kind, method, gram_dtype):
    """Eigenvalues that are rounding in the dtype of the matrices are zero, and are not inverted."""
    grams = [few_inputs(gram_dtype, 5, seed) for seed in range(3)]
    states = [start(torch.float32, seed) for seed in range(3)]
    statistics = [{MODULE: gram} for gram in grams]
    if kind == "tensor":
        states = [{f"{MODULE}.weight": dense(state).float()} for state in states]
    merged, report = merge(states, method=method, off_diagonal=1.0, statistics=statistics)
    deltas = [dense(state) if kind == "adapter" else state[f"{MODULE}.weight"].double() for state in states]
    found = merged_product(merged, report) if kind == "adapter" else merged[f"{MODULE}.weight"].double()
    assert found.norm() <= 2 * max(delta.norm() for delta in deltas)
    if method == "regmean" and kind == "tensor":
        total = sum(gram.double() for gram in grams)
        inverse = torch.linalg.pinv(total, rtol=4 * torch.finfo(gram_dtype).eps, hermitian=True)
        expected = sum(delta @ gram.double() for delta, gram in zip(deltas, grams, strict=True)) @ inverse
        # rounding is told on features of length 1: that leaves out other directions, by less than they are off
        assert oracle.relative_error(found, expected) <= max(1e-5, torch.finfo(gram_dtype).eps)


@pytest.mark.parametrize("gram_dtype, outlier", [(torch.float32, 1e4), (torch.bfloat16, 30.0)])
@pytest.mark.parametrize("method, off_diagonal", [("lorm", 0.9), ("lorm", 1.0), ("regmean", 1.0)])
def test_a_feature_that_is_far_larger_does_not_make_the_others_rounding(method, off_diagonal, gram_dtype, outlier):
    """As large language models have them. Another one is there twice, so that the matrix has no inverse."""
    W = start(torch.float32)
    states = [trained(W, seed) for seed in range(3)]

    def merged_with(dtype: torch.dtype) -> Tensor:
        statistics = []
        for seed in range(3):
            X = normal(2000, 24, g=generator(seed))
            X[:, 0] *= outlier
            X[:, 2] = X[:, 1]
            statistics.append({MODULE: (X.T @ X / 2000).to(dtype)})
        merged, _ = merge(states, W, method, off_diagonal=off_diagonal, statistics=statistics, as_reference=True)
        return update(merged, W)

    expected = merged_with(torch.float64)
    assert oracle.relative_error(merged_with(gram_dtype), expected) <= 0.05


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_what_a_state_is_widened_to_is_not_what_it_came_in(wide):
    """As a command does that is asked for a wider result: last places of bfloat16 stay last places."""

    class Widened(dict[str, Tensor]):
        def stored_dtype(self, key: str) -> torch.dtype:
            return torch.bfloat16

    states = [start(torch.bfloat16, seed) for seed in range(2)]
    again = resaved(states[0])
    found, expected = (
        merge([Widened({k: v.to(wide) for k, v in s.items()}) for s in (*states, third)], method="knots-ties", rank=16)
        for third in (again, states[0])
    )
    assert oracle.relative_error(dense(found[0]), dense(expected[0])) <= 20 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_small_inputs_count_where_off_diagonals_are_shrunk(dtype):
    """Channels of very unequal size, as after a LayerNorm: none is taken for rounding, but one without inputs."""
    X = normal(40, 24, g=generator(0)) * torch.logspace(0, -5, 24, dtype=torch.float64)
    X[:, 3] = 0
    G = (X.T @ X / 40).to(dtype)
    states = [{f"{MODULE}.weight": normal(8, 24, g=generator(seed))} for seed in range(2)]
    merged, _ = merge(states, method="regmean", off_diagonal=0.9, statistics=[{MODULE: G}, {MODULE: G}])
    expected = (states[0][f"{MODULE}.weight"] + states[1][f"{MODULE}.weight"]) / 2  # one metric for both
    expected[:, 3] = 0
    assert oracle.relative_error(merged[f"{MODULE}.weight"], expected) <= 1e-9
