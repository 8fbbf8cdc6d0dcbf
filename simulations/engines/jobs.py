"""A client's work on one message, and what came of it, as workers pass them between processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import Context, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto, recorddict_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.task_identity import TaskIdentity

SERVER = 1
"""The server's node id. Flower's own name for it, SUPERLINK_NODE_ID, is not public."""

Client = Callable[[Message, Context], Message]
"""A ClientApp, or any function of its signature."""


@dataclass(frozen=True)
class Job:
    """A message for one client.

    Attributes
    ----------
    message_id : str
        The message's id.
    envelope, content : bytes
        The serialised message without its content, and its content, which messages to several clients share. Joined
        they are the whole message, since serialised messages that are joined have the fields of both.
    context : Context
        The client's: its configuration, and its state as its last successful work left it.
    """

    message_id: str
    envelope: bytes
    content: bytes
    context: Context


@dataclass(frozen=True)
class Outcome:
    """What came of a job.

    Attributes
    ----------
    message_id : str
        The id of the job's message.
    reply : bytes
        The serialised reply; empty where the client failed.
    context : Context | None
        The client's context with its new state; None where the client failed, whose old state stays.
    code : int
        Of a failure: Flower's `ErrorCode`.
    reason : str
        Of a failure: what the server is told.
    """

    message_id: str
    reply: bytes = b""
    context: Context | None = None
    code: int = 0
    reason: str = ""


def set_task_identity(run_id: int = 1, node_id: int = SERVER, task_id: int = 1) -> None:
    """Say who speaks in this process. Outside a run nobody does, and Flower then refuses to build a Message."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, node_id, task_id


def encode(message: Message) -> bytes:
    """Return a message's bytes, as they would cross a network."""
    return bytes(message_to_proto(message).SerializeToString())


def envelope(message: Message) -> Message:
    """Return a message without its content."""
    empty = copy.copy(message)
    empty.content = RecordDict()
    return empty


def encode_content(content: RecordDict) -> bytes:
    """Return the bytes of a message that has this content, and nothing else."""
    return bytes(ProtoMessage(content=recorddict_to_proto(content)).SerializeToString())


def decode(data: bytes) -> Message:
    """Return the message that `encode` wrote."""
    return message_from_proto(ProtoMessage.FromString(data))


def work(client: Client, job: Job) -> Outcome:
    """Return what a client replies to a message; whatever the client raises is raised."""
    context = copy.deepcopy(job.context)  # a client that raises has changed nothing
    reply = client(decode(job.envelope + job.content), context)
    return Outcome(job.message_id, encode(reply), context)


def failed(job: Job, code: int, error: BaseException | str) -> Outcome:
    """Return the outcome of a job that failed: an exception by type and message, or a reason as it is."""
    reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return Outcome(job.message_id, code=code, reason=reason)
