"""A reply that can be merged, and the reason why another reply can't."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flwr.app import RecordDict
from torch import Tensor

from fedfrom.wire.wording import one_line


@dataclass(frozen=True)
class Reply:
    """A reply that passed the checks of `read_reply`; `check_sizes` checks its entries once it has its norms.

    Attributes
    ----------
    node_id : int
        Id of the node that sent it.
    content : RecordDict
        The message's content without its ArrayRecords.
    state : Mapping[str, Tensor]
        The model or adapter: views of the received bytes, or a `SpooledState`.
    examples : float
        The client's num-examples.
    config : dict[str, Any] | None
        The client's adapter config, where it sent one.
    statistics : dict[str, Tensor] | None (default: None)
        Gram matrices by layer or Fisher diagonals by key, where the method needs them.
    norms : dict[str, float]
        ||theta_i||_F of each plain tensor, by layer; empty until `with_norms` has computed them.
    digest : bytes
        Digest of the arrays and statistics, by which replies are ordered.
    deltas : frozenset[str]
        Names of the plain tensors in whose place `state` has the delta.
    """

    node_id: int
    content: RecordDict
    state: Mapping[str, Tensor]
    examples: float
    config: dict[str, Any] | None
    statistics: dict[str, Tensor] | None = None
    norms: dict[str, float] = field(default_factory=dict)
    digest: bytes = b""
    deltas: frozenset[str] = frozenset()

    @property
    def who(self) -> str:
        """The client's name in errors and reports."""
        return f"node {self.node_id}"


class Rejection(NamedTuple):
    """Why a reply is rejected.

    Attributes
    ----------
    kind : str
        One of "unreadable", "keys", "shapes" (dtypes and ranks too), "config", "not-finite", "too-large",
        "statistics", "examples", "spool" and "unselected", which the round's metrics count. "metrics", for NaN or
        infinity among a reply's metrics, is logged but not counted.
    reason : str
        Names the key, what was expected and what was found.
    """

    kind: str
    reason: str


class RejectedReply(ValueError):
    """A reply that can't be merged, with the kind of its rejection."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind

    def rejection(self) -> Rejection:
        """Return the rejection, its reason on one line."""
        return Rejection(self.kind, one_line(str(self)))


@contextlib.contextmanager
def rejecting(kind: str) -> Iterator[None]:
    """Turn ValueErrors inside a `with` block into RejectedReply of this kind; a RejectedReply keeps its own kind."""
    try:
        yield
    except RejectedReply:
        raise
    except ValueError as error:
        raise RejectedReply(kind, str(error)) from error
