"""FedMerge and FedFroM: Flower strategies that merge the clients' models or adapters instead of averaging them.

In a round `configure_train` sends the global arrays to a sample of nodes, and `aggregate_train` turns the replies into
new global arrays. `configure_evaluate` and `aggregate_evaluate` do FedAvg's part for evaluation. `start`, the loop over
rounds, is in `fedfrom.loop`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Unpack, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedfrom.keywords import Aggregate, FedAvgArguments, FroMArguments, MergeArguments
from fedfrom.loop import RoundLoop
from fedfrom.merging.methods.base import Method
from fedfrom.merging.peft.configs import check_config
from fedfrom.outcome import Outcome, merge_replies
from fedfrom.rounds import RoundReport
from fedfrom.settings import FEDAVG, check_fedavg, check_merge, check_run, check_screening, log_settings, method_from
from fedfrom.skipped import Skipped
from fedfrom.swinging import warn_of_swinging
from fedfrom.wire.adapter_configs import ADAPTER_KEY, adapter_record
from fedfrom.wire.clients import as_round
from fedfrom.wire.failures import failures_by_node
from fedfrom.wire.frozen import FROZEN_KEY, check_frozen, frozen_record
from fedfrom.wire.metrics import average_evaluate_metrics, average_train_metrics
from fedfrom.wire.pulling import Arriving
from fedfrom.wire.ranks import NodeRanks
from fedfrom.wire.rejections import log_rejected
from fedfrom.wire.room import discard, room_for
from fedfrom.wire.sampling import sample_nodes
from fedfrom.wire.screening import screen
from fedfrom.wire.sent import Sent

log = logging.getLogger("flwr")  # where Flower's own strategies log


class FedMerge(RoundLoop):
    """FedAvg with its averaging replaced by any of fedfrom's merging methods.

    Parameters
    ----------
    method : str | Method (default: "from")
        A name of `fedfrom.methods()`, with the method's options as further keywords, or a method object.
    server_lr : float | str (default: 1.0)
        alpha >= 0: the new global model is W + alpha theta*. "safe" lowers alpha in layers where rounds might swing.
    clip : float | None (default: None)
        Each client's update of a layer is shortened to at most this multiple of the median norm there: see `merge`.
    examples_cap : float | None (default: 10.0)
        Each num-examples counts for at most this multiple of the valid replies' median, in weights and in the averages
        of metrics. None is no bound.
    min_valid_replies : int (default: 1)
        A round with fewer valid replies is skipped: the global arrays stay.
    max_skipped : int | None (default: 3)
        `start` raises RuntimeError, with the most frequent reason, after this number of rounds in a row whose replies
        were all rejected (rounds without replies don't count), or at the end of a run that merged nothing because of
        rejections: clients and server do not fit each other. None is no bound on rounds in a row.
    select : str | None (default: None)
        "multikrum" merges only the n - f of n >= 2f + 3 valid replies whose whole updates are closest to others'.
    attackers : int (default: 0)
        f, the number of attackers in a round that `select` allows for. Replies rejected before it count among them.
    lora_config : LoraConfig | Mapping | None (default: None)
        The global adapter's config: clients may then have other ranks and alphas, and one of a smaller rank that has
        replied once is sent only the leading ranks that it uses. None: all must have the global adapter's rank.
    frozen : str | Collection[str] (default: ())
        Keys of tensors that clients never train, or `fnmatch` patterns of keys ("*embeddings*"). They keep their
        bits. `fedfrom.client` does not send them back; other clients' are ignored.
    seed : int (default: 0)
        Seed of the sampling of nodes, and of the method.
    node_timeout : float (default: 3600)
        Seconds to wait for enough nodes in a round, before RuntimeError ends the run.
    memory_budget : float | None (default: 4 GiB)
        Bytes of a round's replies that are kept in memory. Further replies go to disk as they come, and are merged from
        there a block at a time, to the same bits; one that cannot be written is rejected. None: all stay in memory.
    spool : str | Path | None (default: None)
        Folder for replies on disk; None is the one for temporary files. The files are gone with the round or process.
    on_round : Callable[[RoundReport], object] | None (default: None)
        Called with each round's report, scores included, once the round is over. An exception in it is only logged.
    dora, same_base : bool (default: False)
        Accept DoRA, and initialisations that alter the base model: see `fedfrom.merging.peft.configs.check_config`.
    checkpoint : str | Path | None (default: None)
        A folder of this run's own, where its state is written after every round. A run that starts with the same folder
        goes on after the last whole round: see `start`.
    checkpoints_kept : int (default: 2)
        Number of newest checkpoints that stay; the disk needs room for one more.
    **others
        FedAvg's arguments, and where the method is given by name its options.

    Attributes
    ----------
    reports : dict[int, RoundReport]
        The report of each training round, by round.

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
        **others: Unpack[MergeArguments],
    ) -> None:
        fedavg = {name: value for name, value in others.items() if name in FEDAVG}
        check_fedavg(fedavg)
        super().__init__(**cast(FedAvgArguments, fedavg))
        options = {name: value for name, value in others.items() if name not in FEDAVG}
        self.method = method_from(method, options, seed, type(self), FedMerge)
        self.server_lr, self.clip = check_merge(self.method, server_lr, clip)
        check_screening(examples_cap, min_valid_replies, select, attackers)
        check_run(
            node_timeout, memory_budget, on_round, max_skipped, checkpoints_kept, spool=spool, checkpoint=checkpoint
        )
        self.examples_cap, self.min_valid_replies, self.max_skipped = examples_cap, min_valid_replies, max_skipped
        self.select, self.attackers, self.dora, self.same_base = select, attackers, dora, same_base
        self.lora_config = None if lora_config is None else check_config(lora_config, "lora_config", dora, same_base)
        self.frozen = check_frozen(frozen)
        self.seed, self.node_timeout, self.on_round = seed, node_timeout, on_round
        self.memory_budget, self.spool = memory_budget, spool
        self.checkpoint, self.checkpoints_kept = checkpoint, checkpoints_kept
        # carried from round to round: see `state`
        self.reports: dict[int, RoundReport] = {}
        self._skipped, self._ranks, self._warned = Skipped(), NodeRanks(), False
        # what configure_train sent, and its messages, for aggregate_train
        self._sent: Sent | None = None
        self._asked: list[Message] = []

    def summary(self) -> None:
        """Log the strategy's settings: its own, then FedAvg's."""
        log_settings(self)
        super().summary()

    # --- Training ----------------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Sample nodes and send them the global arrays, which their replies will be compared with."""
        self._sent = Sent.check(arrays, self.lora_config, self.method, self.dora, self.frozen, self._ranks.known())
        self._asked = self._messages(MessageType.TRAIN, server_round, arrays, config, grid, self._sent.frozen)
        return self._asked

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge the valid replies into the new global arrays; None where nothing is merged: the global arrays stay.

        `screen` turns each reply, as it arrives, into a `Reply` or into a `Rejection` with its reason. `merge_replies`
        merges the valid ones, or finds the reason why not. Its `Outcome` goes into the round's report, the metrics, and
        the count of skipped rounds, which may end the run.
        """
        if self._sent is None:
            raise RuntimeError("aggregate_train: expected configure_train to have sent the global arrays before")
        if not self._asked:
            return None, None
        sent, arriving = self._sent, Arriving(replies)
        room = room_for(replies, self.memory_budget, self.spool)
        valid, rejected = screen(arriving, sent, self.arrayrecord_key, self.weighted_by_key, self.method.needs, room)
        self._ranks.hear((message.metadata.dst_node_id for message in self._asked), valid, sent)  # for the next cuts
        arriving.log("aggregate_train")  # all have been read
        log_rejected("aggregate_train", rejected)
        shared = as_round(sent, self.server_lr, self.clip, self.dora, self.same_base)
        try:
            outcome = merge_replies(
                Outcome(valid, rejected),
                sent,
                self.method,
                shared,
                least=self.min_valid_replies,
                attackers=0 if self.select is None else self.attackers,
                examples_cap=self.examples_cap,
                weighted_by=self.weighted_by_key,
            )
        finally:
            discard(valid)  # closes their files on disk
        failed = failures_by_node(arriving.failures, self._asked)
        self._skipped = self._skipped.after(outcome, failed)
        self.reports[server_round] = RoundReport.of(server_round, outcome, failed, self._asked, arriving)
        figures = self.reports[server_round].metrics()
        if outcome.merge is None:
            log.warning("aggregate_train: round %d is skipped, the global arrays stay as they are", server_round)
            return None, figures
        self._warned = self._warned or warn_of_swinging(outcome.merge)
        aggregate = self.train_metrics_aggr_fn
        metrics = average_train_metrics(outcome.valid, outcome.examples, self.weighted_by_key, aggregate)
        metrics.update(figures)
        return outcome.arrays, metrics

    # --- Evaluation --------------------------------------------------------------------------------------------------

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Sample nodes and send them the global arrays to evaluate."""
        return self._messages(MessageType.EVALUATE, server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Average the metrics of the valid evaluate replies, as FedAvg does; None where there is none."""
        arriving = Arriving(replies)
        messages = list(arriving)
        arriving.log("aggregate_evaluate")
        aggregate = self.evaluate_metrics_aggr_fn
        return average_evaluate_metrics(messages, self.weighted_by_key, self.examples_cap, aggregate)

    def _messages(
        self,
        message_type: str,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
        frozen: Collection[str] = (),
    ) -> list[Message]:
        """Return a message for each sampled node, with the leading ranks alone where the node's rank is smaller."""
        is_train = message_type == MessageType.TRAIN
        share = self.fraction_train if is_train else self.fraction_evaluate
        least = self.min_train_nodes if is_train else self.min_evaluate_nodes
        if share == 0.0:
            return []
        config["server-round"] = server_round
        told = {self.configrecord_key: config}
        if self.lora_config is not None:
            told[ADAPTER_KEY] = adapter_record(self.lora_config, arrays, "global arrays")
        if frozen:
            told[FROZEN_KEY] = frozen_record(frozen)
        available, seed, timeout = self.min_available_nodes, self.seed, self.node_timeout
        node_ids = sample_nodes(grid, server_round, message_type, share, least, available, seed, timeout)
        return [
            Message(RecordDict({self.arrayrecord_key: own, **told}), dst_node_id=node_id, message_type=message_type)
            for node_id, own in self._ranks.cut(arrays, node_ids).items()
        ]

    # --- What is carried from round to round --------------------------------------------------------------------------

    def begin(self) -> None:
        """Forget what was carried from an earlier run."""
        super().begin()
        self._ranks, self._warned = NodeRanks(), False

    def state(self) -> dict[str, Any]:
        """Return what is carried, as plain data with str keys: part of a checkpoint. A subclass may add to it."""
        return {**super().state(), "ranks": self._ranks.state(), "warned": self._warned}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned when the checkpoint was written."""
        super().restore(state)
        self._ranks.restore(state.get("ranks", NodeRanks().state()))  # a subclass may keep a state of its own
        self._warned = state["warned"]


class FedFroM(FedMerge):
    """FedAvg with FroM in place of averaging: each client's update of each layer counts by its norm to the power k.

    A drop-in for FedAvg: its arguments come first, in its order, so that FedFroM(0.5) trains on half of the nodes. Any
    client app that replies with a PEFT adapter's state dict, a full state dict, or both, works unchanged. Adapters are
    merged as products BA (Eq. 6), never factor by factor.

    Parameters
    ----------
    fraction_train, fraction_evaluate, min_train_nodes, min_evaluate_nodes, min_available_nodes
    weighted_by_key, arrayrecord_key, configrecord_key, train_metrics_aggr_fn, evaluate_metrics_aggr_fn
        FedAvg's.
    k : float | str (default: 0.5)
        Power of the norm: 1 in the paper; -1 weighs by inverse norms. With examples_power 1, clip and examples_cap
        None, k = 0 is FedAvg, on products. Infinity with clip=None is the largest update alone. "auto" takes in each
        round the k of `search` whose merged state `validate` scores best, within bounds: see `FroM`.
    examples_power : float (default: 0.5)
        p, the power of each client's number of examples. The paper's is 0.
    rank : int | float | None (default: None)
        Caps the rank of the merged product; the arrays keep the shapes that the clients have.
    clip : float | None (default: 1.0)
        See `FedMerge`. Clipping comes before the weights, and updates shortened to the same norm share the weight: with
        k = infinity and norms 1, 2, 3, 4 the weights are 0, 0, 1/2, 1/2 at the default.
    examples_cap : float | None (default: 3.0)
        See `FedMerge`.
    solver, scope, gauge, coefficient, iterations, tolerance, validate, search
        Of the method: see `FroM`. Where `validate` raises or returns no number, the round is skipped with that reason.
    server_lr, min_valid_replies, max_skipped, select, attackers, lora_config, frozen, seed, node_timeout
    dora, same_base, memory_budget, spool, on_round, checkpoint, checkpoints_kept
        See `FedMerge`.
    """

    def __init__(
        self,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_train_nodes: int = 2,
        min_evaluate_nodes: int = 2,
        min_available_nodes: int = 2,
        weighted_by_key: str = "num-examples",
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        train_metrics_aggr_fn: Aggregate | None = None,
        evaluate_metrics_aggr_fn: Aggregate | None = None,
        *,
        k: float | str = 0.5,
        examples_power: float = 0.5,
        rank: float | None = None,
        clip: float | None = 1.0,
        examples_cap: float | None = 3.0,
        **others: Unpack[FroMArguments],
    ) -> None:
        if "method" in (given := cast(dict[str, Any], others)):
            found = repr(given["method"])
            raise ValueError(f"method: expected none, FroM is FedFroM's own, found {found}: say FedMerge({found})")
        super().__init__(
            "from",
            fraction_train=fraction_train,
            fraction_evaluate=fraction_evaluate,
            min_train_nodes=min_train_nodes,
            min_evaluate_nodes=min_evaluate_nodes,
            min_available_nodes=min_available_nodes,
            weighted_by_key=weighted_by_key,
            arrayrecord_key=arrayrecord_key,
            configrecord_key=configrecord_key,
            train_metrics_aggr_fn=train_metrics_aggr_fn,
            evaluate_metrics_aggr_fn=evaluate_metrics_aggr_fn,
            k=k,
            examples_power=examples_power,
            rank=rank,
            clip=clip,
            examples_cap=examples_cap,
            **others,
        )
