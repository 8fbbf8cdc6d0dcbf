"""The ranks that nodes have said they have, and the part of the global adapter that each node is sent.

A client of rank r loads the leading r rows of A and columns of B (`fedfrom.client.load`). Once it has said its rank, it
is sent only these.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from flwr.app import ArrayRecord

from fedfrom.merging.peft import layers as L
from fedfrom.merging.peft.configs import rank_and_scaling
from fedfrom.wire.records import to_record, to_state
from fedfrom.wire.reply import Reply
from fedfrom.wire.sent import Sent

Ranks = Mapping[str, int]
"""Rank by module, of the modules where it is below the global adapter's."""

MOST_NODES = 10_000
"""Number of nodes whose ranks are remembered; the nodes not heard from for longest are sent whole factors again."""


class NodeRanks:
    """The ranks that nodes had in their last reply. A node that is not among them is sent whole factors."""

    def __init__(self) -> None:
        self._known: dict[int, Ranks] = {}  # in the order in which nodes were last heard from

    def known(self) -> dict[int, Ranks]:
        """Return the known ranks, by node."""
        return dict(self._known)

    def hear(self, asked: Iterable[int], replies: Iterable[Reply], sent: Sent) -> None:
        """Remember the ranks in a round's valid replies, and forget those of the other nodes that were asked.

        A wrong rank may be the reason why a node no longer replies: it is sent whole factors the next time.

        Parameters
        ----------
        asked : Iterable[int]
            Ids of the nodes that were sent messages.
        replies : Iterable[Reply]
            The valid replies.
        sent : Sent
            The arrays that they reply to.
        """
        waiting = set(asked)
        for node_id in waiting:
            self._known.pop(node_id, None)
        if sent.lora_config is None:  # all have the global ranks
            return
        adapters = _adapters(sent.arrays)
        own = L.ranks(adapters, to_state(sent.arrays))
        read: dict[str, Ranks] = {}  # by config: most rounds have few different ones
        for reply in replies:
            if reply.config is None or reply.node_id not in waiting:
                continue
            config = json.dumps(reply.config, sort_keys=True)
            if config not in read:
                ranks = {name: rank_and_scaling(reply.config, name)[0] for name in own}
                read[config] = {name: rank for name, rank in ranks.items() if rank < own[name]}
            if read[config]:
                self._known[reply.node_id] = read[config]
        while len(self._known) > MOST_NODES:
            del self._known[next(iter(self._known))]

    def cut(self, arrays: ArrayRecord, node_ids: Collection[int]) -> dict[int, ArrayRecord]:
        """Return the arrays that each node is sent: where its ranks are smaller, the leading ranks of the factors.

        Nodes of the same ranks share a record. All records share the arrays that are not cut, and those cut to the same
        rank.
        """
        if self._known.keys().isdisjoint(node_ids):
            return dict.fromkeys(node_ids, arrays)
        state, adapters = to_state(arrays, "global arrays"), _adapters(arrays)
        made: dict[tuple[tuple[str, int], ...], ArrayRecord] = {(): arrays}
        cuts: dict[tuple[str, int], ArrayRecord] = {}
        found = {}
        for node_id in node_ids:
            ranks = {name: rank for name, rank in self._known.get(node_id, {}).items() if name in adapters}
            key = tuple(ranks.items())
            if key not in made:
                made[key] = record = ArrayRecord(dict(arrays))
                for cut in ranks.items():  # each module is cut to each rank once, however many configs nodes send
                    if cut not in cuts:
                        layer = adapters[cut[0]]
                        factors = {k: state[k] for k in layer.keys.values()}
                        leading = L.cut_to_ranks(factors, {cut[0]: layer}, dict([cut]))
                        cuts[cut] = to_record({k: tensor for k, tensor in leading.items() if tensor is not state[k]})
                    record.update(cuts[cut])
            found[node_id] = made[key]
        return found

    def state(self) -> dict[str, Any]:
        """Return the known ranks as plain data for JSON, each different set of ranks once."""
        objects = {id(ranks): ranks for ranks in self._known.values()}  # nodes share them
        unique: list[Ranks] = []
        number: dict[int, int] = {}
        for key, ranks in objects.items():
            if ranks not in unique:
                unique.append(ranks)
            number[key] = unique.index(ranks)
        nodes = [[node_id, number[id(ranks)]] for node_id, ranks in self._known.items()]
        return {"ranks": [dict(ranks) for ranks in unique], "nodes": nodes}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the ranks that `state` returned."""
        self._known = {node_id: state["ranks"][number] for node_id, number in state["nodes"]}


def _adapters(arrays: ArrayRecord) -> dict[str, L.Layer]:
    layers = L.find_layers(arrays, "global arrays")
    return {name: layer for name, layer in layers.items() if layer.is_adapter}
