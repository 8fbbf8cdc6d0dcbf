"""A reply that can be merged, and why another one can't."""

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
    """A reply that passed its checks, without its arrays but for the state; its entries are checked with its norms.

    Attributes
    ----------
    node_id : int
        Who sent it.
    content : RecordDict
        All that it carries but arrays.
    state : Mapping[str, Tensor]
        The model or adapter: views of the bytes that came, or a `SpooledState`.
    examples : float
        num-examples.
    config : dict[str, Any] | None
        The client's adapter config, where it sent one.
    statistics : dict[str, Tensor] | None (default: None)
        Gram matrices by layer or Fisher diagonals by key, where the method needs them.
    norms : dict[str, float]
        Norm of the change of each plain tensor, by layer; empty until they are taken.
    digest : bytes
        Of its arrays and statistics.
    deltas : frozenset[str]
        Plain tensors, by layer, of which it sent the change.
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
        """What errors and reports call the client."""
        return f"node {self.node_id}"


class Rejection(NamedTuple):
    """Why a reply is rejected.

    Attributes
    ----------
    kind : str
        One of "unreadable", "keys", "shapes" (dtypes and ranks too), "config", "not-finite", "too-large",
        "statistics", "examples", "spool", "metrics" and "unselected": what metrics count.
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
        """Return what is kept of it."""
        return Rejection(self.kind, one_line(str(self)))


@contextlib.contextmanager
def rejecting(kind: str) -> Iterator[None]:
    """Give the ValueErrors of the checks inside a kind, where they have none."""
    try:
        yield
    except RejectedReply:
        raise
    except ValueError as error:
        raise RejectedReply(kind, str(error)) from error
