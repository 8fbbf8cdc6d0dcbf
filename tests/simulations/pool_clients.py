"""Clients for the local engine's processes, which import them by name."""

import os
import time

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict


def answer(message: Message, context: Context) -> Message:
    """Do what the message asks of this partition: reply, raise, die or hang; each reply counts in the state."""
    client = int(context.node_config["partition-id"])
    count = 1 + (int(context.state["count"]["count"]) if "count" in context.state else 0)
    context.state["count"] = MetricRecord({"count": count})
    fault = message.content["config"].get(f"fault-{client}", "")
    if fault == "raise":
        raise RuntimeError("out of memory")
    if fault == "die":
        os._exit(7)
    if fault == "hang":
        time.sleep(600)
    sent = message.content["arrays"]
    reply = ArrayRecord({key: Array(array.numpy() + np.float32(client + 1)) for key, array in sent.items()})
    metrics = MetricRecord({"num-examples": client + 1, "process": os.getpid(), "count": count})
    return Message(RecordDict({"arrays": reply, "metrics": metrics}), reply_to=message)


def load():
    """Return the client."""
    return answer


def load_nothing():
    """Fail to load a client."""
    raise ImportError("no such model")


def load_for_ever():
    """Never load a client."""
    time.sleep(600)
