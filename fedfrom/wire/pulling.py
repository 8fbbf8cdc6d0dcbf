"""Sending messages and taking in the replies one by one, as they come: no more than one is in memory here."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any, Self

from flwr.app import Message
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError

from fedfrom.wire.contents import array_bytes
from fedfrom.wire.failures import failure

log = logging.getLogger("flwr")  # where Flower's own strategies log

SHORTEST, LONGEST = 0.02, 1.0
"""Seconds between two looks for replies: Flower's own loop waits 3."""

_UNREADABLE = (DecodeError, ValueError, TypeError, KeyError, AttributeError)
"""What a grid raises where a reply is no message, which then counts as missing. What fails in between is raised."""

_SHARE = 0.05
"""Of the time without a reply, which the next pause is: a round of seconds is not held up, a long one not polled."""


def send_and_receive(grid: Grid, messages: Iterable[Message], timeout: float | None) -> Iterator[Message]:
    """Send messages at once, and return an iterator over their replies, in the order that they come.

    Each reply is pulled by itself, when it is asked for: a pull of many would bring all that are ready into memory.
    Nodes that have not replied by the end have no reply in it.

    Parameters
    ----------
    grid : Grid
        What sends messages to the nodes. One of a time of its own has a `clock`, with `monotonic` and `sleep`.
    messages : Iterable[Message]
        One a node.
    timeout : float | None
        Seconds to wait for replies from now on, those not counted in which replies are worked on; None is for ever.
    """
    # a message that could not be sent has no id
    waiting = [message_id for message_id in grid.push_messages(messages) if message_id]
    return _pulled(grid, waiting, timeout, getattr(grid, "clock", time))


def _pulled(grid: Grid, waiting: list[str], timeout: float | None, clock: Any) -> Iterator[Message]:
    heard, left, last = clock.monotonic(), float("inf") if timeout is None else timeout, False
    while waiting:
        start = clock.monotonic()
        for message_id in list(waiting):
            try:
                replies = list(grid.pull_messages([message_id]))
            except _UNREADABLE as error:
                waiting.remove(message_id)  # pulled again it would be no better
                log.error("the reply to message %s can't be read: %s: %.200r", message_id, type(error).__name__, error)
                continue
            if not replies:
                continue
            waiting.remove(message_id)
            asked = clock.monotonic()
            while replies:
                yield replies.pop()  # whoever has it is the only one that does
            heard = clock.monotonic()
            start += heard - asked
        now = clock.monotonic()
        left -= now - start
        if last or left <= 0 or not waiting:
            break
        # where looking takes long itself, of many nodes, it is done half of the time at most
        pause = min(max(SHORTEST, _SHARE * (now - heard), now - start), LONGEST)
        last = pause >= left  # a last look is at the very end
        clock.sleep(min(pause, left))
        left -= clock.monotonic() - now


class Arriving:
    """The replies that have content, one by one as they come; errors are kept aside."""

    def __init__(self, replies: Iterable[Message]) -> None:
        self._replies, self._worked, self._since = iter(replies), 0.0, time.perf_counter()
        self.results, self.bytes, self.failures = 0, 0, list[Message]()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Message:
        """Wait for the next reply that has content."""
        self._worked = self.seconds()
        try:
            while (message := next(self._replies)).has_error():
                self.failures.append(message)
        finally:
            self._since = time.perf_counter()
        self.results += 1
        self.bytes += array_bytes(message.content)
        return message

    def seconds(self) -> float:
        """Return how long the replies were worked on so far, not waited for."""
        return self._worked + time.perf_counter() - self._since

    def log(self, who: str) -> None:
        """Log how many came, and the errors, in Flower's own words."""
        log.info("%s: Received %s results and %s failures", who, self.results, len(self.failures))
        for message in self.failures:
            log.info("\t> Received error in reply from node %d: %s", message.metadata.src_node_id, failure(message))
