"""Where the states of a round's replies are kept until they are merged: in memory, or beyond a budget on disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from fedfrom.wire.reply import Rejection, Reply, rejecting
from fedfrom.wire.spool import SpooledState, SpoolError
from fedfrom.wire.wording import one_line


@dataclass
class Room:
    """Where the states of a round's replies are kept until they are merged.

    Attributes
    ----------
    memory : float
        Bytes of states that are kept in memory, from now on; those beyond go to disk.
    folder : Path
        Where on disk; made where it is missing.
    """

    memory: float
    folder: Path

    def keep(self, reply: Reply) -> Reply:
        """Return a reply whose state is in memory or on disk.

        Raises
        ------
        RejectedReply
            The disk does not take it.
        """
        size = sum(tensor.nbytes for tensor in reply.state.values())
        if size <= self.memory:
            self.memory -= size
            return reply
        with rejecting("spool"):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SpoolError(
                    f"{reply.who}, spool: expected a folder that can be made and written to, found {self.folder}: "
                    f"{error.strerror or error}"
                ) from error
            return replace(reply, state=SpooledState(reply.state, self.folder, reply.who))


def damaged(replies: Iterable[Reply]) -> dict[int, Rejection]:
    """Return by node why replies that were kept on disk can no longer be read."""
    states = {reply.node_id: reply.state for reply in replies}
    return {
        node_id: Rejection("spool", one_line(state.damage))
        for node_id, state in states.items()
        if isinstance(state, SpooledState) and state.damage is not None
    }


def discard(replies: Iterable[Reply]) -> None:
    """Give the disk back what the replies' states took of it."""
    for reply in replies:
        if isinstance(reply.state, SpooledState):
            reply.state.close()
