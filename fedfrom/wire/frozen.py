"""Frozen tensors, which no client trains: their keys, and the record that tells clients not to send them back."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from fedfrom.merging.peft import layers as L
from fedfrom.wire.contents import records_of

FROZEN_KEY = "fedfrom.frozen"
"""Name of the ConfigRecord in train messages with the keys that clients need not send back."""


def check_frozen(frozen: str | Collection[str]) -> tuple[str, ...]:
    """Return the keys and patterns, sorted and each once; raise ValueError where one is not a string."""
    patterns = [frozen] if isinstance(frozen, str) else frozen
    if not isinstance(patterns, Collection) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"frozen: expected a collection of key names or patterns of them, found {frozen!r}")
    return tuple(sorted(set(patterns)))


def frozen_keys(patterns: Iterable[str], keys: Collection[str], layers: Mapping[str, L.Layer]) -> frozenset[str]:
    """Return the keys of the frozen tensors.

    Parameters
    ----------
    patterns : Iterable[str]
        Keys, or `fnmatch` patterns of keys, such as `*embeddings*`.
    keys : Collection[str]
        The keys of the global arrays.
    layers : Mapping[str, Layer]
        The layers of the global arrays, with LoRA's factors paired.

    Raises
    ------
    ValueError
        A pattern matches nothing, a LoRA module is frozen by half, or nothing is left to train.
    """
    found: set[str] = set()
    for pattern in patterns:
        matched = {key for key in keys if key == pattern or fnmatchcase(key, pattern)}
        if not matched:
            raise ValueError(
                f"frozen, {pattern!r}: expected a key of the global arrays or a pattern of some, such as "
                f"{next(iter(keys), None)!r}, found none that it matches"
            )
        found |= matched
    for layer in layers.values():
        frozen = found.intersection(layer.keys.values())
        if frozen and len(frozen) < len(layer.keys):
            raise ValueError(
                f"frozen, {layer.name!r}: expected all tensors of a LoRA module or none, since its update is that of "
                f"their product, found {sorted(frozen)} alone"
            )
    if found and len(found) == len(keys):
        raise ValueError("frozen: expected tensors that clients train beside the frozen ones, found none")
    return frozenset(found)


def frozen_record(keys: Iterable[str]) -> ConfigRecord:
    """Return the record that tells clients the keys of frozen tensors."""
    return ConfigRecord({"keys": sorted(keys)})


def told_frozen(content: RecordDict) -> set[str]:
    """Return the keys that a message says are frozen."""
    keys = records_of(content, ConfigRecord).get(FROZEN_KEY, ConfigRecord()).get("keys")
    return set(map(str, keys)) if isinstance(keys, list) else set()


def leave_out(state: Mapping[str, Tensor], frozen: Collection[str], sent: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a client's state without its frozen tensors.

    Parameters
    ----------
    state : Mapping[str, Tensor]
        The client's state after training.
    frozen : Collection[str]
        The keys of the frozen tensors.
    sent : Mapping[str, Tensor]
        The global state that the client was sent. Its frozen plain tensors must be unchanged, in the client's dtype.

    Raises
    ------
    ValueError
        The client has trained a frozen tensor, which would be lost.
    """
    for layer in L.find_layers([key for key in state if key in frozen], "this model").values():
        key = layer.keys.get("tensor", "")
        if key in sent and not _are_same(state[key].detach().cpu(), sent[key].to(state[key].dtype)):
            raise ValueError(
                f"this model, {key!r}: expected the values that were sent, since the strategy says it is frozen, found "
                "others: don't train it, or leave it out of frozen="
            )
    return {key: tensor for key, tensor in state.items() if key not in frozen}


def _are_same(found: Tensor, sent: Tensor) -> bool:
    """Return whether two tensors have the same shape and numbers; NaN equals NaN."""
    same = found.shape == sent.shape and (found == sent) | ((found != found) & (sent != sent))
    return bool(torch.as_tensor(same).all())


def statistics_names(frozen: Collection[str]) -> set[str]:
    """Return the names that frozen layers have in statistics: module names (Gram) and keys (Fisher)."""
    layers = L.find_layers(frozen, "this model")
    return {*frozen, *layers, *(name.removesuffix(".weight") for name in layers)}
