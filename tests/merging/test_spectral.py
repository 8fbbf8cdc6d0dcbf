"""TSV-M, Iso-C and Iso-CTS against the papers on dense float64 matrices, and what is true of all spectral methods."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, currently_in_test_context, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedfrom import merge
from fedfrom.merging.linalg.directions import polar, triplets
from fedfrom.merging.linalg.rounding import rank_tolerance
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
    generator,
    merged_product,
    normal,
    tensor_case,
    tensor_cases,
)

ISO = [{"method": "iso"}, {"method": "iso-cts"}, {"method": "iso-cts", "common_space_fraction": 0.3}]
SPECTRAL = [{"method": "tsv"}, *ISO]
EVERY = [*SPECTRAL, {"method": "core-ties", "density": 0.4}, {"method": "core-dare-ties", "density": 0.5}]
EVERY += [{"method": "ctm"}]  # at a rank that cuts: test_ctm.py
# factors in float32 or less are exact here, results are rounded to the dtype
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}


def label(options: dict[str, Any]) -> str:
    return "-".join(map(str, options.values()))


every = pytest.mark.parametrize("options", EVERY, ids=label)


# --- The papers, in full matrices -------------------------------------------------------------------------------------


def known(condition: bool) -> None:
    """Rejects a drawn case whose result rounding decides; one that was chosen has none."""
    assume(condition) if currently_in_test_context() else pytest.fail("choose another seed") if not condition else None


def numerical_rank(S: Tensor) -> int:
    """Singular values are rounding, or above 1e-3 of the largest: in between accuracy is not promised."""
    rank = int((1e-9 * S[0] < S).sum())
    known(rank == 0 or float(S[rank - 1]) >= 1e-3 * float(S[0]))
    return rank


def apart(S: Tensor, k: int) -> None:
    known(k >= len(S) or k == 0 or float(S[k]) < 0.99 * float(S[k - 1]) or float(S[k]) < 1e-9 * float(S[0]))


def nearest(X: Tensor) -> Tensor:
    """P Q^T of the SVD of X, over its numerical rank."""
    P, S, Qh = torch.linalg.svd(X, full_matrices=False)
    rank = numerical_rank(S)
    return P[:, :rank] @ Qh[:rank]


def tsv(thetas: list[Tensor]) -> Tensor:
    """Algorithm 1 of 2412.00081 with numerical ranks."""
    k, parts = max(1, min(thetas[0].shape) // len(thetas)), []
    for theta in thetas:
        U, S, Vh = torch.linalg.svd(theta, full_matrices=False)
        kept = min(k, numerical_rank(S))
        apart(S, kept)
        parts.append((U[:, :kept], S[:kept], Vh[:kept]))
    U, S, Vh = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])
    return nearest(U) @ torch.diag(S) @ nearest(Vh)


def iso(thetas: list[Tensor]) -> Tensor:
    """Algorithm 1 of 2502.04959, its mean over the numerical rank."""
    U, S, Vh = torch.linalg.svd(sum(thetas), full_matrices=False)
    rank = numerical_rank(S)
    return S[:rank].mean() * U[:, :rank] @ Vh[:rank]


def iso_cts(thetas: list[Tensor], fraction: float) -> Tensor:
    """Algorithm 2 of 2502.04959: projection on the left, sizes of the subspaces as the released code rounds them."""
    T = len(thetas)
    U, S, Vh = torch.linalg.svd(sum(thetas), full_matrices=False)
    r = numerical_rank(S)
    s = min(r // T, round((r - int(r * fraction)) / T))
    k = r - T * s
    apart(S, k)
    left, values, right = [U[:, :k]], [S[:k]], [Vh[:k]]
    for theta in thetas:
        own, sizes, rows = torch.linalg.svd(theta - U[:, :k] @ U[:, :k].T @ theta, full_matrices=False)
        found = min(s, int((sizes > 1e-9 * torch.linalg.matrix_norm(theta, 2)).sum()))
        if s:
            apart(sizes, found)
            known(found == 0 or float(sizes[found - 1]) >= 1e-3 * float(torch.linalg.matrix_norm(theta, 2)))
        left, values, right = [*left, own[:, :found]], [*values, sizes[:found]], [*right, rows[:found]]
    return torch.cat(values).mean() * nearest(torch.cat(left, 1)) @ nearest(torch.cat(right))


def update(thetas: list[Tensor], options: dict[str, Any]) -> Tensor:
    thetas = [theta for theta in thetas if theta.any()]
    formula = {"tsv": tsv, "iso": iso}.get(options["method"])
    return formula(thetas) if formula else iso_cts(thetas, options.get("common_space_fraction", 0.8))


def whole(case: Case) -> Case:
    """The case at a rank that holds any result."""
    return replace(case, rank=None if TENSOR in case.states[0] else min(case.layer.W.shape))


def assert_is(case: Case, options: dict[str, Any], change: Tensor, limit: float) -> None:
    T = case.layer.W.double() + case.server_lr * change
    size = float(case.layer.W.double().norm() + change.norm())
    assert oracle.relative_error(properties.result(case, **options), T, size) <= limit


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("options", SPECTRAL, ids=label)
@given(st.integers(0, 10**6), st.integers(1, 5), st.sampled_from(["fresh", "trained", "cut", "configs"]))
@settings(max_examples=25)
def test_adapters_by_formula(options, dtype, seed, n, start):
    """Ranks and alphas of their own, parts of the reference sent, server_lr 0.5."""
    case = adapter_case(seed, d_out=17, d_in=21, n=n, dtype=dtype, start=start, out=17, server_lr=0.5)
    assert_is(case, options, update(case.layer.deltas, options), LIMITS[dtype])


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("options", SPECTRAL, ids=label)
@pytest.mark.parametrize("shape", [(20, 13), (13, 20), (6, 40), (12, 12), (1, 5)])
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_matrices_by_formula(options, dtype, shape, n):
    case = tensor_case(17, shape=shape, n=n, dtype=dtype, size=1e-3, moved=1.0, server_lr=0.5)
    assert_is(case, options, update(case.layer.deltas, options), LIMITS[dtype])


@pytest.mark.parametrize("options", SPECTRAL, ids=label)
def test_the_coefficient_and_the_weights_multiply(options):
    for case in (
        whole(adapter_case(3, d_out=30, d_in=24, examples=True)),
        tensor_case(3, shape=(9, 12), examples=True),
    ):
        case = replace(case, weights=[0.3, 2.0, 1.0])
        share = torch.tensor(case.examples, dtype=torch.float64)
        scales = torch.tensor(case.weights, dtype=torch.float64) * share / share.mean()
        thetas = [float(scale) * theta for scale, theta in zip(scales, case.layer.deltas, strict=True)]
        for coefficient in (-0.7, 1.5):
            given_options = {**options, "coefficient": coefficient, "examples_power": 1.0}
            assert_is(case, given_options, coefficient * update(thetas, options), 1e-10)
        assert_is(case, {**options, "coefficient": 0.0}, 0 * thetas[0], 1e-14)


# --- What is true of all of them --------------------------------------------------------------------------------------


@every
@given(adapter_cases(n=3, start="trained") | tensor_cases(n=3, shape=(7, 5)))
@settings(max_examples=10)
def test_one_more_client_that_trained_nothing_changes_nothing(options, case):
    case = whole(case)
    idle = {key: value.clone() for key, value in case.reference.items()}
    examples = None if case.examples is None else [*case.examples, 7]
    layer = oracle.Layer([*case.layer.sent, case.layer.W], [case.layer.W] * 4, case.layer.W)
    more = replace(case, states=[*case.states, idle], layer=layer, examples=examples)
    if options["method"] == "core-dare-ties":  # its draws go by the clients' places
        options = {**options, "density": 1.0}
    expected = properties.result(case, **options)
    size = float(case.layer.W.norm() + expected.norm())
    assert oracle.relative_error(properties.result(more, **options), expected, size) <= 1e-10


@pytest.mark.parametrize("options", SPECTRAL, ids=label)
@given(adapter_cases(n=3) | tensor_cases(n=3, shape=(7, 5)))
@settings(max_examples=10)
def test_weight_0_is_left_out(options, case):
    case = replace(whole(case), weights=[0.3, 1.0, 2.0])
    assume(max(case.permuted([0, 2]).layer.norms) > 0)
    properties.assert_weight_0_is_left_out(case, 1, 1e-10, **options)


@every
@given(adapter_cases(n=3) | tensor_cases(n=3, shape=(7, 5)))
@settings(max_examples=8)
def test_weights_in_common_are_a_coefficient(options, case):
    case = whole(case)
    doubled, _ = properties.run(case, **{**options, "coefficient": 2.0})
    found, _ = properties.run(replace(case, weights=[2.0] * 3), **options)
    # with the bits of the sums, but not of their scales
    for key, value in doubled.items():
        assert oracle.relative_error(found[key], value) <= 1e-9


@every
def test_exact_on_cores(options):
    """f(P M Q^T) = P f(M) Q^T, P and Q tall: two directions each of three clients, as many as TSV-M keeps at 6 x 8."""
    g = generator(4)
    cores = [normal(8, 2, g=g) @ normal(2, 6, g=g) for _ in range(3)]
    P, Q = (torch.linalg.qr(normal(*shape, g=g)).Q for shape in ((40, 8), (30, 6)))

    def merged(matrices: list[Tensor]) -> Tensor:
        zeros = {"w": torch.zeros_like(matrices[0])}
        return merge([{"w": M} for M in matrices], zeros, **options)[0]["w"]

    found, expected = merged([P @ M @ Q.T for M in cores]), P @ merged(cores) @ Q.T
    assert oracle.relative_error(found, expected) <= 1e-10


@every
@pytest.mark.parametrize("start", ["fresh", "trained", "configs"])
@pytest.mark.parametrize("shape", [(30, 24), (200, 150)])
def test_a_lora_module_is_merged_as_its_dense_matrix(options, start, shape):
    """Also where few columns of a wide stack are looked at: see `triplets`."""
    case = whole(adapter_case(5, d_out=shape[0], d_in=shape[1], n=6, r=3, start=start))
    # under the module's name, by which DARE draws
    dense, _ = merge([{MODULE: theta} for theta in case.layer.deltas], {MODULE: 0 * case.layer.W}, **options)
    assert_is(case, options, dense[MODULE], 1e-9)


@every
def test_neither_gauge_nor_alpha_matters(options):
    """The same products by other factors: B G, G^-1 A, of other alphas; 3 singular values apart."""
    g, case = generator(6), adapter_case(6, d_out=30, d_in=24, n=4, r=3)
    alphas, states = (3, 12, 6, 1), []
    for state, alpha in zip(case.states, alphas, strict=True):
        G = normal(3, 3, g=g)
        states.append({A_KEY: torch.linalg.solve(G, state[A_KEY]), B_KEY: state[B_KEY] @ G * (3 / alpha)})
    configs = [{"r": 3, "lora_alpha": alpha} for alpha in alphas]
    merged, report = merge(states, configs=configs, rank=24, **options)
    expected = properties.result(replace(case, rank=24), **options)
    assert oracle.relative_error(merged_product(merged, report), expected) <= 1e-9


@every
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_of_more_than_32_clients(options, dtype):
    """More triplets than the smaller side has rows; as running clients load them; order changes no bit."""
    case = adapter_case(8, d_out=40, d_in=20, n=36, r=2, start="trained", dtype=dtype, moved=0.1, idle=2)
    arguments = {"reference": case.reference, "as_reference": True, **options}
    merged, _ = merge(case.states, **arguments)
    moved, _ = merge(case.states[::-1], **arguments)
    assert all(torch.equal(merged[key], moved[key]) and torch.isfinite(merged[key]).all() for key in merged)
    assert {key: (value.shape, value.dtype) for key, value in merged.items()} == {
        key: (value.shape, dtype) for key, value in case.reference.items()
    }


# --- What is rounding -------------------------------------------------------------------------------------------------


def copies(dtype: torch.dtype, off: float, least: float, n: int = 4, r: int = 8) -> list[dict[str, Tensor]]:
    """n adapters (80, 60) that are one but for relative noise of that many epsilons; singular values 1 to `least`."""
    g = generator(9)
    # half of the singular values on each side, and mixed: else the noise of a small direction is as small
    half, mixed = torch.logspace(0, math.log10(least) / 2, r, dtype=torch.float64), torch.linalg.qr(normal(r, r, g=g)).Q
    A, B = mixed.T @ (half[:, None] * normal(r, 60, g=g)), normal(80, r, g=g) * half @ mixed
    eps = off * torch.finfo(dtype).eps
    return [
        {key: (X * (1 + eps * normal(*X.shape, g=g))).to(dtype) for key, X in ((A_KEY, A), (B_KEY, B))}
        for _ in range(n)
    ]


def dense(state: dict[str, Tensor]) -> Tensor:
    return oracle.product(state[B_KEY], state[A_KEY])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("off", [0.0, 1.0])
def test_tsv_of_one_adapter_but_for_rounding_is_that_adapter(dtype, off):
    """Singular vectors of the smallest turn by 30 epsilons: noise that a cut at 2 would take for directions."""
    states = copies(dtype, off, 1e-3)
    merged, _ = merge(states, method="tsv", rank=60)
    mean = sum(map(dense, states)) / len(states)
    assert oracle.relative_error(dense(merged), mean) <= max(2 * torch.finfo(dtype).eps, 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tsv_of_one_matrix_of_low_rank_is_that_matrix(dtype):
    """Rounding to the dtype has given it its full rank: 5 of 20 triplets of each of 4 copies are kept."""
    g = generator(16)
    theta = (normal(30, 3, g=g) @ normal(3, 20, g=g)).to(dtype)
    merged, _ = merge([{"w": theta}] * 4, {"w": torch.zeros_like(theta)}, method="tsv")
    assert oracle.relative_error(merged["w"], theta) <= max(torch.finfo(dtype).eps, 1e-12)
    equal, _ = merge([{"w": theta}] * 4, {"w": torch.zeros_like(theta)}, method="iso")
    assert torch.linalg.matrix_rank(equal["w"].double(), rtol=0.5) == 3


@pytest.mark.parametrize("options", ISO[:2], ids=label)
@pytest.mark.parametrize("dtype", DTYPES)
def test_iso_of_one_adapter_but_for_rounding_has_its_rank(options, dtype):
    states = copies(dtype, 0.25, 0.1)
    merged, _ = merge(states, rank=60, **options)
    S = torch.linalg.svdvals(dense(merged))
    mean = torch.linalg.svdvals(sum(map(dense, states)))[:8].mean()
    within = max(10 * torch.finfo(dtype).eps, 1e-9)
    assert float((S[:8] / mean - 1).abs().max()) <= within and float(S[8] / S[0]) <= within
    exactly, _ = merge([states[0]] * 4, rank=60, method="iso")
    assert oracle.relative_error(dense(merged), dense(exactly)) <= 20 * within


@pytest.mark.parametrize("options", SPECTRAL, ids=label)
@pytest.mark.parametrize("noise", [1e-12, 1e-8, 1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("r", [1, 3, 20])
def test_near_identical_and_rank_deficient_inputs_stay_bounded(options, noise, r):
    """TSV-M by sqrt(T) times the largest norm, Iso by T times, since its coefficient 1 is that of the sum."""
    g = generator(10)
    theta = normal(30, r, g=g) @ normal(r, 20, g=g)
    near = [theta + noise * theta.norm() / 25 * normal(30, 20, g=g) for _ in range(5)]
    for dtype in (torch.float32, torch.float64):
        states = [{"w": each.to(dtype)} for each in near]
        merged, _ = merge(states, {"w": torch.zeros(30, 20, dtype=dtype)}, **options)
        bound = math.sqrt(5) if options["method"] == "tsv" else 5
        assert float(merged["w"].norm()) <= bound * max(float(each.norm()) for each in near) * (1 + 1e-5)


def test_polar_leaves_out_what_rounding_made_of_a_shared_direction():
    """Two vectors, one off by 1e-9: one direction within 1e-6, two within 1e-12; orthonormal where it can be."""
    g = generator(11)
    X = torch.linalg.qr(normal(9, 3, g=g)).Q
    pair = torch.stack([X[:, 0], X[:, 0] + 1e-9 * X[:, 1]], dim=1)
    ones = torch.ones(2, dtype=torch.float64)
    S = torch.linalg.svdvals(polar(pair, ones, 1e-6))
    assert S.tolist() == pytest.approx([1, 0], abs=1e-12)
    assert torch.linalg.svdvals(polar(pair, ones, 1e-12)).tolist() == pytest.approx([1, 1], abs=1e-6)
    # of a vector whose share is 1e-5 rounding that is 1e-9 of the matrix is 1e-4
    turned = torch.stack([X[:, 0], X[:, 0], X[:, 1], X[:, 1] + 1e-4 * X[:, 2]], dim=1)
    shares = torch.tensor([1.0, 1.0, 1e-5, 1e-5], dtype=torch.float64)
    assert torch.linalg.svdvals(polar(turned, shares, 1e-8)).tolist() == pytest.approx([1, 1, 0, 0], abs=1e-12)
    assert torch.linalg.svdvals(polar(turned, shares, 1e-12)).tolist() == pytest.approx([1, 1, 1, 0], abs=1e-9)
    columns = normal(9, 5, g=g)
    found = polar(columns, torch.ones(5, dtype=torch.float64), 1e-12)
    assert torch.allclose(found.T @ found, torch.eye(5, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(found, nearest(columns), atol=1e-12)


def test_triplets_of_a_low_rank_are_those_of_the_svd():
    g = generator(12)
    M = normal(150, 3, g=g) * torch.tensor([1.0, 1e-2, 1e-3]) @ normal(3, 120, g=g)
    for bound in (None, 3, 7):
        U, S, Vh = triplets(M, rank_tolerance(torch.float64), bound)
        assert len(S) == 3 and oracle.relative_error(U @ torch.diag(S) @ Vh, M) <= 1e-13
        assert torch.allclose(S, torch.linalg.svdvals(M)[:3], rtol=1e-11)
        assert torch.allclose(U.T @ U, torch.eye(3, dtype=torch.float64), atol=1e-12)
    assert len(triplets(0 * M, 0.0).S) == 0


@pytest.mark.parametrize("options", ISO[:2], ids=label)
def test_a_cut_to_the_rank_keeps_the_leading_directions_of_the_sum(options):
    """All singular values are equal: which stay would be left to rounding. Iso-CTS turns those on the right."""
    case = adapter_case(13, d_out=30, d_in=24, n=4, r=3)
    U, S, Vh = torch.linalg.svd(sum(case.layer.deltas), full_matrices=False)
    merged, report = merge(case.states, rank=3, **options)
    found = dense(merged)
    level = torch.linalg.svdvals(properties.result(replace(case, rank=24), **options))[0]
    assert oracle.relative_error(U[:, :3] @ U[:, :3].T @ found, found) <= 1e-3
    assert torch.allclose(torch.linalg.svdvals(found)[:3], level.repeat(3), rtol=1e-9)
    if options["method"] == "iso":
        assert oracle.relative_error(found, level * U[:, :3] @ Vh[:3]) <= 1e-3
    assert report.layers[0].energy_dropped == pytest.approx(1 - 3 / 12, abs=0.1)


# --- What is averaged -------------------------------------------------------------------------------------------------

LINEAR = ["w", "classifier.weight", "lm_head.weight", "embed_out.weight", "embedding_hidden_mapping_in.weight"]
TABLES = [
    "bert.embeddings.word_embeddings.weight",
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "transformer.wpe.weight",
    "shared.weight",
    "decoder.embed_positions.weight",
    "vision.embeddings.position_embedding.weight",
    "positional_embedding",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
]


@every
def test_embeddings_and_what_is_no_matrix_are_averaged(options):
    g = generator(14)
    shapes = dict.fromkeys((*LINEAR, *TABLES), (6, 8)) | {"norm": (7,), "conv": (4, 3, 2, 2), "scale": ()}
    reference = {name: normal(*shape, g=g) for name, shape in shapes.items()}
    states = [{name: W + normal(*W.shape, g=g) for name, W in reference.items()} for _ in range(3)]
    merged, _ = merge(states, reference, coefficient=1.5, weights=[4, 1, 1], **options)
    for name, W in reference.items():
        mean = W + 1.5 * sum(w * (state[name] - W) for w, state in zip((4, 1, 1), states, strict=True)) / 6
        assert (oracle.relative_error(merged[name], mean) <= 1e-12) == (name not in LINEAR), name


@every
def test_lora_on_an_embedding_is_averaged(options):
    g, module = generator(15), "base_model.model.wte"
    states = [
        {f"{module}.lora_embedding_A": normal(2, 20, g=g), f"{module}.lora_embedding_B": normal(9, 2, g=g)}
        for _ in range(3)
    ]
    merged, _ = merge(states, rank=6, **options)
    expected, _ = merge(states, rank=6, method="average")
    assert all(torch.allclose(merged[key], expected[key], atol=1e-12) for key in expected)
