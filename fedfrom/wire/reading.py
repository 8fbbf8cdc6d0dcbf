"""Reading one reply, with its checks: keys, dtypes, shapes, ranks, statistics and examples."""

from __future__ import annotations

import hashlib
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from fedfrom.merging.peft import layers as L
from fedfrom.merging.peft.configs import check_config, rank_and_scaling
from fedfrom.wire.adapter_configs import ADAPTER_KEY, record_to_config
from fedfrom.wire.contents import STATISTICS_KEY, metric_record, model_record, records_of
from fedfrom.wire.records import deltas_in, to_state
from fedfrom.wire.reply import Reply, rejecting
from fedfrom.wire.reply_statistics import read_statistics
from fedfrom.wire.sent import Sent

_DIGESTED = 1 << 11
"""Bytes at the end of each array that enter a reply's digest."""

_OTHER_RANKS = "another rank needs the strategy's lora_config and clients that use fedfrom.client's load and reply"


def read_reply(
    message: Message,
    sent: Sent,
    arrayrecord_key: str,
    weighted_by: str,
    needs: str | None = None,
) -> Reply:
    """Return a train reply that passed its checks, or raise RejectedReply with the reason to reject it.

    The checks, in this order: keys as sent; arrays readable; the adapter config; dtypes and shapes as sent (ranks may
    differ where `sent` allows it); statistics where the method needs them; num-examples a finite number > 0. Whether
    entries are finite and small enough to be merged is checked later, together with the norms.

    Parameters
    ----------
    message : Message
        A reply with content.
    sent : Sent
        The arrays that it replies to. With a lora_config, a client that sends its own config may have other ranks.
    arrayrecord_key, weighted_by : str
        Names of the model's record and of the metric with the number of examples.
    needs : str | None (default: None)
        The statistics that the method needs.

    Raises
    ------
    RejectedReply
        Names the key, what was expected and what was found. No other error is raised, whatever the reply holds.
    """
    content = message.content
    with rejecting("keys"):
        record = sent.trained(model_record(content, arrayrecord_key))
        if record.keys() != sent.state.keys():
            raise ValueError(f"expected the keys that were sent, found {L.difference(record, sent.state)}")
    with rejecting("unreadable"):
        state = to_state(record, "reply")
    config = None
    configs = records_of(content, ConfigRecord)
    if ADAPTER_KEY in configs:
        with rejecting("config"):
            config = check_config(record_to_config(configs[ADAPTER_KEY]), "reply")
            for field in ("rank_pattern", "alpha_pattern"):  # matching costs patterns x layers
                if len(config[field]) > (most := len(sent.layers) + len(sent.frozen)):
                    sizes = f"expected at most {most} modules, found {len(config[field])}"
                    raise ValueError(f"{ADAPTER_KEY}, {field}: {sizes}")
    with rejecting("shapes"):
        changed = deltas_in(record)
        _check_layers(state, sent, config, changed)
        deltas = frozenset(name for name, layer in sent.layers.items() if changed.intersection(layer.keys.values()))
    statistics = None
    if needs is not None:
        with rejecting("statistics"):
            statistics = read_statistics(content, sent, needs)
    with rejecting("examples"):
        examples: Any = metric_record(content, weighted_by)[weighted_by]
    rest = RecordDict({name: part for name, part in content.items() if not isinstance(part, ArrayRecord)})
    digest = _digest(record, records_of(content, ArrayRecord)[STATISTICS_KEY] if statistics else None)
    node_id = message.metadata.src_node_id
    return Reply(node_id, rest, state, float(examples), config, statistics, {}, digest, deltas)


def _digest(record: ArrayRecord, statistics: ArrayRecord | None) -> bytes:
    """Return a digest of the last bytes of each array and statistic, which may be large."""
    digest = hashlib.blake2b()
    for array in [*record.values(), *(() if statistics is None else statistics.values())]:
        digest.update(memoryview(array.data)[-_DIGESTED:])
    return digest.digest()


def _check_layers(state: dict[str, Tensor], sent: Sent, config: dict[str, Any] | None, deltas: set[str]) -> None:
    """Raise ValueError where shapes, dtypes or ranks of a reply's tensors differ from what was sent."""
    free = sent.lora_config is not None and config is not None
    for layer in sent.layers.values():
        for part, key in layer.keys.items():
            dimension = L.RANK_DIMENSION.get(part)
            if key in deltas and (part != "tensor" or layer.is_running_statistic):
                raise ValueError(f"reply, {key!r}: expected the client's own values, found a delta")
            try:
                L.check_same(state[key], sent.state[key], "reply", key, dimension if free else None, key in deltas)
            except ValueError as error:
                rank = None if dimension is None or free else slice(dimension, dimension + 1)
                if rank is not None and state[key].shape[rank] != sent.state[key].shape[rank]:
                    raise ValueError(f"{error} ({_OTHER_RANKS})") from None
                raise
        if free and layer.is_adapter:
            assert config is not None
            found, expected = L.adapter_rank(layer, state), rank_and_scaling(config, layer.name)[0]
            if found != {expected}:
                raise ValueError(f"reply, {layer.name!r}: expected rank {expected} as its config says, found {found}")
            own = L.read_adapter(layer, sent.state, 1.0, "global arrays")
            if expected > (most := max(*own.shape, own.rank)):
                raise ValueError(f"reply, {layer.name!r}: expected a rank up to {most}, the layer's, found {expected}")
