"""FedFroM and FedMerge: Flower strategies that merge what the clients send instead of averaging it.

A round: `configure_train` sends the global arrays; `aggregate_train` reads each reply as a state or rejects it with a
reason, hands the states to `merge`, and returns the merged state in the shapes that the clients have.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from torch import Tensor

from fedfrom.merging import MergeReport, merge
from fedfrom.merging import layers as L
from fedfrom.merging.average import FactorAverage
from fedfrom.merging.methods import Method, make_method
from fedfrom.replies import (
    ADAPTER_KEY,
    Reply,
    comparable_metrics,
    config_to_record,
    metric_record,
    read_reply,
    record_to_config,
    to_record,
    to_state,
)

log = logging.getLogger("flwr")  # where Flower's own strategies log
_FEDAVG = set(inspect.signature(FedAvg.__init__).parameters) - {"self"}


@dataclass(frozen=True)
class RoundReport:
    """What happened to the replies of one training round.

    Attributes
    ----------
    nodes : list[int]
        Ids of the nodes whose replies were merged, in the order of every list in `merge`.
    rejected, failed : dict[int, str]
        Node id -> why its reply was rejected, and what error it replied with.
    merge : MergeReport | None
        None where the round was skipped.
    seconds : float
        Spent reading, merging and writing.
    """

    nodes: list[int]
    rejected: dict[int, str] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    merge: MergeReport | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and numbers."""
        return asdict(self)


class FedMerge(FedAvg):
    """FedAvg with its averaging replaced by any of fedfrom's merging methods.

    Parameters
    ----------
    method : str | Method (default: "from")
        A name of `fedfrom.methods()`, with its options as further keywords, or a method object.
    server_lr : float (default: 1.0)
        alpha: the new global model is W + alpha theta*.
    lora_config : LoraConfig | Mapping | None (default: None)
        The global adapter's config. Needed where clients have other ranks or alphas than it; without it all clients
        must have the global adapter's rank, one scaling is assumed, and cancels.
    seed : int (default: 0)
        Of the sampling of nodes, and the method's.
    dora, same_base : bool (default: False)
        Accept DoRA, and initialisations that alter the base model: see `fedfrom.merging.layers.check_config`.
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
        server_lr: float = 1.0,
        lora_config: Any = None,
        seed: int = 0,
        dora: bool = False,
        same_base: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**{name: options.pop(name) for name in _FEDAVG & options.keys()})
        if isinstance(method, str):
            probe = make_method(method, **options)
            if "seed" in {f.name for f in fields(probe)}:
                options.setdefault("seed", seed)
        self.method = make_method(method, **options)
        if not math.isfinite(server_lr):
            raise ValueError(f"server_lr: expected a finite number, found {server_lr}")
        self.server_lr = server_lr
        self.seed = seed
        self.dora, self.same_base = dora, same_base
        self.lora_config: dict[str, Any] | None = None
        if lora_config is not None:
            checked = L.check_config(lora_config, "lora_config", dora, same_base)
            # what the clients are told and no more: a LoraConfig holds sets, which no report could be written with
            self.lora_config = record_to_config(config_to_record(checked), "lora_config")
        self.reports: dict[int, RoundReport] = {}
        self._sent: dict[str, Tensor] | None = None
        self._layers: dict[str, L.Layer] = {}

    def summary(self) -> None:
        """Log the strategy's settings: its own, then FedAvg's."""
        settings = {"server_lr": self.server_lr, "seed": self.seed, "lora_config": self.lora_config is not None}
        log.info("\t├──> Merging: %s", self.method)
        log.info("\t│\t└── %s", ", ".join(f"{name}: {value}" for name, value in settings.items()))
        super().summary()

    # --- Sending -----------------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Sample nodes and send them the global arrays, which the replies will be compared with."""
        self._sent = to_state(arrays, "global arrays")
        self._layers = self._find_layers(self._sent)
        share, least = self.fraction_train, self.min_train_nodes
        return self._messages(server_round, arrays, config, grid, MessageType.TRAIN, share, least)

    def _find_layers(self, state: dict[str, Tensor]) -> dict[str, L.Layer]:
        """Return the layers of the global state; ValueError where no reply to it could be merged."""
        pair_factors = not isinstance(self.method, FactorAverage)
        layers = L.find_layers(state, "global arrays", pair_factors)
        for name, layer in layers.items():
            L.check_dora(layer, "global arrays", self.dora)
            if layer.is_adapter:
                rank = L.read_adapter(layer, state, 1.0, "global arrays").rank
                if self.lora_config and rank != (expected := L.rank_and_scaling(self.lora_config, name)[0]):
                    raise ValueError(
                        f"global arrays, {name!r}: expected rank {expected} as lora_config says, found {rank}"
                    )
        return layers

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
            content[ADAPTER_KEY] = config_to_record(self.lora_config)
        node_ids = self._sample(server_round, grid, message_type, share, least)
        return [Message(content=content, message_type=message_type, dst_node_id=node_id) for node_id in node_ids]

    def _sample(self, server_round: int, grid: Grid, message_type: str, share: float, least: int) -> list[int]:
        """Return node ids, drawn by the seed and the round from the nodes in the order they registered."""
        while True:
            nodes = sorted(grid.get_nodes(), key=lambda node: (node.registered_at, node.node_id))
            size = max(int(len(nodes) * share), least)
            required = max(self.min_available_nodes, size)
            if len(nodes) >= required:
                break
            log.info("Waiting for nodes to connect: %d connected (minimum required: %d).", len(nodes), required)
            time.sleep(1)
        drawn = random.Random(f"{self.seed}:{server_round}:{message_type}").sample(nodes, size)
        log.info("configure_%s: Sampled %d nodes (out of %d)", message_type, len(drawn), len(nodes))
        return [node.node_id for node in drawn]

    # --- Merging -----------------------------------------------------------------------------------------------------

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge the valid replies; without any, log it and return (None, None): the global arrays stay."""
        if self._sent is None:
            raise RuntimeError("aggregate_train: expected configure_train to have sent the global arrays before")
        start = time.perf_counter()
        with_content, failures = self._check_and_log_replies(list(replies), is_train=True, validate=False)
        failed = {message.metadata.src_node_id: message.error.reason or "" for message in failures}
        valid, rejected = self._screen(with_content)
        for node_id, reason in rejected.items():
            log.warning("aggregate_train: rejected the reply of node %d: %s", node_id, reason)
        nodes = [reply.node_id for reply in valid]
        if not valid:
            log.warning("aggregate_train: no valid reply in round %d: the global arrays stay as they are", server_round)
            self.reports[server_round] = RoundReport(nodes, rejected, failed, None, time.perf_counter() - start)
            return None, None
        merged, report = self._merge(valid)
        arrays = to_record(merged)
        metrics = self._aggregate_metrics([reply.content for reply in valid], self.train_metrics_aggr_fn)
        metrics = MetricRecord() if metrics is None else metrics
        seconds = time.perf_counter() - start
        self.reports[server_round] = RoundReport(nodes, rejected, failed, report, seconds)
        metrics.update(_summary_metrics(self.reports[server_round]))
        self._warn_of_swapping(report)
        return arrays, metrics

    def _screen(self, messages: list[Message]) -> tuple[list[Reply], dict[int, str]]:
        """Return the replies that can be merged, in an order free of chance, and by node why the others can't."""
        assert self._sent is not None
        pair_factors = not isinstance(self.method, FactorAverage)
        valid, rejected = [], {}
        for message in messages:
            try:
                reply = read_reply(
                    message,
                    self._sent,
                    self._layers,
                    self.arrayrecord_key,
                    self.weighted_by_key,
                    ranks_may_differ=self.lora_config is not None and pair_factors,
                )
                valid.append(reply)
            except ValueError as error:
                rejected[message.metadata.src_node_id] = str(error)
        if self.lora_config is None or not pair_factors:
            # nobody said what the global adapter's scaling is: all clients must have one
            said = {r.node_id: json.dumps(r.config, sort_keys=True) for r in valid if r.config is not None}
            counts = Counter(said.values())
            common = max(sorted(counts), key=counts.__getitem__, default="")
            for reply in [r for r in valid if said.get(r.node_id, common) != common]:
                rejected[reply.node_id] = (
                    f"adapter config: expected {common} as most clients have, found {said[reply.node_id]}; "
                    f"give {type(self).__name__} the global adapter's lora_config"
                )
                valid.remove(reply)
        # Node ids and the order of arrival are chance; what the metrics are summed in is not.
        key = self.weighted_by_key
        return sorted(valid, key=lambda r: repr(sorted(metric_record(r.content, key).items()))), rejected

    def _merge(self, replies: list[Reply]) -> tuple[dict[str, Tensor], MergeReport]:
        """Hand the replies to `merge`, each with what it was sent: the leading ranks, where it has fewer."""
        assert self._sent is not None
        configs: list[Any] | None = None
        received: list[dict[str, Tensor] | None] = [None] * len(replies)
        if self.lora_config is not None and not isinstance(self.method, FactorAverage):
            configs = [self.lora_config if reply.config is None else reply.config for reply in replies]
            layers = {name: layer for name, layer in self._layers.items() if layer.is_adapter}
            cuts: dict[tuple, dict[str, Tensor]] = {}
            for i, reply in enumerate(replies):
                ranks = {name: max(L.adapter_rank(layer, reply.state)) for name, layer in layers.items()}
                if any(rank < max(L.adapter_rank(layers[name], self._sent)) for name, rank in ranks.items()):
                    cut = cuts.setdefault(tuple(ranks.values()), L.leading(self._sent, layers, ranks))
                    received[i] = cut
        return merge(
            [reply.state for reply in replies],
            self._sent,
            self.method,
            received=received,
            configs=configs,
            reference_config=self.lora_config if configs is not None else None,
            examples=[reply.examples for reply in replies],
            server_lr=self.server_lr,
            as_reference=True,
            names=[reply.who for reply in replies],
            dora=self.dora,
            same_base=self.same_base,
        )

    def _warn_of_swapping(self, report: MergeReport) -> None:
        weighed = [layer for layer in report.layers if layer.lambda_max > 0]  # infinity * 0 is NaN
        bound = max((self.server_lr * (1 + self.method.k * layer.lambda_max) for layer in weighed), default=0.0)
        if bound >= 2 and len(report.clients) > 1:
            log.warning(
                "aggregate_train: server_lr (1 + k lambda_max) reaches %.2f: at 2 and more, clients that train to "
                "their own optimum can make rounds swing for ever; lower k or server_lr",
                bound,
            )

    # --- Metrics -----------------------------------------------------------------------------------------------------

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Average the metrics of the valid evaluate replies, as FedAvg does; None where there is none."""
        with_content, _ = self._check_and_log_replies(list(replies), is_train=False, validate=False)
        valid = []
        for message in with_content:
            try:
                metrics = metric_record(message.content, self.weighted_by_key)
                valid.append((repr(sorted(metrics.items())), message.content))
            except ValueError as error:
                log.warning("aggregate_evaluate: rejected node %d: %s", message.metadata.src_node_id, error)
        if not valid:
            return None
        contents = [content for _, content in sorted(valid, key=lambda pair: pair[0])]
        return self._aggregate_metrics(contents, self.evaluate_metrics_aggr_fn)

    def _aggregate_metrics(
        self, contents: list[RecordDict], aggregate: Callable[[list[RecordDict], str], MetricRecord | None]
    ) -> MetricRecord | None:
        contents, dropped = comparable_metrics(contents)
        if dropped:
            log.warning("metrics %s: not in every reply, or of other lengths: left out of the averages", dropped)
        return aggregate(contents, self.weighted_by_key)

    # --- The loop ----------------------------------------------------------------------------------------------------

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds: Flower's signature, and a Result whose arrays are filled even where rounds are skipped.

        Parameters
        ----------
        grid : Grid
            What sends messages to the nodes.
        initial_arrays : ArrayRecord
            The global adapter's or model's arrays.
        num_rounds : int (default: 3)
            How many rounds.
        timeout : float (default: 3600)
            Seconds to wait for the replies of a round.
        train_config, evaluate_config : ConfigRecord | None (default: None)
            Sent to the clients; "server-round" is added.
        evaluate_fn : Callable[[int, ArrayRecord], MetricRecord | None] | None (default: None)
            Evaluates the global arrays on the server, before the first round (round 0) and after each.

        Returns
        -------
        Result
            The final arrays and the metrics of all rounds.
        """
        megabytes = sum(len(array.data) for array in initial_arrays.values()) / 2**20
        log.info("Starting %s strategy: %d rounds, %.2f MB of arrays", type(self).__name__, num_rounds, megabytes)
        self.summary()
        train_config = ConfigRecord() if train_config is None else train_config
        evaluate_config = ConfigRecord() if evaluate_config is None else evaluate_config
        result = Result(arrays=initial_arrays)
        self.reports = {}
        start = time.perf_counter()
        self._evaluate_on_server(0, result, evaluate_fn)
        for server_round in range(1, num_rounds + 1):
            log.info("")
            log.info("[ROUND %d/%d]", server_round, num_rounds)
            messages = self.configure_train(server_round, result.arrays, train_config, grid)
            replies = grid.send_and_receive(messages, timeout=timeout) if messages else []
            arrays, metrics = self.aggregate_train(server_round, replies)
            if arrays is not None:
                result.arrays = arrays
            if metrics is not None:
                log.info("\t└──> Aggregated MetricRecord: %s", metrics)
                result.train_metrics_clientapp[server_round] = metrics

            messages = self.configure_evaluate(server_round, result.arrays, evaluate_config, grid)
            replies = grid.send_and_receive(messages, timeout=timeout) if messages else []
            metrics = self.aggregate_evaluate(server_round, replies)
            if metrics is not None:
                log.info("\t└──> Aggregated MetricRecord: %s", metrics)
                result.evaluate_metrics_clientapp[server_round] = metrics
            self._evaluate_on_server(server_round, result, evaluate_fn)
        log.info("")
        log.info("Strategy execution finished in %.2fs", time.perf_counter() - start)
        return result

    def _evaluate_on_server(
        self,
        server_round: int,
        result: Result,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None,
    ) -> None:
        if evaluate_fn is None:
            return
        metrics = evaluate_fn(server_round, result.arrays)
        log.info("Global evaluation, round %d: %s", server_round, metrics)
        if metrics is not None:
            result.evaluate_metrics_serverapp[server_round] = metrics


class FedFroM(FedMerge):
    """FedAvg with FroM in place of averaging: each client's update of each layer counts by its norm to the power k.

    A drop-in for FedAvg: any client app that replies with a PEFT adapter's state dict, a full state dict, or both,
    works unchanged. Adapters are merged as products BA (Eq. 6), never factor by factor.

    Parameters
    ----------
    k : float (default: 0.5)
        Power of the norm, k >= 0; 0 with examples_power 1 is exactly FedAvg, on products. The paper's is 1.
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
    server_lr, lora_config, seed, dora, same_base
        See `FedMerge`.
    **fedavg
        FedAvg's arguments, passed on.
    """

    def __init__(
        self,
        *,
        k: float = 0.5,
        examples_power: float = 0.5,
        rank: int | float | None = None,
        solver: str = "svd",
        scope: str = "layer",
        **others: Any,
    ) -> None:
        super().__init__(
            "from",
            k=k,
            examples_power=examples_power,
            rank=rank,
            solver=solver,
            scope=scope,
            **others,
        )


def _summary_metrics(report: RoundReport) -> MetricRecord:
    """Return what a user wants to see of each round, as numbers."""
    assert report.merge is not None
    weighed = [layer for layer in report.merge.layers if layer.weights]
    adapters = [layer for layer in weighed if layer.kind == "adapter"]
    metrics: dict[str, Any] = {
        "replies-valid": len(report.nodes),
        "replies-rejected": len(report.rejected),
        "replies-failed": len(report.failed),
        "merge-seconds": report.seconds,
    }
    if weighed:
        metrics["weight-min"] = min(min(layer.weights) for layer in weighed)
        metrics["weight-max"] = max(max(layer.weights) for layer in weighed)
        metrics["clients-effective"] = sum(layer.clients_effective for layer in weighed) / len(weighed)
        metrics["lambda-max"] = max(layer.lambda_max for layer in weighed)
    if adapters:
        metrics["rank-max"] = max(layer.rank_out for layer in adapters)
        metrics["energy-dropped-max"] = max(layer.energy_dropped for layer in adapters)
    return MetricRecord(metrics)
