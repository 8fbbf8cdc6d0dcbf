"""Replies -> the clients of a merge, and which of them MultiKrum leaves out."""

from __future__ import annotations

from collections.abc import Sequence

from fedfrom.merging.clients import Client, Round
from fedfrom.merging.linalg.threads import one_thread_each
from fedfrom.merging.selection import gram_of_updates, multikrum
from fedfrom.wire.reply import Rejection, Reply
from fedfrom.wire.sent import Sent


def as_clients(replies: Sequence[Reply], sent: Sent, examples: Sequence[float] | None = None) -> list[Client]:
    """Return one client a reply, in the same order.

    Parameters
    ----------
    replies : Sequence[Reply]
        The valid replies.
    sent : Sent
        The arrays and the config that they reply to. A reply without a config has the global adapter's.
    examples : Sequence[float] | None (default: None)
        What each num-examples counts for; None where the merge does not look at it.
    """
    counts = [None] * len(replies) if examples is None else examples
    return [
        Client(
            reply.state,
            reply.who,
            count,
            config=None if sent.lora_config is None else reply.config or sent.lora_config,
            received=received,
            statistics=reply.statistics,
            norms=reply.norms,
            deltas=reply.deltas,
        )
        for reply, count, received in zip(replies, counts, sent.received_by(replies), strict=True)
    ]


def as_round(sent: Sent, server_lr: float | str, clip: float | None, dora: bool, same_base: bool) -> Round:
    """Return what the clients of a merge share; merged adapters get the factor shapes of the global adapter."""
    return Round(sent.state, sent.lora_config, server_lr, clip, as_reference=True, dora=dora, same_base=same_base)


def left_out_by_multikrum(replies: Sequence[Reply], sent: Sent, shared: Round, attackers: int) -> dict[int, Rejection]:
    """Return, by node id, the replies whose updates are further from the others' than the n - f closest ones.

    Parameters
    ----------
    replies : Sequence[Reply]
        The n valid replies.
    sent : Sent
        The arrays that they reply to.
    shared : Round
        What all clients of the merge share.
    attackers : int
        f > 0.

    Raises
    ------
    ValueError
        n < 2f + 3.
    """
    with one_thread_each():
        inner_products = gram_of_updates(as_clients(replies, sent), shared)
    kept = set(multikrum(inner_products, attackers))
    reason = f"select: expected an update among the {len(kept)} closest to others, found it further away"
    return {reply.node_id: Rejection("unselected", reason) for i, reply in enumerate(replies) if i not in kept}
