"""Log lines for rejected replies: one for each kind of rejection, with the number of replies and an example."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

from fedfrom.wire.reply import Rejection
from fedfrom.wire.wording import num_replies

log = logging.getLogger("flwr")  # where Flower's own strategies log


class Kind(NamedTuple):
    """The rejections of one kind.

    Attributes
    ----------
    times : int
        Number of rejected replies of this kind.
    node_id : int
        Id of a node that sent one of them: the example.
    reason : str
        Why the example was rejected: the key, what was expected and what was found.
    """

    times: int
    node_id: int
    reason: str


def by_kind(rejected: Mapping[int, Rejection]) -> dict[str, Kind]:
    """Return a round's rejections by kind, the most frequent kind first; the example is the first of its kind."""
    kinds: dict[str, Kind] = {}
    for node_id, (kind, reason) in rejected.items():
        known = kinds.get(kind, Kind(0, node_id, reason))
        kinds[kind] = known._replace(times=known.times + 1)
    return dict(sorted(kinds.items(), key=lambda item: -item[1].times))


def log_rejected(who: str, rejected: Mapping[int, Rejection]) -> None:
    """Log a warning for each kind of rejection, and each node's own reason at level DEBUG."""
    for kind, (times, node_id, reason) in by_kind(rejected).items():
        example = "node" if times == 1 else "such as node"
        log.warning("%s: rejected %s (%s), %s %d's: %s", who, num_replies(times), kind, example, node_id, reason)
    for node_id, (_, reason) in rejected.items():
        log.debug("%s: rejected the reply of node %d: %s", who, node_id, reason)
