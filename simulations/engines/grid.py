"""A Flower Grid whose nodes are on this machine: messages go to workers, which run the clients."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from flwr.app import Context, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedfrom.wire.pulling import send_and_receive
from simulations.engines.jobs import Job, Outcome, decode, encode, encode_content, envelope, set_task_identity


class Workers(Protocol):
    """Runs clients, in this process or in others: see `workers`."""

    def submit(self, job: Job) -> None:
        """Take a job, to be done in the order in which jobs come."""

    def finished(self, message_ids: Collection[str]) -> list[Outcome]:
        """Return the outcomes of these messages that are there, each once."""

    def wait(self, seconds: float) -> None:
        """Wait so long, or until there is an outcome."""

    def close(self) -> None:
        """End whatever still runs."""


class Clock:
    """The time, for callers that wait for replies: `sleep` ends as soon as there is one."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def monotonic(self) -> float:
        """Return seconds, as `time.monotonic` does."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait for a reply, at most so long."""
        self._workers.wait(seconds)


class LocalGrid(Grid):
    """The nodes of a simulation on this machine.

    Messages are serialised both ways, so server and clients share no memory. A client that raises, dies or hangs gives
    an error reply, as on a deployment, and keeps the state that it had before. So does one whose reply nobody pulls: a
    strategy's timeout does not end the client's work.

    Parameters
    ----------
    workers : Workers
        Runs the clients.
    num_nodes : int
        Number of nodes; each holds one partition, 0 to num_nodes - 1.
    node_config : Callable[[int], dict] | None (default: None)
        Further entries of a partition's node_config.
    run_config : dict | None (default: None)
        The run_config that every client sees.
    seed : int (default: 0)
        Draws the node ids and the message ids.
    partitions : Sequence[int] | None (default: None)
        The partition of each node in the order in which the nodes registered; None is 0, 1, 2, ...

    Attributes
    ----------
    partition_of : dict[int, int]
        Partition by node id.
    clock : Clock
        To be used in place of the module `time` to wait for replies.
    """

    clock: Any

    def __init__(
        self,
        workers: Workers,
        num_nodes: int,
        *,
        node_config: Callable[[int], dict[str, Any]] | None = None,
        run_config: dict[str, Any] | None = None,
        seed: int = 0,
        partitions: Sequence[int] | None = None,
    ) -> None:
        partitions = range(num_nodes) if partitions is None else partitions
        if sorted(partitions) != list(range(num_nodes)):
            raise ValueError(f"partitions: expected a permutation of 0 to {num_nodes - 1}, found {partitions}")
        self.workers, self.clock = workers, Clock(workers)
        self._random = random.Random(seed)
        self._run = Run.create_empty(run_id=1)
        set_task_identity(self._run.run_id)
        self.partition_of = {self._random.getrandbits(64): partition for partition in partitions}
        start = datetime(2025, 1, 1, tzinfo=UTC)
        self._nodes = [
            NodeInfo(node_id=node_id, status="online", registered_at=(start + timedelta(seconds=i)).isoformat())
            for i, node_id in enumerate(self.partition_of)
        ]
        self._contexts = {
            node_id: Context(
                run_id=self._run.run_id,
                node_id=node_id,
                node_config={
                    "partition-id": partition,
                    "num-partitions": num_nodes,
                    **(node_config(partition) if node_config else {}),
                },
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for node_id, partition in self.partition_of.items()
        }
        self._asked: dict[str, Message] = {}  # those without a reply yet, without their content

    def set_run(self, run: Run) -> None:
        """Set the run that the messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that the messages belong to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes."""
        return set(self.partition_of)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the nodes, in the order in which they registered."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Give messages to the workers; as in Flower, one to a node that doesn't exist gets no id."""
        message_ids = []
        messages = list(messages)
        contents: dict[int, bytes] = {}  # by identity: a strategy sends one content to many nodes
        for message in messages:
            if message.metadata.reply_to_message_id or message.metadata.ttl <= 0:
                raise ValueError(f"not an instruction message: {message.metadata}")
            node_id = message.metadata.dst_node_id
            if node_id not in self.partition_of:
                continue
            message_id = self._identify(message)
            key = id(message.content)
            if key not in contents:
                contents[key] = encode_content(message.content)
            self._asked[message_id] = empty = envelope(message)
            self._submit(Job(message_id, encode(empty), contents[key], self._contexts[node_id]))
            message_ids.append(message_id)
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there, each once.

        Raises
        ------
        KeyError
            An id was never pushed, or its reply was pulled before.
        """
        wanted = set(message_ids)
        if unknown := wanted - self._asked.keys():
            raise KeyError(f"no message waits under {sorted(unknown)}")
        return [self._reply(outcome) for outcome in self.workers.finished(wanted)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push messages, and return the replies that come within the timeout."""
        return list(send_and_receive(self, messages, timeout))

    def partition(self, message_id: str) -> int:
        """Return the partition of the node that a message without a reply was sent to."""
        return self.partition_of[self._asked[message_id].metadata.dst_node_id]

    def _submit(self, job: Job) -> None:
        self.workers.submit(job)

    def _reply(self, outcome: Outcome) -> Message:
        asked = self._asked.pop(outcome.message_id)
        if outcome.context is None:
            reply = Message(Error(outcome.code, outcome.reason), reply_to=asked)
        else:
            self._contexts[asked.metadata.dst_node_id] = outcome.context
            reply = decode(outcome.reply)
        self._identify(reply)
        return reply

    def _identify(self, message: Message) -> str:
        """Give a message an id, and return it."""
        # Metadata has no public setter for it: the SuperLink, whose part this plays, sets it the same way.
        message_id = str(uuid.UUID(int=self._random.getrandbits(128), version=4))
        message.metadata.__dict__["_message_id"] = message_id
        return message_id
