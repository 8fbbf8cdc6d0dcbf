"""The global arrays that a round's clients were sent, which their replies are compared with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import ArrayRecord
from torch import Tensor

from fedfrom.merging.linalg import norms
from fedfrom.merging.linalg.threads import one_thread_each
from fedfrom.merging.methods.base import Method
from fedfrom.merging.peft import layers as L
from fedfrom.merging.peft.configs import rank_and_scaling
from fedfrom.merging.peft.layers import Layer
from fedfrom.wire.frozen import frozen_keys
from fedfrom.wire.records import to_state, to_state_dict
from fedfrom.wire.reply import Reply


@dataclass(frozen=True)
class Sent:
    """The global arrays that a round's clients were sent, which their replies are compared with.

    Attributes
    ----------
    state : dict[str, Tensor]
        The global state without its frozen tensors: replies have the same keys, and these are merged.
    layers : dict[str, Layer]
        The layers of `state`.
    lora_config : dict[str, Any] | None
        The global adapter's config. With it clients may have their own ranks and scalings; without it, or where the
        method merges A and B apart, all clients must have the same.
    largest : Mapping[str, float]
        Largest magnitude in each floating-point tensor, by key, where it is known.
    arrays : ArrayRecord
        The global arrays, frozen tensors included.
    frozen : frozenset[str]
        Keys of the frozen tensors, which clients don't train; replies' values for them are ignored.
    cuts : Mapping[int, Mapping[str, int]]
        Node id -> module -> rank, for modules whose leading ranks alone were sent to the node.
    """

    state: dict[str, Tensor]
    layers: dict[str, Layer]
    lora_config: dict[str, Any] | None
    largest: Mapping[str, float] = field(default_factory=dict)
    arrays: ArrayRecord = field(default_factory=ArrayRecord)
    frozen: frozenset[str] = frozenset()
    cuts: Mapping[int, Mapping[str, int]] = field(default_factory=dict)

    @classmethod
    def check(
        cls,
        record: ArrayRecord,
        lora_config: dict[str, Any] | None,
        method: Method,
        dora: bool,
        frozen: Iterable[str] = (),
        cuts: Mapping[int, Mapping[str, int]] | None = None,
    ) -> Sent:
        """Return the global arrays as sent, or raise ValueError where no reply to them could be merged.

        Parameters
        ----------
        record : ArrayRecord
            The global arrays.
        lora_config : dict[str, Any] | None
            The global adapter's config, checked.
        method : Method
            The method that will merge the replies.
        dora : bool
            Whether DoRA is accepted.
        frozen : Iterable[str] (default: ())
            Keys, or patterns of keys, of tensors that clients don't train.
        cuts : Mapping[int, Mapping[str, int]] | None (default: None)
            See the attribute.
        """
        who = "global arrays"
        whole = to_state(record, who)
        layers = L.find_layers(whole, who)
        untrained = frozen_keys(frozen, whole, layers)
        state = {key: value for key, value in whole.items() if key not in untrained}
        with one_thread_each():
            largest = {key: norms.largest_magnitude(value) for key, value in state.items() if value.is_floating_point()}
        for name, layer in layers.items():
            L.check_dora(layer, who, dora)
            for key in layer.keys.values():
                if not math.isfinite(largest.get(key, 0.0)):
                    raise ValueError(f"{who}, {key!r}: expected finite numbers, found NaN or infinity")
            if layer.is_adapter:
                rank = L.read_adapter(layer, whole, 1.0, who).rank
                if lora_config and rank != (expected := rank_and_scaling(lora_config, name)[0]):
                    raise ValueError(f"{who}, {name!r}: expected rank {expected} as lora_config says, found {rank}")
        layers = {name: layer for name, layer in layers.items() if untrained.isdisjoint(layer.keys.values())}
        if method.scope == "model" and lora_config is None and len({lay.is_adapter for lay in layers.values()}) > 1:
            raise ValueError(
                "lora_config: expected the global adapter's with scope='model', which compares adapters with plain "
                "tensors by their true size, found None"
            )
        if method.on_factors:  # A and B apart; one scaling is assumed
            layers, lora_config = L.find_layers(state, who, pair_factors=False), None
        return cls(state, layers, lora_config, largest, record, untrained, cuts or {})

    @property
    def adapters(self) -> dict[str, Layer]:
        """The layers that are LoRA modules."""
        return {name: layer for name, layer in self.layers.items() if layer.is_adapter}

    def received_by(self, replies: Sequence[Reply]) -> list[dict[str, Tensor] | None]:
        """Return the state that each client started from; None where it started from the whole global state.

        A client of smaller ranks, or one that was sent fewer, started from the leading ranks. Clients that started from
        the same ranks share one state, so that its factors enter a merge once.
        """
        own = L.ranks(self.adapters, self.state)
        cuts: dict[tuple[int, ...], dict[str, Tensor]] = {}
        received: list[dict[str, Tensor] | None] = []
        for reply in replies:
            ranks, cut = L.ranks(self.adapters, reply.state), self.cuts.get(reply.node_id, {})
            ranks = {name: min(rank, cut.get(name, rank)) for name, rank in ranks.items()}
            if all(ranks[name] >= own[name] for name in own):
                received.append(None)
                continue
            key = tuple(ranks.values())
            if key not in cuts:
                cuts[key] = L.cut_to_ranks(self.state, self.layers, ranks)
            received.append(cuts[key])
        return received

    def trained(self, record: ArrayRecord) -> ArrayRecord:
        """Return a reply's arrays without the frozen ones."""
        if self.frozen.isdisjoint(record):
            return record
        return ArrayRecord({key: array for key, array in record.items() if key not in self.frozen})

    def whole(self, merged: ArrayRecord) -> ArrayRecord:
        """Return the merged arrays together with the frozen ones, unchanged, in the order of the global arrays."""
        if not self.frozen:
            return merged
        return ArrayRecord({key: array if key in self.frozen else merged[key] for key, array in self.arrays.items()})

    def scoring(self, method: Method) -> Method:
        """Return the method; its `validate`, where it has one, is called with whole states, frozen tensors included."""
        validate = method.validate
        if not self.frozen or validate is None:
            return method
        frozen = to_state_dict(ArrayRecord({key: self.arrays[key] for key in self.frozen}))
        return replace(method, validate=lambda state: validate({**frozen, **state}))  # type: ignore[call-arg]
