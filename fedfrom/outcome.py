"""Merging a round's valid replies: the outcome is new global arrays, or the reason why nothing was merged."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from flwr.app import ArrayRecord

from fedfrom.merging import MergeReport
from fedfrom.merging.clients import Round
from fedfrom.merging.merge import merge_clients
from fedfrom.merging.methods.base import Method
from fedfrom.wire.clients import as_clients, left_out_by_multikrum
from fedfrom.wire.metrics import count_examples
from fedfrom.wire.outgoing import Outgoing
from fedfrom.wire.rejections import log_rejected
from fedfrom.wire.reply import Rejection, Reply
from fedfrom.wire.room import damaged
from fedfrom.wire.sent import Sent
from fedfrom.wire.wording import num_replies, one_line

log = logging.getLogger("flwr")  # where Flower's own strategies log


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of a training round's replies.

    Attributes
    ----------
    valid : list[Reply]
        The replies that are merged, or were to be merged, ordered by content.
    rejected : dict[int, Rejection]
        Node id -> why its reply is not among them.
    examples : Sequence[float]
        What the num-examples of each valid reply counts for; empty until it is known.
    arrays : ArrayRecord | None
        The new global arrays; None where nothing was merged.
    merge : MergeReport | None
        What the merge did; None where nothing was merged.
    reason : str
        Why nothing was merged; "" where something was, and where no reply was valid.
    """

    valid: list[Reply]
    rejected: Mapping[int, Rejection]
    examples: Sequence[float] = ()
    arrays: ArrayRecord | None = None
    merge: MergeReport | None = None
    reason: str = ""

    @property
    def examples_capped(self) -> int:
        """How many valid replies' num-examples count for less than the client said."""
        return sum(reply.examples != count for reply, count in zip(self.valid, self.examples, strict=False))

    def without(self, rejected: Mapping[int, Rejection]) -> Self:
        """Return the outcome before a merge from which further replies are rejected, by node id."""
        valid = [reply for reply in self.valid if reply.node_id not in rejected]
        return replace(self, valid=valid, rejected={**self.rejected, **rejected}, examples=())

    def failed(self, reason: str) -> Self:
        """Return the outcome of a round that merges nothing for this reason."""
        return replace(self, reason=one_line(reason))


def merge_replies(
    outcome: Outcome,
    sent: Sent,
    method: Method,
    shared: Round,
    *,
    least: int,
    attackers: int,
    examples_cap: float | None,
    weighted_by: str,
) -> Outcome:
    """Select from a round's valid replies and merge them, or find the reason why not; errors are logged.

    Parameters
    ----------
    outcome : Outcome
        The valid and the rejected replies.
    sent : Sent
        The arrays that they reply to.
    method : Method
        The merging method.
    shared : Round
        What all clients of the merge share.
    least : int
        Fewest valid replies to merge.
    attackers : int
        The number of attackers that MultiKrum allows for among all replies, rejected ones included; 0 selects none.
    examples_cap : float | None
        Each num-examples counts for at most this multiple of the median.
    weighted_by : str
        Name of the metric with the number of examples.

    Returns
    -------
    Outcome
        Without the replies that were not selected, or whose files on disk were damaged.
    """
    while len(outcome.valid) >= least:  # a second time only without replies whose files were damaged
        outgoing = Outgoing()
        try:
            if (suspected := attackers - len(outcome.rejected)) > 0:
                left_out = left_out_by_multikrum(outcome.valid, sent, shared, suspected)
                log_rejected("aggregate_train", left_out)
                outcome = outcome.without(left_out)
            said = [(reply.node_id, reply.examples) for reply in outcome.valid]
            examples = count_examples("aggregate_train", said, examples_cap, weighted_by)
            outcome = replace(outcome, examples=examples)
            clients = as_clients(outcome.valid, sent, examples)
            state, report = merge_clients(clients, replace(shared, empty=outgoing.empty), sent.scoring(method))
        except ValueError as error:
            if lost := damaged(outcome.valid):
                log_rejected("aggregate_train", lost)
                outcome = outcome.without(lost)
            else:
                log.error("aggregate_train: %s", error)
                return outcome.failed(str(error))
        except (RuntimeError, MemoryError) as error:  # torch's: out of memory, or a factorisation that failed
            log.exception("aggregate_train: the merge failed")
            return outcome.failed(f"{type(error).__name__}: {error}")
        else:
            return replace(outcome, arrays=sent.whole(outgoing.record(state)), merge=report)
    expected = f"expected at least {num_replies(least, 'valid ')}, found {len(outcome.valid)}"
    log.warning("aggregate_train: %s", expected)
    return outcome.failed(expected if outcome.valid else "")
