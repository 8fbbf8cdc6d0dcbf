"""The checks that every reply passes before any of it counts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedfrom.merging.linalg import blocks
from fedfrom.merging.linalg.threads import one_thread_each
from fedfrom.merging.methods.base import Method
from fedfrom.merging.peft import layers as L
from fedfrom.merging.peft.configs import check_config, rank_and_scaling
from fedfrom.merging.peft.layers import Layer
from fedfrom.wire.frozen import frozen_keys, statistics_of
from fedfrom.wire.records import (
    ADAPTER_KEY,
    STATISTICS_KEY,
    deltas_in,
    metric_record,
    model_record,
    one_line,
    record_to_config,
    records_of,
    to_state,
    to_state_dict,
)
from fedfrom.wire.spool import SpooledState, SpoolError

_LARGEST = {torch.float32: torch.finfo(torch.float32).max / 4, torch.float64: 1e70}
"""Largest entry of a reply by dtype: differences stay in range, and so do products of two Gram matrices of factors."""

_DIGESTED = 1 << 11
"""Bytes of each array that a reply is ordered by."""

_OTHER_RANKS = "another rank needs the strategy's lora_config and clients that use fedfrom.client's load and reply"


@dataclass(frozen=True)
class Sent:
    """What the clients of a round were sent, which their replies are compared with.

    Attributes
    ----------
    state : dict[str, Tensor]
        The global state, without what is frozen: what replies hold, and what is merged.
    layers : dict[str, Layer]
        Its layers.
    lora_config : dict[str, Any] | None
        The global adapter's config. With it clients may have ranks and scalings of their own; without it, or where
        factors are merged one by one, all must have one.
    largest : Mapping[str, float]
        Largest magnitude of each floating-point tensor, where it is known.
    arrays : ArrayRecord
        The global arrays, frozen ones too.
    frozen : frozenset[str]
        The keys of those that clients don't train: what replies hold of them is not looked at.
    cuts : Mapping[int, Mapping[str, int]]
        By node, the modules of which it was sent the leading ranks alone, and how many.
    """

    state: dict[str, Tensor]
    layers: dict[str, Layer]
    lora_config: dict[str, Any] | None
    largest: Mapping[str, float] = field(default_factory=dict)
    arrays: ArrayRecord = field(default_factory=ArrayRecord)
    frozen: frozenset[str] = frozenset()
    cuts: Mapping[int, Mapping[str, int]] = field(default_factory=dict)

    @classmethod
    def check(
        cls,
        record: ArrayRecord,
        lora_config: dict[str, Any] | None,
        method: Method,
        dora: bool,
        frozen: Iterable[str] = (),
        cuts: Mapping[int, Mapping[str, int]] | None = None,
    ) -> Sent:
        """Return the global arrays as sent, or raise ValueError where no reply to them could be merged.

        Parameters
        ----------
        record : ArrayRecord
            The global arrays.
        lora_config : dict[str, Any] | None
            The global adapter's config, checked.
        method : Method
            What will merge the replies.
        dora : bool
            Whether DoRA is accepted.
        frozen : Iterable[str] (default: ())
            Keys, and patterns of them, that clients don't train.
        cuts : Mapping[int, Mapping[str, int]] | None (default: None)
            See the attribute.
        """
        who = "global arrays"
        whole = to_state(record, who)
        layers = L.find_layers(whole, who)
        untrained = frozen_keys(frozen, whole, layers)
        state = {key: value for key, value in whole.items() if key not in untrained}
        with one_thread_each():
            largest = {key: blocks.largest(value) for key, value in state.items() if value.is_floating_point()}
        for name, layer in layers.items():
            L.check_dora(layer, who, dora)
            for key in layer.keys.values():
                if not math.isfinite(largest.get(key, 0.0)):
                    raise ValueError(f"{who}, {key!r}: expected finite numbers, found NaN or infinity")
            if layer.is_adapter:
                rank = L.read_adapter(layer, whole, 1.0, who).rank
                if lora_config and rank != (expected := rank_and_scaling(lora_config, name)[0]):
                    raise ValueError(f"{who}, {name!r}: expected rank {expected} as lora_config says, found {rank}")
        layers = {name: layer for name, layer in layers.items() if untrained.isdisjoint(layer.keys.values())}
        if method.scope == "model" and lora_config is None and len({lay.is_adapter for lay in layers.values()}) > 1:
            raise ValueError(
                "lora_config: expected the global adapter's with scope='model', which compares adapters with plain "
                "tensors by their true size, found None"
            )
        if method.on_factors:  # A and B apart; one scaling is assumed
            layers, lora_config = L.find_layers(state, who, pair_factors=False), None
        return cls(state, layers, lora_config, largest, record, untrained, cuts or {})

    @property
    def adapters(self) -> dict[str, Layer]:
        """The layers that are LoRA modules."""
        return {name: layer for name, layer in self.layers.items() if layer.is_adapter}

    def received_by(self, replies: Sequence[Reply]) -> list[dict[str, Tensor] | None]:
        """Return what each client started from: the leading ranks where it has fewer or was sent fewer, else None.

        Clients that started from the same ranks share one state, so that its factors enter a merge once.
        """
        own = L.ranks(self.adapters, self.state)
        cuts: dict[tuple[int, ...], dict[str, Tensor]] = {}
        received: list[dict[str, Tensor] | None] = []
        for reply in replies:
            ranks, cut = L.ranks(self.adapters, reply.state), self.cuts.get(reply.node_id, {})
            ranks = {name: min(rank, cut.get(name, rank)) for name, rank in ranks.items()}
            if all(ranks[name] >= own[name] for name in own):
                received.append(None)
            else:
                received.append(cuts.setdefault(tuple(ranks.values()), L.leading(self.state, self.layers, ranks)))
        return received

    def trained(self, record: ArrayRecord) -> ArrayRecord:
        """Return a reply's arrays without the frozen ones, which are not looked at."""
        if self.frozen.isdisjoint(record):
            return record
        return ArrayRecord({key: array for key, array in record.items() if key not in self.frozen})

    def whole(self, merged: ArrayRecord) -> ArrayRecord:
        """Return merged arrays with the frozen ones, which stay what they were, in the order of the global arrays."""
        if not self.frozen:
            return merged
        return ArrayRecord({key: array if key in self.frozen else merged[key] for key, array in self.arrays.items()})

    def scoring(self, method: Method) -> Method:
        """Return a method whose `validate`, where it has one, is given the frozen tensors too."""
        validate = method.validate
        if not self.frozen or validate is None:
            return method
        frozen = to_state_dict(ArrayRecord({key: self.arrays[key] for key in self.frozen}))
        return replace(method, validate=lambda state: validate({**frozen, **state}))  # type: ignore[call-arg]


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
def _as(kind: str) -> Iterator[None]:
    """Give the ValueErrors of the checks inside a kind, where they have none."""
    try:
        yield
    except RejectedReply:
        raise
    except ValueError as error:
        raise RejectedReply(kind, str(error)) from error


@dataclass
class Room:
    """Where the states of a round's replies are kept until they are merged.

    Attributes
    ----------
    memory : float
        Bytes of states that are kept in memory, from now on; those beyond go to disk.
    folder : Path
        Where on disk; made where it is missing.
    """

    memory: float
    folder: Path

    def keep(self, reply: Reply) -> Reply:
        """Return a reply whose state is in memory or on disk.

        Raises
        ------
        RejectedReply
            The disk does not take it.
        """
        size = sum(tensor.nbytes for tensor in reply.state.values())
        if size <= self.memory:
            self.memory -= size
            return reply
        with _as("spool"):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SpoolError(
                    f"{reply.who}, spool: expected a folder that can be made and written to, found {self.folder}: "
                    f"{error.strerror or error}"
                ) from error
            return replace(reply, state=SpooledState(reply.state, self.folder, reply.who))


def screen(
    messages: Iterable[Message],
    sent: Sent,
    arrayrecord_key: str,
    weighted_by: str,
    needs: str | None = None,
    room: Room | None = None,
) -> tuple[list[Reply], dict[int, Rejection]]:
    """Return the replies that can be merged, and by node why the others can't.

    The order of the replies, in which metrics are summed, is free of chance: it comes from their content, since node
    ids and the order of arrival are chance.

    Parameters
    ----------
    messages : Iterable[Message]
        Train replies with content. Each is read as it comes, and the message not held when the next one is asked for.
    sent : Sent
        What they reply to.
    arrayrecord_key, weighted_by : str
        Names of the model's record and of the metric with the number of examples.
    needs : str | None (default: None)
        The statistics that the method needs, "gram" or "fisher"; None leaves those that came unread.
    room : Room | None (default: None)
        Where states are kept, each measured before; None keeps all in memory, to be measured together.
    """
    valid: list[Reply] = []
    rejected: dict[int, Rejection] = {}
    arriving = iter(messages)
    try:
        while (message := next(arriving, None)) is not None:
            try:
                valid.append(_kept(message, sent, arrayrecord_key, weighted_by, needs, room))
            except RejectedReply as error:
                rejected[message.metadata.src_node_id] = error.rejection()
            del message  # before the next one comes
    except BaseException:
        discard(valid)
        raise
    if room is None:
        valid, others = _measured(valid, sent)
        rejected |= others
    if sent.lora_config is None:
        valid, others = _of_one_scaling(valid)
        rejected |= others
    if needs is not None:
        valid, others = _of_one_kind(valid, needs)
        rejected |= others
    return sorted(valid, key=lambda reply: _content_key(reply, weighted_by)), rejected


def _kept(
    message: Message, sent: Sent, arrayrecord_key: str, weighted_by: str, needs: str | None, room: Room | None
) -> Reply:
    """Return a reply, its state where there is room for it; in a function, so that nothing of it stays behind."""
    with one_thread_each():
        reply = read_reply(message, sent, arrayrecord_key, weighted_by, needs)
        if room is None:
            return reply
        [reply] = _with_norms([reply], sent)
        _check_sizes(reply, sent)
    return room.keep(reply)


def _measured(replies: list[Reply], sent: Sent) -> tuple[list[Reply], dict[int, Rejection]]:
    """Give replies their norms, and part off those that are not finite or too large."""
    valid, others = [], {}
    with one_thread_each():
        for reply in _with_norms(replies, sent):
            try:
                _check_sizes(reply, sent)
                valid.append(reply)
            except RejectedReply as error:
                others[reply.node_id] = error.rejection()
    return valid, others


def damaged(replies: Iterable[Reply]) -> dict[int, Rejection]:
    """Return by node why replies that were kept on disk can no longer be read."""
    states = {reply.node_id: reply.state for reply in replies}
    return {
        node_id: Rejection("spool", one_line(state.damage))
        for node_id, state in states.items()
        if isinstance(state, SpooledState) and state.damage is not None
    }


def discard(replies: Iterable[Reply]) -> None:
    """Give the disk back what the replies' states took of it."""
    for reply in replies:
        if isinstance(reply.state, SpooledState):
            reply.state.close()


def _content_key(reply: Reply, weighted_by: str) -> tuple[bytes, str]:
    """Return the digest of a reply's arrays, then its metrics: some clients' metrics hold times, which are chance."""
    return reply.digest, repr(sorted(metric_record(reply.content, weighted_by).items()))


def _digest(record: ArrayRecord, statistics: ArrayRecord | None) -> bytes:
    """Return a digest of arrays and statistics: of the end of each, since they may be large."""
    digest = hashlib.blake2b()
    for array in [*record.values(), *(() if statistics is None else statistics.values())]:
        digest.update(memoryview(array.data)[-_DIGESTED:])
    return digest.digest()


def _of_one_scaling(replies: list[Reply]) -> tuple[list[Reply], dict[int, Rejection]]:
    """Part off the replies whose config is another than most say: without lora_config one scaling is assumed."""
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


def _of_one_kind(replies: list[Reply], needs: str) -> tuple[list[Reply], dict[int, Rejection]]:
    """Part off the replies whose statistics are of other layers than most have: those could not be merged."""
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


def read_reply(
    message: Message,
    sent: Sent,
    arrayrecord_key: str,
    weighted_by: str,
    needs: str | None = None,
) -> Reply:
    """Return a train reply as a state, or raise RejectedReply, a ValueError, with the reason to reject it.

    In this order: readable; keys, dtypes and shapes as sent (ranks may differ where `sent` allows it); statistics where
    they are needed; num-examples a finite number > 0. Whether its entries are finite, and no larger than can be merged,
    is looked at with its norms, which it has not yet.

    Parameters
    ----------
    message : Message
        A reply with content.
    sent : Sent
        What it replies to. With a lora_config, a client that says its own config may have other ranks.
    arrayrecord_key, weighted_by : str
        Names of the model's record and of the metric with the number of examples.
    needs : str | None (default: None)
        The statistics that the method needs.

    Raises
    ------
    RejectedReply
        Names the key, what was expected and what was found. Nothing else is raised, whatever the reply holds.
    """
    content = message.content
    with _as("keys"):
        record = sent.trained(model_record(content, arrayrecord_key))
        if record.keys() != sent.state.keys():
            raise ValueError(f"expected the keys that were sent, found {L.difference(record, sent.state)}")
    with _as("unreadable"):
        state = to_state(record, "reply")
    config = None
    configs = records_of(content, ConfigRecord)
    if ADAPTER_KEY in configs:
        with _as("config"):
            config = check_config(record_to_config(configs[ADAPTER_KEY]), "reply")
            for field in ("rank_pattern", "alpha_pattern"):  # each is tried on each layer
                if len(config[field]) > (most := len(sent.layers) + len(sent.frozen)):
                    sizes = f"expected at most {most} modules, found {len(config[field])}"
                    raise ValueError(f"{ADAPTER_KEY}, {field}: {sizes}")
    with _as("shapes"):
        changed = deltas_in(record)
        _check_layers(state, sent, config, changed)
        deltas = frozenset(name for name, layer in sent.layers.items() if changed.intersection(layer.keys.values()))
    statistics = None
    if needs is not None:
        with _as("statistics"):
            statistics = _read_statistics(content, sent, needs)
    with _as("examples"):
        examples: Any = metric_record(content, weighted_by)[weighted_by]
    rest = RecordDict({name: part for name, part in content.items() if not isinstance(part, ArrayRecord)})
    digest = _digest(record, records_of(content, ArrayRecord)[STATISTICS_KEY] if statistics else None)
    node_id = message.metadata.src_node_id
    return Reply(node_id, rest, state, float(examples), config, statistics, {}, digest, deltas)


def _check_layers(state: dict[str, Tensor], sent: Sent, config: dict[str, Any] | None, deltas: set[str]) -> None:
    """Raise ValueError where a reply's tensors are not of the shapes, dtypes and ranks that were sent."""
    free = sent.lora_config is not None and config is not None
    for layer in sent.layers.values():
        for part, key in layer.keys.items():
            dimension = L.RANK_DIMENSION.get(part)
            if key in deltas and (part != "tensor" or layer.is_running_statistic):
                raise ValueError(f"reply, {key!r}: expected what the client ended with, found a delta")
            try:
                L.check_same(state[key], sent.state[key], "reply", key, dimension if free else None, key in deltas)
            except ValueError as error:
                rank = None if dimension is None or free else slice(dimension, dimension + 1)
                if rank is not None and state[key].shape[rank] != sent.state[key].shape[rank]:
                    raise ValueError(f"{error} ({_OTHER_RANKS})") from None
                raise
        if free and layer.is_adapter:
            assert config is not None
            found, expected = L.adapter_rank(layer, state), rank_and_scaling(config, layer.name)[0]
            if found != {expected}:
                raise ValueError(f"reply, {layer.name!r}: expected rank {expected} as its config says, found {found}")
            own = L.read_adapter(layer, sent.state, 1.0, "global arrays")
            if expected > (most := max(*own.shape, own.rank)):
                raise ValueError(f"reply, {layer.name!r}: expected a rank up to {most}, the layer's, found {expected}")


def _with_norms(replies: Sequence[Reply], sent: Sent) -> list[Reply]:
    """Return replies with the norm of each plain tensor's change; what was sent is read once for all of them."""
    plain = [
        (layer.name, key)
        for layer in sent.layers.values()
        if (key := layer.keys.get("tensor")) and sent.state[key].is_floating_point()
    ]
    norms = iter(
        blocks.delta_norms(
            [
                (reply.state[key], None if name in reply.deltas else sent.state[key])
                for reply in replies
                for name, key in plain
            ]
        )
    )
    return [replace(reply, norms={name: next(norms) for name, _ in plain}) for reply in replies]


def _check_sizes(reply: Reply, sent: Sent) -> None:
    """Raise RejectedReply where an entry of a reply is not finite or too large; it has its norms."""
    state = reply.state
    with _as("shapes"):
        for layer in sent.layers.values():
            for key in layer.keys.values():
                # no entry is further from what was sent: a pass over memory less for all but strange replies
                limit = _limit(state[key])
                if layer.name in reply.deltas:  # what it is added to may be of a narrower dtype
                    limit = min(limit, torch.finfo(sent.state[key].dtype).max / 4)
                if not sent.largest.get(key, math.inf) + reply.norms.get(layer.name, math.inf) < limit:
                    _check_size(state[key], key, limit=limit)
            if layer.is_adapter:
                scaling = 1.0 if reply.config is None else rank_and_scaling(reply.config, layer.name)[1]
                _check_product(layer, state, scaling)


def _read_statistics(content: RecordDict, sent: Sent, needs: str) -> dict[str, Tensor]:
    """Return a reply's Gram matrices by layer or Fisher diagonals by key, or raise ValueError with what is wrong."""
    record = records_of(content, ArrayRecord).get(STATISTICS_KEY)
    if not record:
        raise ValueError(
            f"expected {needs} statistics beside the arrays, in a record {STATISTICS_KEY!r}, found none: the client "
            f"computes them with fedfrom.client.{needs} and sends them with fedfrom.client.reply(statistics=)"
        )
    shapes: Mapping[str, tuple[int, ...]] = _gram_shapes(sent) if needs == "gram" else _fisher_shapes(sent)
    unread = statistics_of(sent.frozen) - shapes.keys()
    statistics = to_state(ArrayRecord({n: array for n, array in record.items() if n not in unread}), "statistics")
    for name, tensor in statistics.items():
        if name not in shapes:
            raise ValueError(
                f"statistics, {name[:80]!r}: expected the name of a layer that was sent, as fedfrom.client.{needs} "
                f"gives them, such as {next(iter(shapes), None)!r}, found another"
            )
        found = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        if tuple(tensor.shape) != shapes[name] or not tensor.is_floating_point():
            raise ValueError(f"statistics, {name!r}: expected floating-point {shapes[name]}, found {found}")
        _check_size(tensor, name, "statistics")
        if (tensor.diagonal() if needs == "gram" else tensor).lt(0).any():
            raise ValueError(f"statistics, {name!r}: expected mean squares >= 0, found some below 0")
        if needs == "gram" and not _may_be_gram(tensor):
            raise ValueError(
                f"statistics, {name!r}: expected a Gram matrix X^T X, found one that is not symmetric or has "
                "an entry beyond its diagonal's"
            )
    return statistics


def _may_be_gram(matrix: Tensor) -> bool:
    """Return whether a matrix is symmetric with |G_ij|^2 <= G_ii G_jj, to rounding of the narrower dtypes."""
    roots = matrix.diagonal().to(torch.float64).sqrt()
    slack = 1e-2 * roots[:, None] * roots
    wide = matrix.to(torch.float64)
    return bool(((wide - wide.T).abs() <= slack).all() and (wide.abs() <= roots[:, None] * roots + slack).all())


def _fisher_shapes(sent: Sent) -> dict[str, tuple[int, ...]]:
    """Return the shape of the Fisher diagonal of each tensor: its own."""
    return {name: tuple(sent.state[key].shape) for name, layer in sent.layers.items() for key in layer.keys.values()}


def _gram_shapes(sent: Sent) -> dict[str, tuple[int, int]]:
    """Return the shape (d_in, d_in) of the Gram matrix of each layer that may have one: LoRA modules and weights."""
    shapes = {}
    for name, layer in sent.layers.items():
        if layer.is_adapter and not layer.is_embedding:
            shapes[name] = sent.state[layer.keys["A"]]
        elif name.endswith("weight") and sent.state[layer.keys["tensor"]].ndim == 2:
            shapes[name.removesuffix(".weight")] = sent.state[layer.keys["tensor"]]
    return {name: (matrix.shape[1], matrix.shape[1]) for name, matrix in shapes.items() if matrix.ndim == 2}


def _check_size(tensor: Tensor, key: str, who: str = "reply", limit: float = math.inf) -> None:
    """Raise ValueError where an entry is not finite, or so large that differences or squares overflow."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    largest, limit = blocks.largest(tensor), min(limit, _limit(tensor))
    if not math.isfinite(largest):
        raise RejectedReply("not-finite", f"{who}, {key!r}: expected finite numbers, found NaN or infinity")
    if largest > limit:
        raise RejectedReply("too-large", f"{who}, {key!r}: expected entries up to {limit:g}, found {largest:g}")


def _limit(tensor: Tensor) -> float:
    return _LARGEST.get(tensor.dtype, _LARGEST[torch.float32])


def _check_product(layer: Layer, state: Mapping[str, Tensor], scaling: float) -> None:
    """Raise ValueError where an adapter's product is too large for the dtype of the factors it is sent in."""
    factors = [state[key] for part, key in layer.keys.items() if part in L.RANK_DIMENSION]
    limit = min(torch.finfo(factor.dtype).max for factor in factors) / 4
    limit = min(limit, _LARGEST[torch.float64] ** 2)  # a scaling may be as large as any number
    if layer.is_embedding:
        limit /= state[layer.keys["embedding_B"]].shape[0] ** 0.5  # the scale of B, which goes into A
    bound = scaling * math.prod(float(torch.linalg.vector_norm(factor, dtype=torch.float64)) for factor in factors)
    # the bound is cheap, and holds for all adapters but those that are looked at closely
    if not bound <= limit and not (norm := L.read_adapter(layer, state, scaling, "reply").norm()) <= limit:
        why = f"reply, {layer.name!r}: expected a product of norm up to {limit:g}, found {norm:g}"
        raise RejectedReply("too-large", why)


# --- Metrics ---------------------------------------------------------------------------------------------------------


def check_metrics(content: RecordDict, weighted_by: str) -> MetricRecord:
    """Return a reply's only MetricRecord, or raise RejectedReply where an average of it would not be a number."""
    with _as("examples"):
        metrics = metric_record(content, weighted_by)
    for key, value in metrics.items():
        numbers = value if isinstance(value, list) else [value]
        if not all(isinstance(number, int) or math.isfinite(number) for number in numbers):
            raise RejectedReply("metrics", f"metric {key!r}: expected finite numbers, found {value!r}")
    return metrics


def cap_examples(counts: Sequence[float], cap: float | None) -> list[float]:
    """Return the numbers of examples, none of them above `cap` times their median; None: as they are."""
    if cap is None or not counts:
        return list(counts)
    most = cap * statistics.median(counts)
    return [min(count, most) for count in counts]


def with_examples(content: RecordDict, weighted_by: str, count: float) -> RecordDict:
    """Return a content whose only MetricRecord has this number of examples; it is not changed."""
    name, metrics = next(iter(records_of(content, MetricRecord).items()))
    if metrics[weighted_by] == count:
        return content
    return RecordDict({**content, name: MetricRecord({**metrics, weighted_by: count})})


def comparable_metrics(contents: Sequence[RecordDict]) -> tuple[list[RecordDict], list[str], int]:
    """Return contents whose MetricRecords all have the same keys, the keys dropped for it, and how many left out.

    What more than half of them have stays, and who lacks any of it is left out: one client with other metrics takes
    nobody else's away.

    Parameters
    ----------
    contents : Sequence[RecordDict]
        Each with one MetricRecord; not changed.
    """

    def kind(value: Any) -> int:
        return len(value) if isinstance(value, list) else -1

    records = [next(iter(records_of(content, MetricRecord).values())) for content in contents]
    kinds = [{(key, kind(value)) for key, value in record.items()} for record in records]
    times = Counter(each for found in kinds for each in found)
    common = {each for each, count in times.items() if 2 * count > len(records)}
    keys = {key for key, _ in common}
    dropped = sorted({key for key, _ in times} - keys)
    kept = []
    for content, record, found in zip(contents, records, kinds, strict=True):
        if not common <= found:
            continue
        if found != common:
            name = next(iter(records_of(content, MetricRecord)))
            metrics = MetricRecord({key: value for key, value in record.items() if key in keys})
            content = RecordDict({**content, name: metrics})
        kept.append(content)
    return kept, dropped, len(contents) - len(kept)
