"""The sizes of a reply's entries, deltas and products, and the limits beyond which it can't be merged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedfrom.merging.linalg.norms import delta_norms, largest_magnitude
from fedfrom.merging.peft import layers as L
from fedfrom.merging.peft.configs import rank_and_scaling
from fedfrom.merging.peft.layers import Layer
from fedfrom.wire.reply import RejectedReply, Reply, rejecting
from fedfrom.wire.sent import Sent

_LARGEST = {torch.float32: torch.finfo(torch.float32).max / 4, torch.float64: 1e70}
"""Largest entry of a reply, by dtype: differences stay in range, as do products of two Gram matrices of factors."""


def with_norms(replies: Sequence[Reply], sent: Sent) -> list[Reply]:
    """Return the replies with the norms of their plain tensors' deltas; the sent tensors are read once for all."""
    plain = [
        (layer.name, key)
        for layer in sent.layers.values()
        if (key := layer.keys.get("tensor")) and sent.state[key].is_floating_point()
    ]
    norms = iter(
        delta_norms(
            [
                (reply.state[key], None if name in reply.deltas else sent.state[key])
                for reply in replies
                for name, key in plain
            ]
        )
    )
    return [replace(reply, norms={name: next(norms) for name, _ in plain}) for reply in replies]


def check_sizes(reply: Reply, sent: Sent) -> None:
    """Raise RejectedReply where an entry of a reply, which has its norms, is not finite or too large."""
    state = reply.state
    with rejecting("shapes"):
        for layer in sent.layers.values():
            for key in layer.keys.values():
                # |entry| <= largest sent + norm of the delta: only a reply beyond this bound needs a pass over memory
                limit = _limit(state[key])
                if layer.name in reply.deltas:  # the tensor that it is added to may have a narrower dtype
                    limit = min(limit, torch.finfo(sent.state[key].dtype).max / 4)
                if not sent.largest.get(key, math.inf) + reply.norms.get(layer.name, math.inf) < limit:
                    check_size(state[key], key, limit=limit)
            if layer.is_adapter:
                scaling = 1.0 if reply.config is None else rank_and_scaling(reply.config, layer.name)[1]
                _check_product(layer, state, scaling)
                if reply.config is not None and sent.lora_config is not None:
                    _check_loaded(layer, sent, rank_and_scaling(sent.lora_config, layer.name)[1], scaling)


def check_size(tensor: Tensor, key: str, who: str = "reply", limit: float = math.inf) -> None:
    """Raise RejectedReply where an entry is not finite, or so large that differences or squares overflow."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    largest, limit = largest_magnitude(tensor), min(limit, _limit(tensor))
    if not math.isfinite(largest):
        raise RejectedReply("not-finite", f"{who}, {key!r}: expected finite numbers, found NaN or infinity")
    if largest > limit:
        raise RejectedReply("too-large", f"{who}, {key!r}: expected entries up to {limit:g}, found {largest:g}")


def _limit(tensor: Tensor) -> float:
    return _LARGEST.get(tensor.dtype, _LARGEST[torch.float32])


def _check_product(layer: Layer, state: Mapping[str, Tensor], scaling: float) -> None:
    """Raise RejectedReply where an adapter's product BA is too large for the dtype of its factors."""
    factors = [state[key] for part, key in layer.keys.items() if part in L.RANK_DIMENSION]
    limit = min(torch.finfo(factor.dtype).max for factor in factors) / 4
    limit = min(limit, _LARGEST[torch.float64] ** 2)  # a scaling may be as large as any number
    if layer.is_embedding:
        limit /= state[layer.keys["embedding_B"]].shape[0] ** 0.5  # the merge moves the scale of B into A
    bound = scaling * math.prod(float(torch.linalg.vector_norm(factor, dtype=torch.float64)) for factor in factors)
    # the bound is cheap; the norm itself is computed only for adapters beyond it
    if not bound <= limit and not (norm := L.read_adapter(layer, state, scaling, "reply").norm()) <= limit:
        why = f"reply, {layer.name!r}: expected a product of norm up to {limit:g}, found {norm:g}"
        raise RejectedReply("too-large", why)


def _check_loaded(layer: Layer, sent: Sent, scaling: float, own: float) -> None:
    """Raise RejectedReply where what was sent at a scaling, at the reply's own one, is too large for its dtype."""
    for key in layer.keys.values():
        limit = torch.finfo(sent.state[key].dtype).max
        if sent.largest.get(key, 0.0) * scaling > limit * own:
            why = f"reply, {layer.name!r}: expected a scaling at which {key!r} stays below {limit:g}, found {own:g}"
            raise RejectedReply("config", f"{why} where the global adapter's is {scaling:g}")
