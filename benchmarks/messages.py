"""Replies and nodes for a strategy's `aggregate_train`, without network or processes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from simulations.engines.jobs import set_task_identity

State = Mapping[str, np.ndarray]


def record_of(state: State) -> ArrayRecord:
    """Return arrays as a record."""
    return ArrayRecord({key: Array(np.asarray(value)) for key, value in state.items()})


def state_of(record: ArrayRecord) -> dict[str, np.ndarray]:
    """Return a record's arrays by key."""
    return {key: array.numpy() for key, array in record.items()}


class Nodes(Grid):
    """A grid with the nodes 1 to n that sends nothing."""

    def __init__(self, count: int) -> None:
        self.nodes = [NodeInfo(node_id=i + 1, status="online", registered_at=f"{i:09}") for i in range(count)]

    def get_nodes(self) -> Iterable[NodeInfo]:
        return self.nodes

    def get_node_ids(self) -> Iterable[int]:
        return [node.node_id for node in self.nodes]

    def _nothing(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("this grid sends nothing")

    set_run = create_message = push_messages = pull_messages = send_and_receive = run = _nothing


def reply(node_id: int, state: State, examples: float) -> Message:
    """Return a node's train reply, as a strategy receives it."""
    set_task_identity()
    asked = Message(RecordDict(), dst_node_id=node_id, message_type="train")
    metrics = MetricRecord({"num-examples": examples})
    return Message(RecordDict({"arrays": record_of(state), "metrics": metrics}), reply_to=asked)


def aggregate(strategy: Any, sent: State, replies: Sequence[Message], server_round: int = 1) -> ArrayRecord | None:
    """Return a strategy's merge of the replies to `sent`, None where it skips the round."""
    strategy.configure_train(server_round, record_of(sent), ConfigRecord(), Nodes(len(replies)))
    arrays: ArrayRecord | None = strategy.aggregate_train(server_round, list(replies))[0]
    return arrays
