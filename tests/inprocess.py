"""A Flower Grid without network or processes: whole rounds in milliseconds, and faults on demand."""

import copy
import random
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.node_pb2 import NodeInfo
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_res_message
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

Client = Callable[[Message, Context], Message]
"""A ClientApp, or any function of its signature."""


class Traffic(NamedTuple):
    """One message that crossed the wire; `message` is None unless the grid was told to record."""

    direction: str  # "down": to a client, "up": from one
    partition: int
    message_type: str
    num_bytes: int
    message: Message | None


def set_task_identity(run_id: int = 1, node_id: int = SUPERLINK_NODE_ID, task_id: int = 1) -> None:
    """Say who is speaking. Outside a run nobody has, and Flower then refuses to build a Message."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, node_id, task_id


class Clock:
    """Takes the part of the module `time`; only sleeping makes time pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        """Return the seconds that were slept."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass, at once."""
        if seconds <= 0:
            raise ValueError(f"a pause of {seconds} s would never end a wait")
        self.now += seconds


class InProcessGrid(Grid):
    """Run a ClientApp in this process, one message after the other, as a simulation would in many.

    Messages are serialised both ways, so server and clients share no memory. A client runs when its reply is first
    pulled, in the order the messages were pushed. A client that raises gives the error reply that Flower gives, and
    what it changed in its context is lost; the exception itself is kept in `errors`.

    Parameters
    ----------
    client_app : Client
        The ClientApp. `context.node_config["partition-id"]` tells it which client it is.
    num_nodes : int
        How many nodes; each holds one partition, 0 to num_nodes - 1.
    node_config : Callable[[int], dict], optional
        Further entries of a partition's node_config, such as its rank.
    run_config : dict, optional
        The run_config that every client sees.
    seed : int
        Draws the node ids, which Flower draws anew in every run, and the order in which `get_nodes` lists them.
    partitions : Sequence[int], optional
        The partition of each node in the order the nodes registered; a permutation moves the data to other nodes.
    reply_order : int or Callable, optional
        Shuffles the replies of each pull: a seed, or a function from the list of replies to a list of replies.
        None: in the order the messages were pushed.
    silent : Collection[int]
        Partitions that never answer; the set `silent` may be changed between rounds.
    lost : Collection[int]
        Partitions of which the SuperLink answers, in its own name, that their node is gone; may be changed likewise.
    clock : Clock
        Time stands still but for who waits for replies: a node that never answers costs a timeout of hours no time.
    record : bool
        Keep the messages themselves in `traffic`, not their sizes alone.
    """

    def __init__(
        self,
        client_app: Client,
        num_nodes: int,
        *,
        node_config: Callable[[int], dict[str, Any]] | None = None,
        run_config: dict[str, Any] | None = None,
        seed: int = 0,
        partitions: Sequence[int] | None = None,
        reply_order: int | Callable[[list[Message]], list[Message]] | None = None,
        silent: Collection[int] = (),
        lost: Collection[int] = (),
        record: bool = False,
    ) -> None:
        partitions = range(num_nodes) if partitions is None else partitions
        if sorted(partitions) != list(range(num_nodes)):
            raise ValueError(f"partitions: expected a permutation of 0 to {num_nodes - 1}, found {partitions}")
        self.client_app = client_app
        self.silent, self.lost = set(silent), set(lost)
        self.clock = Clock()
        self.traffic: list[Traffic] = []
        self.errors: list[Exception] = []
        self._record = record
        self._random = random.Random(seed)
        self._reply_order = (
            reply_order if callable(reply_order) or reply_order is None else _shuffle(random.Random(reply_order))
        )
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
        self._waiting: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return set(self.partition_of)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return self._random.sample(self._nodes, k=len(self._nodes))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages for later; as in Flower, one to a node that doesn't exist gets no id."""
        message_ids = []
        for message in messages:
            if message.metadata.reply_to_message_id or message.metadata.ttl <= 0:
                raise ValueError(f"not an instruction message: {message.metadata}")
            if message.metadata.dst_node_id not in self.partition_of:
                continue
            message_id = self._new_id(message)
            self._waiting[message_id] = self._transmit("down", message.metadata.dst_node_id, message)
            message_ids.append(message_id)
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the clients in question and return their replies, without those of silent nodes.

        Raises
        ------
        KeyError
            An id was never pushed, or its reply was pulled before.
        """
        wanted = set(message_ids)
        if unknown := wanted - set(self._waiting):
            raise KeyError(f"no message waits under {sorted(unknown)}")
        replies = []
        # Not in the order of the set, which changes from process to process.
        for message_id in [i for i in self._waiting if i in wanted]:
            partition = self.partition_of[self._waiting[message_id].metadata.dst_node_id]
            if partition in self.lost:
                metadata = self._waiting.pop(message_id).metadata
                replies.append(create_message_error_unavailable_res_message(metadata, "node_unavail"))
            elif partition not in self.silent:
                replies.append(self._answer(self._waiting.pop(message_id)))
        return self._reply_order(replies) if self._reply_order else replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push and pull. With a timeout the silent nodes are given up at once, without waiting it out.

        Raises
        ------
        TimeoutError
            A node is silent and there is no timeout: Flower would wait for ever.
        """
        message_ids = list(self.push_messages(messages))
        replies = list(self.pull_messages(message_ids))
        if timeout is None and len(replies) < len(message_ids):
            raise TimeoutError(f"partitions {sorted(self.silent)} never answer, and no timeout was given")
        return replies

    def num_bytes(self, direction: str, message_type: str | None = None) -> int:
        """Return the bytes sent "down" to clients or "up" from them, for one message type or all."""
        return sum(
            t.num_bytes for t in self.traffic if t.direction == direction and message_type in (None, t.message_type)
        )

    def _answer(self, message: Message) -> Message:
        node_id = message.metadata.dst_node_id
        context = copy.deepcopy(self._contexts[node_id])
        try:
            reply = self.client_app(message, context)
            self._new_id(reply)
            reply = self._transmit("up", node_id, reply)
            self._contexts[node_id] = context
        except Exception as error:
            self.errors.append(error)
            code, reason = ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(error).__name__}: {error}"
            reply = Message(Error(code=code, reason=reason), reply_to=message)
            self._new_id(reply)
            reply = self._transmit("up", node_id, reply)
        return reply

    def _new_id(self, message: Message) -> str:
        # Metadata has no public setter for it: the SuperLink, whose part this plays, sets it the same way.
        message_id = str(uuid.UUID(int=self._random.getrandbits(128), version=4))
        message.metadata.__dict__["_message_id"] = message_id
        return message_id

    def _transmit(self, direction: str, node_id: int, message: Message) -> Message:
        data = message_to_proto(message).SerializeToString()
        arrived = message_from_proto(ProtoMessage.FromString(data))
        kept = copy.deepcopy(arrived) if self._record else None
        partition = self.partition_of[node_id]
        self.traffic.append(Traffic(direction, partition, message.metadata.message_type, len(data), kept))
        return arrived


def _shuffle(generator: random.Random) -> Callable[[list[Message]], list[Message]]:
    return lambda replies: generator.sample(replies, k=len(replies))
