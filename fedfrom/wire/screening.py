"""Screening of a round's replies: each becomes a valid `Reply`, or a `Rejection` with its reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable

from flwr.app import Message

from fedfrom.merging.linalg.threads import one_thread_each
from fedfrom.merging.peft import layers as L
from fedfrom.wire.contents import metric_record
from fedfrom.wire.reading import read_reply
from fedfrom.wire.reply import RejectedReply, Rejection, Reply
from fedfrom.wire.room import Room, discard
from fedfrom.wire.sent import Sent
from fedfrom.wire.sizes import check_sizes, with_norms
from fedfrom.wire.wording import one_line


def screen(
    messages: Iterable[Message],
    sent: Sent,
    arrayrecord_key: str,
    weighted_by: str,
    needs: str | None = None,
    room: Room | None = None,
) -> tuple[list[Reply], dict[int, Rejection]]:
    """Return the replies that can be merged, and node id -> why a reply can't be, for the others.

    The valid replies are ordered by a digest of their content, since node ids and the order of arrival are chance: so
    the order of the merge's and the metrics' sums is reproducible.

    Parameters
    ----------
    messages : Iterable[Message]
        Train replies with content. Each is read as it arrives, and released before the next one is asked for.
    sent : Sent
        The arrays that they reply to.
    arrayrecord_key, weighted_by : str
        Names of the model's record and of the metric with the number of examples.
    needs : str | None (default: None)
        The statistics that the method needs, "gram" or "fisher"; None ignores statistics in replies.
    room : Room | None (default: None)
        Where states are kept; norms are then computed for each reply before it may go to disk. None keeps all states in
        memory, and computes the norms for all replies together.
    """
    valid: list[Reply] = []
    rejected: dict[int, Rejection] = {}
    arriving = iter(messages)
    try:
        while (message := next(arriving, None)) is not None:
            try:
                valid.append(_read_and_keep(message, sent, arrayrecord_key, weighted_by, needs, room))
            except RejectedReply as error:
                rejected[message.metadata.src_node_id] = error.rejection()
            del message  # frees its memory before the next one arrives
    except BaseException:
        discard(valid)
        raise
    if room is None:
        valid, others = _measure(valid, sent)
        rejected |= others
    if sent.lora_config is None:
        valid, others = _of_one_scaling(valid)
        rejected |= others
    if needs is not None:
        valid, others = _of_the_same_layers(valid, needs)
        rejected |= others
    return sorted(valid, key=lambda reply: _content_key(reply, weighted_by)), rejected


def _read_and_keep(
    message: Message, sent: Sent, arrayrecord_key: str, weighted_by: str, needs: str | None, room: Room | None
) -> Reply:
    """Return a valid reply, its state kept where there is room. A function, so that no local outlives the reading."""
    with one_thread_each():
        reply = read_reply(message, sent, arrayrecord_key, weighted_by, needs)
        if room is None:
            return reply
        [reply] = with_norms([reply], sent)
        check_sizes(reply, sent)
    return room.keep(reply)


def _measure(replies: list[Reply], sent: Sent) -> tuple[list[Reply], dict[int, Rejection]]:
    """Return the replies with their norms, and the rejections of those with entries not finite or too large."""
    valid, others = [], {}
    with one_thread_each():
        for reply in with_norms(replies, sent):
            try:
                check_sizes(reply, sent)
                valid.append(reply)
            except RejectedReply as error:
                others[reply.node_id] = error.rejection()
    return valid, others


def _content_key(reply: Reply, weighted_by: str) -> tuple[bytes, str]:
    """Return the digest of a reply's arrays, then its metrics: last, since times among them would be chance."""
    return reply.digest, repr(sorted(metric_record(reply.content, weighted_by).items()))


def _of_one_scaling(replies: list[Reply]) -> tuple[list[Reply], dict[int, Rejection]]:
    """Reject the replies whose config is not the most frequent one: without lora_config one scaling is assumed."""
    said = {r.node_id: json.dumps(r.config, sort_keys=True) for r in replies if r.config is not None}
    counts = Counter(said.values())
    common = max(sorted(counts), key=counts.__getitem__, default="")
    others = {
        node_id: Rejection(
            "config",
            one_line(
                f"adapter config: expected {common} as most clients have, found {config}; give the strategy the global "
                "adapter's lora_config"
            ),
        )
        for node_id, config in said.items()
        if config != common
    }
    return [reply for reply in replies if reply.node_id not in others], others


def _of_the_same_layers(replies: list[Reply], needs: str) -> tuple[list[Reply], dict[int, Rejection]]:
    """Reject the replies whose statistics cover other layers than most replies' do: they could not be merged."""
    kinds = {reply.node_id: frozenset(reply.statistics or ()) for reply in replies}
    counts = Counter(kinds.values())
    common = max(sorted(counts, key=sorted), key=lambda kind: (counts[kind], len(kind)), default=frozenset())
    others = {
        node_id: Rejection(
            "statistics",
            one_line(
                f"{needs} statistics: expected those of the layers that most clients sent, found "
                f"{L.difference(kind, common)}"
            ),
        )
        for node_id, kind in kinds.items()
        if kind != common
    }
    return [reply for reply in replies if reply.node_id not in others], others
