"""Where the states of a round's replies are kept until they are merged: in memory up to a budget, then on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flwr.app import Message

from fedfrom.wire.reply import Rejection, Reply, rejecting
from fedfrom.wire.spool import SpooledState, SpoolError
from fedfrom.wire.wording import one_line


@dataclass
class Room:
    """Where the states of a round's replies are kept until they are merged.

    Attributes
    ----------
    memory : float
        Bytes of states that are still to be kept in memory; further states are kept on disk.
    folder : Path
        Folder for the states on disk; made where it is missing.
    """

    memory: float
    folder: Path

    def keep(self, reply: Reply) -> Reply:
        """Return the reply with its state in memory or on disk.

        Raises
        ------
        RejectedReply
            The state can't be written to disk.
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


def room_for(replies: Iterable[Message], budget: float | None, spool: str | Path | None) -> Room | None:
    """Return where the states of these replies are kept; None is in memory, where a list of replies already is.

    Parameters
    ----------
    replies : Iterable[Message]
        The round's replies, of which none has been read.
    budget : float | None
        Bytes of states to keep in memory; None keeps all of them there.
    spool : str | Path | None
        Folder for the other states; None is the folder for temporary files.
    """
    if budget is None or isinstance(replies, Sequence):
        return None
    return Room(budget, Path(tempfile.gettempdir() if spool is None else spool))


def damaged(replies: Iterable[Reply]) -> dict[int, Rejection]:
    """Return node id -> why a reply on disk can no longer be read, for those replies."""
    states = {reply.node_id: reply.state for reply in replies}
    return {
        node_id: Rejection("spool", one_line(state.damage))
        for node_id, state in states.items()
        if isinstance(state, SpooledState) and state.damage is not None
    }


def discard(replies: Iterable[Reply]) -> None:
    """Close the replies' spool files, which frees their room on the disk."""
    for reply in replies:
        if isinstance(reply.state, SpooledState):
            reply.state.close()
