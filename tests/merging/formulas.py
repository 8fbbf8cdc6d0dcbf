"""The update of each method by its formula, written from the papers on dense float64 matrices."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume
from torch import Tensor

from tests.merging import oracle
from tests.merging.samples import (
    TENSOR,
    Case,
    adapter_cases,
    tensor_cases,
)


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
    {"method": "from", "k": -1.0, "examples_power": 0.5},
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
    {"method": "core-dare-ties", "density": 0.5},
]


# by formula in test_spectral.py: what is rounding, and what ties, has to be told apart
SPECTRAL = [
    {"method": "tsv", "coefficient": 0.7},
    {"method": "tsv", "examples_power": 1.0},
    {"method": "iso", "coefficient": 1.5, "examples_power": 0.5},
    {"method": "iso-cts"},
    {"method": "iso-cts", "common_space_fraction": 0.4, "coefficient": -0.7},
    {"method": "core-ties", "density": 0.4},
    {"method": "core-ties", "density": 0.3, "majority": "frequency", "examples_power": 0.5},
]


PRODUCTS = [
    *FORMULAS,
    {"method": "from", "k": 1.0},
    {"method": "from", "k": -1.0, "scope": "model"},
    {"method": "from", "k": math.inf, "scope": "model"},
    {"method": "ties", "density": 0.4, "scope": "model"},
    {"method": "lorm", "off_diagonal": 0.5},
    *SPECTRAL,
    {"method": "knots-ties", "density": 0.4, "convention": "released"},
    {"method": "svc"},
    {"method": "actmat", "rho": 1.0},
    {"method": "svc", "inner": "dare-from", "floor": 0.5},
    {"method": "ctm"},
    {"method": "ctm", "inner": "from", "inner_options": {"k": 0.5}, "beta": 0.0},
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
    size, mean = float(change.norm()), sum(case.layer.norms) / len(w)
    scale = size if size > 1e-9 * mean else 0.0
    if layer.is_update:
        assert layer.size_ratio == pytest.approx(size / mean if mean else 0.0, rel=1e-6, abs=1e-9)
        for cosine, delta, norm in zip(layer.cosines_merged, case.layer.deltas, case.layer.norms, strict=True):
            expected = float((change * delta).sum()) / (norm * scale) if norm * scale else 0.0
            assert not scale or cosine == pytest.approx(expected, abs=1e-6)  # small updates of a large W lose digits
    if report.method["name"] in ("FroM", "Average"):
        assert 0 <= layer.interference <= 1 + 1e-12
