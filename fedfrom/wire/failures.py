"""What is said of replies that are errors: the client's reason, and what to do where that can be told from it."""

from __future__ import annotations

from flwr.app import Message

from fedfrom.wire.records import BF16
from fedfrom.wire.wording import one_line

# what Flower's Array.numpy and torch's Tensor.numpy say, inside a client: nothing of ours runs there
_REMEDIES = {
    f"Unsupported serialization type for numpy conversion: '{BF16}'": "the global arrays are bfloat16, which Flower's "
    "conversions can't read: have the client read them by fedfrom.to_state_dict(record), or fedfrom.client.load",
    "Got unsupported ScalarType BFloat16": "numpy has no bfloat16, so Flower's ArrayRecord(state_dict) can't hold it: "
    "have the client send it by fedfrom.to_record(state_dict), or fedfrom.client.reply",
}


def failure(message: Message) -> str:
    """Return why a client replied with an error, in one line, and what to do where Flower's own code met bfloat16.

    Parameters
    ----------
    message : Message
        A reply that has an error.
    """
    reason = message.error.reason or ""
    remedies = [remedy for words, remedy in _REMEDIES.items() if words in reason]
    return "; ".join([one_line(reason), *remedies])
