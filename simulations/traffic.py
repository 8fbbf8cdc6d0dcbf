"""A Flower Grid that counts the bytes of arrays, and calls a function with every reply."""

import time
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedfrom.wire import contents

# A deployed SuperLink answers each poll over HTTPS: after five seconds of waiting polls become rarer.
POLL_SECONDS, POLL_SHARE, LONGEST_POLL_SECONDS = 0.1, 0.02, 1.0


def array_bytes(message: Message) -> int:
    """Return the bytes of all arrays in a message; records of numbers and settings are not counted."""
    return 0 if message.has_error() else contents.array_bytes(message.content)


class CountingGrid(Grid):
    """Passes all calls on to another Grid, and counts bytes.

    Attributes
    ----------
    down, up : int
        Bytes of arrays sent to clients, and received from them.
    """

    def __init__(self, grid: Grid, on_reply: Callable[[Message], None] = lambda message: None) -> None:
        self.grid = grid
        self.on_reply = on_reply
        self.down = 0
        self.up = 0

    @property
    def clock(self) -> Any:
        """What waits for the grid's replies: its own clock, where it has one, else the module `time`."""
        return getattr(self.grid, "clock", time)

    def set_run(self, run: Any) -> None:
        """Pass on."""
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        """The current run."""
        return self.grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Pass on."""
        return self.grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """Pass on."""
        return self.grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        """Pass on."""
        return self.grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages and count their bytes."""
        messages = list(messages)
        self.down += sum(map(array_bytes, messages))
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull replies, count their bytes, and call `on_reply` with each."""
        replies = list(self.grid.pull_messages(message_ids))
        for reply in replies:
            self.up += array_bytes(reply)
            self.on_reply(reply)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push messages and return the replies that arrive within the timeout."""
        waiting = {identifier for identifier in self.push_messages(messages) if identifier}
        clock = self.clock
        start = clock.monotonic()
        deadline = float("inf") if timeout is None else start + timeout
        replies: list[Message] = []
        while waiting and clock.monotonic() < deadline:
            arrived = list(self.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
            replies.extend(arrived)
            if not arrived:
                share = POLL_SHARE * (clock.monotonic() - start)
                clock.sleep(min(max(POLL_SECONDS, share), LONGEST_POLL_SECONDS))
        return replies
