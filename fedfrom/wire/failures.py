"""Replies that are errors: which node each is about, the client's reason, and a remedy for known reasons."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Message

from fedfrom.wire.records import BF16
from fedfrom.wire.wording import one_line

# what Flower's Array.numpy and torch's Tensor.numpy say inside a client, which runs no code of fedfrom
_REMEDIES = {
    f"Unsupported serialization type for numpy conversion: '{BF16}'": "the global arrays are bfloat16, which Flower's "
    "conversions can't read: have the client read them by fedfrom.to_state_dict(record), or fedfrom.client.load",
    "Got unsupported ScalarType BFloat16": "numpy has no bfloat16, so Flower's ArrayRecord(state_dict) can't hold it: "
    "have the client send it by fedfrom.to_record(state_dict), or fedfrom.client.reply",
}


def failure(message: Message) -> str:
    """Return why a client replied with an error, on one line, with a remedy where Flower's own code met bfloat16.

    Parameters
    ----------
    message : Message
        A reply that has an error.
    """
    reason = message.error.reason or ""
    remedies = [remedy for words, remedy in _REMEDIES.items() if words in reason]
    return "; ".join([one_line(reason), *remedies])


def failures_by_node(errors: Iterable[Message], asked: Iterable[Message]) -> dict[int, str]:
    """Return node id -> why the node replied with an error, or why the SuperLink gave it up.

    An error from a node that was asked is that node's. Any other sender is the SuperLink, which reports a lost node
    under an id of its own: the error is then about the node whose message it answers.

    Parameters
    ----------
    errors : Iterable[Message]
        Replies that have an error.
    asked : Iterable[Message]
        The round's messages to the nodes.
    """
    node_of = {message.metadata.message_id: message.metadata.dst_node_id for message in asked}
    nodes, found = set(node_of.values()), {}
    for error in errors:
        node_id = error.metadata.src_node_id
        if node_id not in nodes:
            node_id = node_of.get(error.metadata.reply_to_message_id, node_id)
        found[node_id] = failure(error)
    return found
