"""A Flower Grid without network or processes: whole rounds in milliseconds, and faults on demand."""

import random
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_res_message

from simulations.engines.grid import LocalGrid
from simulations.engines.jobs import Client, Job, Outcome, decode
from simulations.engines.workers import InTurn


class Traffic(NamedTuple):
    """One message that crossed the wire; `message` is None unless the grid was told to record."""

    direction: str  # "down": to a client, "up": from one
    partition: int
    message_type: str
    num_bytes: int
    message: Message | None


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


class InProcessGrid(LocalGrid):
    """Runs a ClientApp in this process, one message after the other, as the local engine does on a GPU.

    A client runs when its reply is first pulled, in the order in which the messages were pushed. A client that raises
    gives an error reply; the exception itself is kept in `errors`.

    Parameters
    ----------
    client_app : Client
        The ClientApp. `context.node_config["partition-id"]` tells it which client it is.
    num_nodes, node_config, run_config, seed, partitions
        See `LocalGrid`. The seed also draws the order in which `get_nodes` lists the nodes.
    reply_order : int or Callable, optional
        Shuffles the replies of each pull: a seed, or a function from the list of replies to a list of replies.
        None: in the order the messages were pushed.
    silent : Collection[int]
        Partitions that never answer; the set `silent` may be changed between rounds.
    lost : Collection[int]
        Partitions of which the SuperLink answers, in its own name, that their node is gone; may be changed likewise.
    record : bool
        Keep the messages themselves in `traffic`, not their sizes alone.

    Attributes
    ----------
    clock : Clock
        Time stands still but for who waits for replies: a node that never answers costs a timeout of hours no time.
    """

    workers: InTurn

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
        super().__init__(
            InTurn(client_app),
            num_nodes,
            node_config=node_config,
            run_config=run_config,
            seed=seed,
            partitions=partitions,
        )
        self.silent, self.lost = set(silent), set(lost)
        self.clock = Clock()
        self.traffic: list[Traffic] = []
        self._record = record
        self._reply_order = (
            reply_order if callable(reply_order) or reply_order is None else _shuffle(random.Random(reply_order))
        )

    @property
    def errors(self) -> list[Exception]:
        """What clients raised."""
        return self.workers.errors

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the nodes in a random order, as Flower does."""
        return self._random.sample(self._nodes, k=len(self._nodes))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the clients in question and return their replies, without those of silent nodes."""
        wanted = list(message_ids)
        gone = [i for i in self._asked if i in set(wanted) and self.partition(i) in self.lost]
        replies = [create_message_error_unavailable_res_message(self._asked[i].metadata, "node_unavail") for i in gone]
        answering = [
            i for i in wanted if i not in gone and (i not in self._asked or self.partition(i) not in self.silent)
        ]
        replies += super().pull_messages(answering)
        for message_id in gone:
            del self._asked[message_id]
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

    def _submit(self, job: Job) -> None:
        self._note("down", job.message_id, job.envelope + job.content)
        super()._submit(job)

    def _reply(self, outcome: Outcome) -> Message:
        if outcome.reply:
            self._note("up", outcome.message_id, outcome.reply)
        return super()._reply(outcome)

    def _note(self, direction: str, message_id: str, data: bytes) -> None:
        kept = decode(data) if self._record else None
        asked = self._asked[message_id].metadata
        self.traffic.append(Traffic(direction, self.partition(message_id), asked.message_type, len(data), kept))


def _shuffle(generator: random.Random) -> Callable[[list[Message]], list[Message]]:
    return lambda replies: generator.sample(replies, k=len(replies))
