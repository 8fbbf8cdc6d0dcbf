"""Sending messages and pulling the replies one by one as they arrive: at most one is in memory here."""

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
"""Shortest and longest pause between two polls for replies, in seconds; Flower's own loop pauses for 3."""

_UNREADABLE = (DecodeError, ValueError, TypeError, KeyError, AttributeError)
"""Errors of a grid whose reply can't be decoded: that reply counts as missing. Other errors are raised."""

_SHARE = 0.05
"""Next pause as a share of the time since the last reply: short in a round of seconds, long in a round of hours."""


def send_and_receive(grid: Grid, messages: Iterable[Message], timeout: float | None) -> Iterator[Message]:
    """Send messages at once, and return an iterator over their replies, in order of arrival.

    Each reply is pulled by itself when the iterator is advanced: a pull of several would bring all that are ready into
    memory. The iterator ends without the replies of nodes that have not replied in time.

    Parameters
    ----------
    grid : Grid
        Sends messages to the nodes. A grid with a simulated time has a `clock` with `monotonic` and `sleep`.
    messages : Iterable[Message]
        One message a node.
    timeout : float | None
        Seconds to wait for replies from now on; time in which the caller works on replies is not counted. None waits
        for ever.
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
                waiting.remove(message_id)  # a second pull would return the same bytes
                log.error("the reply to message %s can't be read: %s: %.200r", message_id, type(error).__name__, error)
                continue
            if not replies:
                continue
            waiting.remove(message_id)
            asked = clock.monotonic()
            while replies:
                yield replies.pop()  # popped, so that the caller holds the only reference
            heard = clock.monotonic()
            start += heard - asked
        now = clock.monotonic()
        left -= now - start
        if last or left <= 0 or not waiting:
            break
        # at most half of the time goes into polling, which takes long with many nodes
        pause = min(max(SHORTEST, _SHARE * (now - heard), now - start), LONGEST)
        last = pause >= left  # the last poll is at the very end
        clock.sleep(min(pause, left))
        left -= clock.monotonic() - now


class Arriving:
    """Iterates over the replies that have content, as they arrive; replies that are errors are kept in `failures`."""

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
        """Return the seconds spent working on replies so far; waiting for them is not counted."""
        return self._worked + time.perf_counter() - self._since

    def log(self, who: str) -> None:
        """Log the number of results and failures, and each failure, in Flower's own words."""
        log.info("%s: Received %s results and %s failures", who, self.results, len(self.failures))
        for message in self.failures:
            log.info("\t> Received error in reply from node %d: %s", message.metadata.src_node_id, failure(message))
