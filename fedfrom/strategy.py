"""FedFroM and FedMerge: Flower strategies that merge what the clients send instead of averaging it.

A round: `configure_train` sends the global arrays; `aggregate_train` reads each reply as a state or rejects it with a
reason, hands the states to `merge`, and returns the merged state in the shapes that the clients have.
"""

from __future__ import annotations

import inspect
import logging
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedfrom.closest import did_you_mean
from fedfrom.loop import STORAGE, RoundLoop
from fedfrom.merging import MergeReport, methods
from fedfrom.merging.clients import Client, Round
from fedfrom.merging.inputs import check_clip, check_safe, check_server_lr
from fedfrom.merging.linalg.blocks import Empty
from fedfrom.merging.linalg.threads import one_thread_each
from fedfrom.merging.merge import merge_clients
from fedfrom.merging.methods.base import Method
from fedfrom.merging.methods.registry import make_method, method_options
from fedfrom.merging.peft import layers as L
from fedfrom.merging.peft.configs import check_config
from fedfrom.merging.selection import gram_of_updates, multikrum
from fedfrom.merging.weighing import stable
from fedfrom.rounds import RoundReport
from fedfrom.settings import check_fedavg, check_screening
from fedfrom.skipped import Skipped, check_max_skipped
from fedfrom.wire.adapter_configs import ADAPTER_KEY, config_to_record
from fedfrom.wire.contents import array_bytes
from fedfrom.wire.failures import failure
from fedfrom.wire.frozen import FROZEN_KEY, check_frozen, frozen_record
from fedfrom.wire.metrics import average_metrics, average_train_metrics, check_metrics, count_examples, with_examples
from fedfrom.wire.outgoing import Outgoing
from fedfrom.wire.pulling import Arriving
from fedfrom.wire.ranks import NodeRanks
from fedfrom.wire.rejections import log_rejected
from fedfrom.wire.reply import RejectedReply, Rejection, Reply
from fedfrom.wire.room import Room, damaged, discard
from fedfrom.wire.screening import screen
from fedfrom.wire.sent import Sent
from fedfrom.wire.wording import num_replies, one_line

log = logging.getLogger("flwr")  # where Flower's own strategies log
_FEDAVG = set(inspect.signature(FedAvg.__init__).parameters) - {"self"}
_SCREENING = {"clip", "examples_cap", "min_valid_replies", "select", "attackers"}
_OWN = {"server_lr", "lora_config", "frozen", "seed", "dora", "same_base", *_SCREENING, *STORAGE}


class FedMerge(RoundLoop):
    """FedAvg with its averaging replaced by any of fedfrom's merging methods.

    Parameters
    ----------
    method : str | Method (default: "from")
        A name of `fedfrom.methods()`, with its options as further keywords, or a method object.
    server_lr : float | str (default: 1.0)
        alpha >= 0: the new global model is W + alpha theta*. "safe" lowers it, layer by layer, where rounds might
        swing.
    clip : float | None (default: None)
        No client's update of a layer counts for more than so many times the median norm there: see `merge`.
    examples_cap : float | None (default: 10.0)
        No client's num-examples counts for more than so many times the median of the round's valid replies, neither
        in weights nor in the averages of metrics. None: no bound.
    min_valid_replies : int (default: 1)
        With fewer valid replies a round is skipped, and the global arrays stay.
    max_skipped : int | None (default: 3)
        After so many rounds in a row whose replies were all rejected `start` raises RuntimeError, with the most
        frequent reason: clients and server don't fit each other. Rounds without replies neither count nor end the row;
        a valid reply ends it. None: no bound. A run in which replies were rejected and no round merged anything is
        the same error at its end, whatever the bound.
    select : str | None (default: None)
        "multikrum" merges only the n - f of n valid replies whose whole updates are closest to others', adapters as
        products: see `fedfrom.merging.selection`. A round with n < 2f + 3 is skipped.
    attackers : int (default: 0)
        f, how many attackers `select` reckons with in a round. Replies that are rejected before count among them.
    lora_config : LoraConfig | Mapping | None (default: None)
        The global adapter's config. Needed where clients have other ranks or alphas than it; without it all clients
        must have the global adapter's rank, one scaling is assumed, and cancels. With it, a client of a smaller rank
        that has replied once (`fedfrom.client`) is sent no more than the leading ranks that it uses.
    frozen : str | Collection[str] (default: ())
        Keys of tensors that clients never train, or patterns of them as `fnmatch` has them ("*embeddings*"). They are
        sent with the others and stay as they are, to the bit: `fedfrom.client` sends none of them back, and what
        other clients send of them is not looked at.
    seed : int (default: 0)
        Of the sampling of nodes, and the method's.
    node_timeout : float (default: 3600)
        Seconds to wait for enough nodes in a round, before RuntimeError ends the run.
    memory_budget : float | None (default: 4 GiB)
        Bytes of a round's replies that are kept in memory. What comes beyond is written to disk as it comes, and merged
        from there a block at a time, to the same bits; a reply that the disk does not take is rejected. None: all are
        kept in memory, as are those that a strategy around this one hands over in a list.
    spool : str | Path | None (default: None)
        The folder for that; None is the one for temporary files. The files have no names, and are gone after the round
        or with the process.
    on_round : Callable[[RoundReport], object] | None (default: None)
        Called with the report of each round once it is over, `scores` filled in: for TensorBoard and the like. What it
        raises is logged as an error, and training goes on.
    dora, same_base : bool (default: False)
        Accept DoRA, and initialisations that alter the base model: see `fedfrom.merging.peft.configs.check_config`.
    checkpoint : str | Path | None (default: None)
        A folder of this run's own. After every round its state is written there, and a run that starts with the same
        folder goes on after the last whole round: see `start`, which strategies that wrap this one replace.
    checkpoints_kept : int (default: 2)
        How many of the newest checkpoints stay; the disk needs room for one more.
    **options
        The method's, where it is given by name; the rest is FedAvg's.

    Attributes
    ----------
    reports : dict[int, RoundReport]
        What each training round's merge did, by round.

    Raises
    ------
    ValueError
        A setting is out of range or unknown.
    """

    def __init__(
        self,
        method: str | Method = "from",
        *,
        server_lr: float | str = 1.0,
        clip: float | None = None,
        examples_cap: float | None = 10.0,
        min_valid_replies: int = 1,
        max_skipped: int | None = 3,
        select: str | None = None,
        attackers: int = 0,
        lora_config: Any = None,
        frozen: str | Collection[str] = (),
        seed: int = 0,
        node_timeout: float = 3600,
        memory_budget: float | None = 4 * 2**30,
        spool: str | Path | None = None,
        on_round: Callable[[RoundReport], object] | None = None,
        dora: bool = False,
        same_base: bool = False,
        checkpoint: str | Path | None = None,
        checkpoints_kept: int = 2,
        **options: Any,
    ) -> None:
        fedavg = {name: options.pop(name) for name in _FEDAVG & options.keys()}
        check_fedavg(fedavg)
        super().__init__(**fedavg)
        if isinstance(method, str) and method in methods():
            known = method_options(method)
            if unknown := sorted(options.keys() - known):
                expected = sorted(known | _OWN | _FEDAVG)
                meant = did_you_mean(unknown, [*expected, *inspect.signature(type(self)).parameters])
                if "grid" in unknown and "search" in known:
                    meant = "; the k to try are search={'k': ...}"
                raise ValueError(
                    f"{type(self).__name__}: expected {', '.join(expected)}, found {', '.join(unknown)}{meant}"
                )
            if "seed" in known:
                options.setdefault("seed", seed)
        self.method = make_method(method, **options)
        check_server_lr(server_lr)
        check_safe(server_lr, self.method.candidates())
        check_clip(clip)
        check_screening(examples_cap, min_valid_replies, select, attackers)
        self.server_lr, self.clip = server_lr, clip
        if not node_timeout >= 0:
            raise ValueError(f"node_timeout: expected seconds >= 0, found {node_timeout!r}")
        self.examples_cap, self.min_valid_replies = examples_cap, min_valid_replies
        check_max_skipped(max_skipped)
        self.max_skipped = max_skipped
        self.select, self.attackers = select, attackers
        self.seed, self.node_timeout = seed, node_timeout
        if memory_budget is not None and (not isinstance(memory_budget, int | float) or not memory_budget >= 0):
            raise ValueError(f"memory_budget: expected bytes >= 0 or None, found {memory_budget!r}")
        self.memory_budget, self.spool = memory_budget, spool
        if on_round is not None and not callable(on_round):
            raise ValueError(f"on_round: expected a function that takes a round's report, or None, found {on_round!r}")
        self.on_round = on_round
        self.dora, self.same_base = dora, same_base
        self.lora_config = None if lora_config is None else check_config(lora_config, "lora_config", dora, same_base)
        self.frozen = check_frozen(frozen)
        if not isinstance(checkpoints_kept, int) or checkpoints_kept < 1:
            raise ValueError(f"checkpoints_kept: expected a whole number >= 1, found {checkpoints_kept!r}")
        self.checkpoint, self.checkpoints_kept = checkpoint, checkpoints_kept
        self.reports: dict[int, RoundReport] = {}
        self._ranks, self._skipped = NodeRanks(), Skipped()
        self._sent: Sent | None = None
        self._asked: list[Message] = []
        self._warned = False

    def summary(self) -> None:
        """Log the strategy's settings: its own, then FedAvg's."""
        names = ("clip", "examples_cap", "min_valid_replies", "max_skipped", "select", "frozen")
        settings = {
            "server_lr": self.server_lr,
            **{name: getattr(self, name) for name in names},
            "seed": self.seed,
            "lora_config": self.lora_config is not None,
            "checkpoint": self.checkpoint,
        }
        log.info("\t├──> Merging: %s", ", ".join(f"{name}: {value}" for name, value in self.method.settings().items()))
        if self.method.k == float("inf") and self.method.scope == "layer" and self.clip is not None:
            shared = "in each layer the updates that clip shortens share the weight; clip=None gives it to the largest"
            log.info("\t│\t├── k is infinite: %s", shared)
        log.info("\t│\t└── %s", ", ".join(f"{name}: {value}" for name, value in settings.items()))
        super().summary()

    # --- Sending -----------------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Sample nodes and send them the global arrays, which the replies will be compared with."""
        cuts = self._ranks.known()
        self._sent = Sent.check(arrays, self.lora_config, self.method, self.dora, self.frozen, cuts)
        share, least = self.fraction_train, self.min_train_nodes
        self._asked = self._messages(server_round, arrays, config, grid, MessageType.TRAIN, share, least)
        return self._asked

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Sample nodes and send them the global arrays to evaluate."""
        share, least = self.fraction_evaluate, self.min_evaluate_nodes
        return self._messages(server_round, arrays, config, grid, MessageType.EVALUATE, share, least)

    def _messages(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
        message_type: str,
        share: float,
        least: int,
    ) -> list[Message]:
        if share == 0.0:
            return []
        config["server-round"] = server_round
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        if self.lora_config is not None:
            layers = L.find_layers(arrays, "global arrays")
            modules = [name for name, layer in layers.items() if layer.is_adapter]
            content[ADAPTER_KEY] = config_to_record(self.lora_config, modules)
        if message_type == MessageType.TRAIN and self._sent is not None and self._sent.frozen:
            content[FROZEN_KEY] = frozen_record(self._sent.frozen)
        node_ids = self._sample(server_round, grid, message_type, share, least)
        return [
            Message(RecordDict({**content, self.arrayrecord_key: own}), dst_node_id=node_id, message_type=message_type)
            for node_id, own in self._ranks.cut(arrays, node_ids).items()
        ]

    def _sample(self, server_round: int, grid: Grid, message_type: str, share: float, least: int) -> list[int]:
        """Return node ids, drawn by the seed and the round from the nodes in the order they registered."""
        start = time.monotonic()
        while True:
            nodes = sorted(grid.get_nodes(), key=lambda node: (node.registered_at, node.node_id))
            size = max(int(len(nodes) * share), least)
            required = max(self.min_available_nodes, size)
            if len(nodes) >= required:
                break
            if time.monotonic() - start >= self.node_timeout:
                raise RuntimeError(
                    f"round {server_round}: expected {required} nodes within {self.node_timeout:g} s, found "
                    f"{len(nodes)}: start more, or lower min_available_nodes and min_train_nodes, or raise node_timeout"
                )
            log.info("Waiting for nodes to connect: %d connected (minimum required: %d).", len(nodes), required)
            time.sleep(1)
        drawn = random.Random(f"{self.seed}:{server_round}:{message_type}").sample(nodes, size)
        log.info("configure_%s: Sampled %d nodes (out of %d)", message_type, len(drawn), len(nodes))
        return [node.node_id for node in drawn]

    # --- Merging -----------------------------------------------------------------------------------------------------

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge the valid replies; with too few, log it and return None for the arrays: the global ones stay."""
        if self._sent is None:
            raise RuntimeError("aggregate_train: expected configure_train to have sent the global arrays before")
        if not self._asked:
            return None, None
        arriving = Arriving(replies)
        valid, rejected = screen(
            arriving, self._sent, self.arrayrecord_key, self.weighted_by_key, self.method.needs, self._room(replies)
        )
        self._ranks.hear((message.metadata.dst_node_id for message in self._asked), valid, self._sent)
        arriving.log("aggregate_train")
        log_rejected("aggregate_train", rejected)  # before what comes of it
        try:
            return self._aggregate(server_round, self._sent, valid, rejected, arriving)
        finally:
            discard(valid)

    def _room(self, replies: Iterable[Message]) -> Room | None:
        """Return where states are kept; None is in memory, where a list of replies already is."""
        if self.memory_budget is None or isinstance(replies, Sequence):
            return None
        return Room(self.memory_budget, Path(tempfile.gettempdir() if self.spool is None else self.spool))

    def _aggregate(
        self,
        server_round: int,
        sent: Sent,
        valid: list[Reply],
        rejected: dict[int, Rejection],
        arriving: Arriving,
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge the valid replies, and report on all of them."""
        merged, report, examples, failed_by = None, None, [reply.examples for reply in valid], ""
        outgoing, unselected = Outgoing(), dict[int, Rejection]()
        try:
            if len(valid) < self.min_valid_replies:
                least = num_replies(self.min_valid_replies, "valid ")
                if valid:
                    failed_by = f"expected at least {least}, found {len(valid)}"
                log.warning("aggregate_train: expected at least %s, found %d", least, len(valid))
            else:
                valid, unselected = self._selected(valid, sent, self.attackers - len(rejected))
                rejected |= unselected
                said = [(reply.node_id, reply.examples) for reply in valid]
                examples = count_examples("aggregate_train", said, self.examples_cap, self.weighted_by_key)
                merged, report = self._merge(valid, sent, examples, outgoing)
        except ValueError as error:
            if lost := damaged(valid):  # the others are as good as they were
                rest = [reply for reply in valid if reply.node_id not in lost]
                log_rejected("aggregate_train", lost)
                return self._aggregate(server_round, sent, rest, rejected | lost, arriving)
            failed_by = one_line(str(error))
            log.error("aggregate_train: %s", error)
        except (RuntimeError, MemoryError) as error:  # torch's: no memory, a factorisation that fails
            failed_by = one_line(f"{type(error).__name__}: {error}")
            log.exception("aggregate_train: the merge failed")
        log_rejected("aggregate_train", unselected)
        failed = {self._answers_for(message): failure(message) for message in arriving.failures}
        if failed and not valid and not rejected:
            reason = Counter(failed.values()).most_common(1)[0][0]
            node_id = next(node_id for node_id, found in failed.items() if found == reason)
            failed_by = f"{num_replies(len(failed))}, errors alone, such as node {node_id}'s: {reason}"
        self._skipped = self._skipped.after(
            merged=merged is not None, valid=bool(valid), rejected=rejected, failure=failed_by
        )
        if merged is None:
            log.warning("aggregate_train: round %d is skipped, the global arrays stay as they are", server_round)
        asked = {message.metadata.dst_node_id for message in self._asked}
        self.reports[server_round] = found = RoundReport(
            # a greedy soup leaves some out
            [reply.node_id for reply in valid if report is not None and reply.who in report.clients],
            len(valid),
            {node_id: reason for node_id, (_, reason) in rejected.items()},
            failed,
            sorted(asked - {*(reply.node_id for reply in valid), *rejected, *failed}),
            report,
            arriving.seconds(),
            dict(Counter(sorted(kind for kind, _ in rejected.values()))),
            sum(reply.examples != count for reply, count in zip(valid, examples, strict=True)),
            sum(array_bytes(message.content) for message in self._asked),
            arriving.bytes,
            server_round,
        )
        if merged is None or report is None:
            return None, found.metrics()
        self._warn_of_swinging(report)
        metrics = average_train_metrics(valid, examples, self.weighted_by_key, self.train_metrics_aggr_fn)
        metrics.update(found.metrics())
        return sent.whole(outgoing.record(merged)), metrics

    def _answers_for(self, error: Message) -> int:
        """Return the node that an error is about: the SuperLink says in its own name that a node is lost."""
        if error.metadata.src_node_id != SUPERLINK_NODE_ID:
            return error.metadata.src_node_id
        asked = {message.metadata.message_id: message.metadata.dst_node_id for message in self._asked}
        return asked.get(error.metadata.reply_to_message_id, error.metadata.src_node_id)

    def _clients(self, replies: Sequence[Reply], sent: Sent, examples: Sequence[float] | None = None) -> list[Client]:
        """Return the replies as a merge takes them, each with its config and what it was sent."""
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

    def _round(self, sent: Sent, empty: Empty = torch.empty) -> Round:
        """Return what the clients of a round share."""
        return Round(
            sent.state,
            sent.lora_config,
            self.server_lr,
            self.clip,
            as_reference=True,
            dora=self.dora,
            same_base=self.same_base,
            empty=empty,
        )

    def _selected(self, replies: list[Reply], sent: Sent, attackers: int) -> tuple[list[Reply], dict[int, Rejection]]:
        """Return the replies that `select` keeps where so many may be attackers', and why not the others."""
        if self.select is None or attackers <= 0:
            return replies, {}
        with one_thread_each():
            inner = gram_of_updates(self._clients(replies, sent), self._round(sent))
        kept = set(multikrum(inner, attackers))
        reason = f"select: expected an update among the {len(kept)} closest to others, found it further away"
        others = {r.node_id: Rejection("unselected", reason) for i, r in enumerate(replies) if i not in kept}
        return [reply for i, reply in enumerate(replies) if i in kept], others

    def _merge(
        self, replies: list[Reply], sent: Sent, examples: list[float], outgoing: Outgoing
    ) -> tuple[dict[str, torch.Tensor], MergeReport]:
        """Merge the replies by the method, into the memory that the global arrays leave in."""
        shared = self._round(sent, outgoing.empty)
        return merge_clients(self._clients(replies, sent, examples), shared, sent.scoring(self.method))

    def _warn_of_swinging(self, report: MergeReport) -> None:
        """Log, once, that a layer's step may be beyond the bound alpha c (1 + k lambda_max) < 2 at c = 1."""
        clients = len(report.clients)
        beyond = [
            layer.server_lr * (1 + float(layer.k) * layer.lambda_max)
            for layer in report.layers
            if layer.is_update and not stable(layer.server_lr, float(layer.k), layer.lambda_max, clients)
        ]
        if beyond and not self._warned:
            self._warned = True
            log.warning(
                "aggregate_train: server_lr (1 + k lambda_max) reaches %.2f: at 2 and more, clients whose updates "
                "oppose each other can make rounds swing for ever; if the scores do, lower k, or say server_lr='safe' "
                "(where k is finite)",
                max(beyond),
            )

    # --- Metrics -----------------------------------------------------------------------------------------------------

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Average the metrics of the valid evaluate replies, as FedAvg does; None where there is none."""
        arriving = Arriving(replies)
        valid = []
        for message in arriving:
            node_id = message.metadata.src_node_id
            try:
                metrics = check_metrics(message.content, self.weighted_by_key)
                examples: Any = metrics[self.weighted_by_key]
                valid.append((repr(sorted(metrics.items())), message.content, (node_id, float(examples))))
            except RejectedReply as error:
                log.warning("aggregate_evaluate: rejected node %d: %s", node_id, error)
        arriving.log("aggregate_evaluate")
        if not valid:
            return None
        valid.sort(key=lambda reply: reply[0])
        said = [each for _, _, each in valid]
        counts = count_examples("aggregate_evaluate", said, self.examples_cap, self.weighted_by_key)
        contents = [
            with_examples(content, self.weighted_by_key, count)
            for (_, content, _), count in zip(valid, counts, strict=True)
        ]
        return average_metrics(contents, self.weighted_by_key, self.evaluate_metrics_aggr_fn)

    # --- What is carried from round to round --------------------------------------------------------------------------

    def begin(self) -> None:
        """Forget all that was carried from an earlier run."""
        self.reports, self._warned, self._ranks = {}, False, NodeRanks()

    def state(self) -> dict[str, Any]:
        """Return what this object carries from round to round, as plain data with str keys: part of a checkpoint.

        A subclass that carries more adds to it, and takes it out again in `restore`.
        """
        reports = {str(server_round): report.to_dict() for server_round, report in self.reports.items()}
        return {
            "warned": self._warned,
            "reports": reports,
            "ranks": self._ranks.state(),
            "skipped": self._skipped.to_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned when the checkpoint was written."""
        self._warned = state["warned"]
        self._ranks.restore(state.get("ranks", NodeRanks().state()))  # a subclass may keep a state of its own
        self._skipped = Skipped.from_dict(state.get("skipped", Skipped().to_dict()))
        self.reports = {int(number): RoundReport.from_dict(report) for number, report in state["reports"].items()}


class FedFroM(FedMerge):
    """FedAvg with FroM in place of averaging: each client's update of each layer counts by its norm to the power k.

    A drop-in for FedAvg: any client app that replies with a PEFT adapter's state dict, a full state dict, or both,
    works unchanged. Adapters are merged as products BA (Eq. 6), never factor by factor.

    Parameters
    ----------
    k : float | str (default: 0.5)
        Power of the norm, k >= 0; 0 with examples_power 1, and clip and examples_cap None, is exactly FedAvg, on
        products. The paper's is 1. Infinity is the largest update alone only with clip=None: clipping comes first, and
        updates that it shortens to the same norm share the weight. "auto" takes in each round the k of `search` whose
        merged state `validate` scores best, within bounds: see `FroM`.
    examples_power : float (default: 0.5)
        p, the power of each client's number of examples. The paper's is 0.
    rank : int | float | None (default: None)
        Caps the rank of the merged product; the arrays keep the shapes that the clients have.
    solver : str (default: "svd")
        "svd", the global optimum of Eq. 6, or "alternating", the paper's Algorithm 1.
    scope : str (default: "layer")
        "layer", the paper's, or "model": one weight a client from the norm of its whole update.
    iterations, tolerance
        Algorithm 1's, with its defaults: see `fedfrom.merging.solve.Solver`.
    validate, search
        For k="auto": a function from a global state (key -> tensor) to its score, and what to choose from, such as
        {"k": (0, 0.5, 1)}. Where the function raises, or returns no number, the round is skipped with that reason.
    clip : float | None (default: 1.0)
        No client's update of a layer counts for more than so many times the median norm there; None: no bound. Comes
        before the weights: with k = infinity and norms 1, 2, 3, 4 the weights are 0, 0, 1/2, 1/2 at the default.
    examples_cap : float | None (default: 3.0)
        No client's num-examples counts for more than so many times the round's median; None: no bound.
    server_lr, min_valid_replies, max_skipped, select, attackers, lora_config, frozen, seed, node_timeout
        See `FedMerge`.
    dora, same_base, memory_budget, spool, on_round, checkpoint, checkpoints_kept
        See `FedMerge`.
    **fedavg
        FedAvg's arguments, passed on.
    """

    def __init__(
        self,
        *,
        k: float | str = 0.5,
        examples_power: float = 0.5,
        rank: int | float | None = None,
        solver: str = "svd",
        scope: str = "layer",
        clip: float | None = 1.0,
        examples_cap: float | None = 3.0,
        **others: Any,
    ) -> None:
        if "method" in others:
            raise ValueError(
                f"method: expected none, as FedFroM merges with FroM, found {others['method']!r}: say "
                f"FedMerge({others['method']!r})"
            )
        super().__init__(
            "from",
            clip=clip,
            examples_cap=examples_cap,
            k=k,
            examples_power=examples_power,
            rank=rank,
            solver=solver,
            scope=scope,
            **others,
        )
