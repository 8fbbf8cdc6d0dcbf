"""Flower's messages <-> states: records, adapter configs, and the checks that every reply passes."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedfrom.merging import layers as L
from fedfrom.merging.layers import Layer

ADAPTER_KEY = "fedfrom.adapter"
"""Name of the ConfigRecord that carries an adapter's rank and scaling, from the server and in replies."""

_LARGEST = {torch.float32: torch.finfo(torch.float32).max / 4, torch.float64: 1e70}
"""Largest entry of a reply by dtype: differences stay in range, and so do products of two Gram matrices of factors."""

_OTHER_RANKS = "another rank needs the strategy's lora_config and clients that use fedfrom.client's load and reply"
_NUMBERS = ("r", "lora_alpha", "use_rslora")
_PATTERNS = ("rank_pattern", "alpha_pattern")


def to_state(record: ArrayRecord, who: str = "arrays") -> dict[str, Tensor]:
    """Return a record's arrays as tensors, by key; new memory.

    Raises
    ------
    ValueError
        An array can't be read; names `who` and the key.
    """
    state = {}
    for key, array in record.items():
        try:
            state[key] = torch.from_numpy(array.numpy())
        except Exception as error:  # malformed bytes fail in numpy in many ways
            raise ValueError(
                f"{who}, {key!r}: expected a readable array, found {type(error).__name__}: {error}"
            ) from error
    return state


def to_record(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Return tensors as Flower's record, by key; new memory. Flower carries no bfloat16 (TypeError)."""
    return ArrayRecord({key: Array(tensor.detach().cpu().contiguous().numpy()) for key, tensor in state.items()})


def config_to_record(config: Any) -> ConfigRecord:
    """Return what of an adapter config the other side needs: rank, lora_alpha, use_rslora and the patterns.

    Parameters
    ----------
    config : Mapping or peft.LoraConfig
        adapter_config.json's content, or the object.
    """
    config = config.to_dict() if hasattr(config, "to_dict") else config
    record = ConfigRecord({field: config.get(field) or 0 for field in _NUMBERS})
    for field in _PATTERNS:
        record[field] = json.dumps(config.get(field) or {})
    return record


def record_to_config(record: ConfigRecord, who: str = ADAPTER_KEY) -> dict[str, Any]:
    """Return the adapter config that `config_to_record` wrote.

    Raises
    ------
    ValueError
        A field is missing or is not what it should be. Nothing else, whatever the record holds.
    """
    try:
        config: dict[str, Any] = {field: record[field] for field in _NUMBERS}
        patterns = {field: json.loads(str(record[field])) for field in _PATTERNS}
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{who}: expected {', '.join(_NUMBERS + _PATTERNS)} as fedfrom.client writes them, "
            f"found {sorted(record)} ({type(error).__name__}: {error})"
        ) from error
    if config["use_rslora"] not in (False, True):
        raise ValueError(f"{who}, 'use_rslora': expected true or false, found {config['use_rslora']!r}")
    if not all(isinstance(pattern, dict) for pattern in patterns.values()):
        raise ValueError(f"{who}: expected patterns as JSON objects, found {patterns}")
    for pattern in {**patterns["rank_pattern"], **patterns["alpha_pattern"]}:
        try:
            re.compile(rf"(.*\.)?({pattern})$")  # as PEFT reads it
        except (re.error, RecursionError, OverflowError) as error:
            found = f"found {pattern!r} ({type(error).__name__}: {error})"
            raise ValueError(f"{who}, rank_pattern and alpha_pattern: expected regular expressions, {found}") from error
    return {
        "r": _positive(who, "r", config["r"], int),
        "lora_alpha": _positive(who, "lora_alpha", config["lora_alpha"], float),
        "use_rslora": bool(config["use_rslora"]),
        "rank_pattern": {
            k: _positive(who, f"rank_pattern[{k!r}]", v, int) for k, v in patterns["rank_pattern"].items()
        },
        "alpha_pattern": {
            k: _positive(who, f"alpha_pattern[{k!r}]", v, float) for k, v in patterns["alpha_pattern"].items()
        },
    }


def _positive(who: str, field: str, value: Any, kind: type[int] | type[float]) -> int | float:
    """Return a number > 0 that a float can hold, whole where `kind` is int; or raise ValueError."""
    if not isinstance(value, int if kind is int else int | float) or not 0 < value <= sys.float_info.max:
        whole = "whole " if kind is int else ""
        raise ValueError(f"{who}, {field}: expected a {whole}number > 0, found {value!r}")
    return kind(value)


@dataclass(frozen=True)
class Reply:
    """A reply that passed every check.

    Attributes
    ----------
    node_id : int
        Who sent it.
    content : RecordDict
        All that it carries.
    state : dict[str, Tensor]
        The model or adapter.
    examples : float
        num-examples.
    config : dict[str, Any] | None
        The client's adapter config, where it sent one.
    """

    node_id: int
    content: RecordDict
    state: dict[str, Tensor]
    examples: float
    config: dict[str, Any] | None

    @property
    def who(self) -> str:
        """What errors and reports call the client."""
        return f"node {self.node_id}"


def model_record(content: RecordDict, arrayrecord_key: str) -> ArrayRecord:
    """Return the ArrayRecord that holds the model: the one of that name, or the only one."""
    records = content.array_records
    if arrayrecord_key in records:
        return records[arrayrecord_key]
    if len(records) == 1:
        return next(iter(records.values()))
    raise ValueError(f"expected an ArrayRecord {arrayrecord_key!r}, or a single one, found {sorted(records)}")


def metric_record(content: RecordDict, weighted_by: str) -> MetricRecord:
    """Return the only MetricRecord, checked to hold the weighting key as one number.

    Raises
    ------
    ValueError
        There is none or more than one, or the key is missing, not a number, not finite or not above 0.
    """
    records = content.metric_records
    if len(records) != 1:
        raise ValueError(f"expected one MetricRecord, found {sorted(records)}")
    metrics = next(iter(records.values()))
    value = metrics.get(weighted_by)
    # compared, not converted: an int may be beyond any float
    if not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"metric {weighted_by!r}: expected a finite number > 0, found {value!r}")
    return metrics


def read_reply(
    message: Message,
    sent: Mapping[str, Tensor],
    layers: Mapping[str, Layer],
    arrayrecord_key: str,
    weighted_by: str,
    ranks_may_differ: bool,
) -> Reply:
    """Return a train reply as a state, or raise ValueError with the reason to reject it.

    Parameters
    ----------
    message : Message
        A reply with content.
    sent : Mapping[str, Tensor]
        The global state.
    layers : Mapping[str, Layer]
        Its layers.
    arrayrecord_key, weighted_by : str
        Names of the model's record and of the metric with the number of examples.
    ranks_may_differ : bool
        Accept other ranks from a client that says its config.

    Raises
    ------
    ValueError
        Names the key, what was expected and what was found. Nothing else is raised, whatever the reply holds.
    """
    content = message.content
    examples: Any = metric_record(content, weighted_by)[weighted_by]
    record = model_record(content, arrayrecord_key)
    if record.keys() != sent.keys():
        missing, extra = sorted(sent.keys() - record.keys()), sorted(record.keys() - sent.keys())
        raise ValueError(
            f"expected the keys that were sent, found {len(missing)} missing {missing[:3]} and {len(extra)} more "
            f"{extra[:3]}"
        )
    state = to_state(record, "reply")
    config = None
    if ADAPTER_KEY in content.config_records:
        config = L.check_config(record_to_config(content.config_records[ADAPTER_KEY]), "reply")
    free = ranks_may_differ and config is not None
    for layer in layers.values():
        for part, key in layer.keys.items():
            dimension = L.RANK_DIMENSION.get(part)
            try:
                L.check_same(state[key], sent[key], "reply", key, dimension if free else None)
            except ValueError as error:
                rank = None if dimension is None or free else slice(dimension, dimension + 1)
                if rank is not None and state[key].shape[rank] != sent[key].shape[rank]:
                    raise ValueError(f"{error} ({_OTHER_RANKS})") from None
                raise
            _check_size(state[key], key)
        if free and layer.is_adapter:
            assert config is not None
            found, expected = L.adapter_rank(layer, state), L.rank_and_scaling(config, layer.name)[0]
            if found != {expected}:
                raise ValueError(f"reply, {layer.name!r}: expected rank {expected} as its config says, found {found}")
        if layer.is_adapter:
            _check_product(layer, state, 1.0 if config is None else L.rank_and_scaling(config, layer.name)[1])
    return Reply(message.metadata.src_node_id, content, state, float(examples), config)


def _check_size(tensor: Tensor, key: str) -> None:
    """Raise ValueError where an entry is not finite, or so large that differences or squares overflow."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    low, high = torch.aminmax(tensor)  # NaN where there is one
    largest = max(-float(low), float(high))
    if not math.isfinite(largest):
        raise ValueError(f"reply, {key!r}: expected finite numbers, found NaN or infinity")
    limit = _LARGEST.get(tensor.dtype, _LARGEST[torch.float32])
    if largest > limit:
        raise ValueError(f"reply, {key!r}: expected entries up to {limit:g}, found {largest:g}")


def _check_product(layer: Layer, state: Mapping[str, Tensor], scaling: float) -> None:
    """Raise ValueError where an adapter's product is too large for the dtype of the factors it is sent in."""
    factors = [state[key] for part, key in layer.keys.items() if part in L.RANK_DIMENSION]
    limit = min(torch.finfo(factor.dtype).max for factor in factors) / 4
    if layer.is_embedding:
        limit /= state[layer.keys["embedding_B"]].shape[0] ** 0.5  # the scale of B, which goes into A
    bound = scaling * math.prod(float(torch.linalg.vector_norm(factor, dtype=torch.float64)) for factor in factors)
    # the bound is cheap, and holds for all adapters but those that are looked at closely
    if not bound <= limit and not (norm := L.read_adapter(layer, state, scaling, "reply").norm()) <= limit:
        raise ValueError(f"reply, {layer.name!r}: expected a product of norm up to {limit:g}, found {norm:g}")


def comparable_metrics(contents: Sequence[RecordDict]) -> tuple[list[RecordDict], list[str]]:
    """Return contents whose MetricRecords all have the same keys, and the keys that were dropped for it.

    Parameters
    ----------
    contents : Sequence[RecordDict]
        Each with one MetricRecord; not changed.
    """

    def kind(value: Any) -> int:
        return len(value) if isinstance(value, list) else -1

    records = [next(iter(content.metric_records.values())) for content in contents]
    kinds = [{key: kind(value) for key, value in record.items()} for record in records]
    shared = {key for key in kinds[0] if all(key in k and k[key] == kinds[0][key] for k in kinds)}
    dropped = sorted({key for k in kinds for key in k} - shared)
    if not dropped:
        return list(contents), []
    kept = []
    for content, record in zip(contents, records, strict=True):
        name = next(iter(content.metric_records))
        metrics = MetricRecord({key: value for key, value in record.items() if key in shared})
        kept.append(RecordDict({**content, name: metrics}))
    return kept, dropped
