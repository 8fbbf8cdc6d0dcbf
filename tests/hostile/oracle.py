"""The oracle of what is accepted: dense, float64, straight from the equations."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ConfigRecord

from tests.hostile.values import PREFIX
from tests.models import Arrays, Scaling, factors, modules_of, truncated


def scaling_of(config: Mapping[str, Any]) -> Scaling:
    """Return what gives a module's scaling, as PEFT does: the first pattern that matches the end of its path."""

    def of(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
        name = module.removeprefix(PREFIX)
        return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", name)), default)

    def scaling(module: str) -> float:
        r = of(config.get("rank_pattern") or {}, module, config["r"])
        alpha = of(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
        return alpha / (math.sqrt(r) if config.get("use_rslora") else r)

    return scaling


def config_of(record: ConfigRecord) -> dict[str, Any]:
    """Return the adapter config that a reply carries."""
    config = dict(record)
    return config | {field: json.loads(str(config[field])) for field in ("rank_pattern", "alpha_pattern")}


def dense(state: Arrays, scaling: Scaling, ranks: Mapping[str, int] | None = None) -> Arrays:
    """Return what a state stands for, float64: products for factors (of the leading ranks), s bias for a bias."""
    found = {}
    for module in modules_of(state):
        B, A = factors(state, module)
        r = None if ranks is None else ranks[module]
        found[module] = scaling(module) * B[:, :r] @ A[:r]
        if (key := f"{module}.lora_B.bias") in state:
            found[key] = scaling(module) * state[key].astype(np.float64)
    rest = {key: value.astype(np.float64) for key, value in state.items() if ".lora_" not in key}
    return found | rest


def assert_is_the_merge(
    merged: Arrays,
    sent: Arrays | None,
    replies: Sequence[Arrays],
    examples: Sequence[float],
    *,
    k: float = 1.0,
    p: float = 0.0,
    scope: str = "layer",
    server_lr: float = 1.0,
    clip: float | None = None,
    scaling: Scaling = lambda module: 1.0,
    scalings: Sequence[Scaling] | None = None,
    merged_scaling: Scaling | None = None,
    precision: tuple[float, float] | None = None,
) -> None:
    """Assert that a state is W + alpha sum_i w_i (W_i - ref_i) in every layer, and in adapters as near as rank allows.

    Parameters
    ----------
    merged : Arrays
        What was found.
    sent : Arrays | None
        W; None is zero, and then plain tensors are averaged.
    replies : Sequence[Arrays]
        W_i.
    examples, k, p, scope, server_lr, clip
        As for FroM and `merge`.
    scaling, scalings, merged_scaling : Scaling
        s of W, of the W_i and of what was merged.
    precision : tuple[float, float] | None (default: None)
        Of what was merged, its spacing at 1 and its smallest number, where the arrays given are wider.
    """
    scalings = [scaling] * len(replies) if scalings is None else scalings
    found = dense(merged, scaling if merged_scaling is None else merged_scaling)
    mine = [dense(state, own) for state, own in zip(replies, scalings, strict=True)]
    zero = {name: np.zeros_like(value) for name, value in mine[0].items()}
    W = zero if sent is None else dense(sent, scaling)
    received = [
        zero if sent is None else dense(sent, scaling, {m: factors(state, m)[1].shape[0] for m in modules_of(state)})
        for state in replies
    ]
    deltas = [{name: own[name] - ref[name] for name in W} for own, ref in zip(mine, received, strict=True)]
    norms = {name: np.array([np.linalg.norm(delta[name]) for delta in deltas]) for name in W}

    def is_update(name: str) -> bool:
        plain = name in replies[0]
        kept = plain and (replies[0][name].dtype.kind != "f" or (sent is None and ".lora_" not in name))
        return not (kept or name.endswith(("running_mean", "running_var")))

    for name in W:
        if clip is None or (sent is None and name in replies[0]):  # a value alone is no update
            continue
        shortened = _clipped(norms[name], clip)
        for delta, factor in zip(deltas, shortened, strict=True):
            delta[name] = delta[name] * factor
        norms[name] = norms[name] * shortened
    whole = np.sqrt(sum(norms[name] ** 2 for name in W if is_update(name) and ".lora_B.bias" not in name))
    for name, value in W.items():
        if name in replies[0] and replies[0][name].dtype.kind != "f":
            expected = value if sent is not None else np.max([own[name] for own in mine], axis=0)
            assert np.array_equal(found[name], expected), name
            continue
        size = whole if scope == "model" else norms[name.removesuffix(".lora_B.bias")]
        weights = _weights(size, k if is_update(name) else 0.0, examples, p)
        # Terms may cancel: rounding is relative to them, in the precision that the sums run in.
        terms = [np.linalg.norm(own[name]) + np.linalg.norm(ref[name]) for own, ref in zip(mine, received, strict=True)]
        change = sum(w * delta[name] for w, delta in zip(weights, deltas, strict=True))
        T = value + (server_lr if is_update(name) else 1.0) * change
        eps, smallest = precision or _precision(merged, name)
        limit = 20 * eps * (np.linalg.norm(T) + float(weights @ np.array(terms))) + 10 * smallest * T.size
        best = 0.0
        if name not in merged:
            rank = min(factors(merged, name)[1].shape[0], *T.shape)
            best = float(np.linalg.norm(T - truncated(T, rank)))
        error = float(np.linalg.norm(found[name] - T))
        assert error <= best * (1 + 1e-6) + limit, f"{name}: {error:g} off, the best is {best:g}, limit {limit:g}"


def _precision(state: Arrays, name: str) -> tuple[float, float]:
    """Return the spacing at 1, and the smallest number, of a tensor's or a module's dtype."""
    dtype = next(np.finfo(v.dtype) for k, v in state.items() if k == name or k.startswith(f"{name}.lora_"))
    return float(dtype.eps), float(dtype.smallest_subnormal)


def _clipped(norms: np.ndarray, clip: float) -> np.ndarray:
    """Return the factors that shorten norms to `clip` times the median of those above 0."""
    heard = norms[norms > 0]
    most = clip * np.median(heard) if len(heard) else 0.0
    return np.array([min(1.0, most / norm) if norm > 0 else 1.0 for norm in norms])


def _weights(norms: np.ndarray, k: float, examples: Sequence[float], p: float) -> np.ndarray:
    """Return Eq. 1's weights, in extended precision."""
    share = np.array(examples, dtype=np.longdouble) ** np.longdouble(p)
    largest = norms.max()
    if k > 0 and largest > 0:
        relative = norms.astype(np.longdouble) / np.longdouble(largest)
        share = share * ((relative >= 1 - 1e-6) if math.isinf(k) else relative ** np.longdouble(k))
    return (share / share.sum()).astype(np.float64)
