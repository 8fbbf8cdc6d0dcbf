"""The strategies' keyword arguments with their types, so that editors complete them and type checkers refuse others.

The strategies' docstrings, the methods' and FedAvg's say what each does. Nothing here is read when a strategy runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from flwr.app import MetricRecord, RecordDict
from torch import Tensor

from fedfrom.rounds import RoundReport

Aggregate = Callable[[list[RecordDict], str], MetricRecord]
"""FedAvg's way to aggregate metrics: (contents of the replies, weighted_by_key) -> metrics."""


class FedAvgArguments(TypedDict, total=False):
    """FedAvg's arguments."""

    fraction_train: float
    fraction_evaluate: float
    min_train_nodes: int
    min_evaluate_nodes: int
    min_available_nodes: int
    weighted_by_key: str
    arrayrecord_key: str
    configrecord_key: str
    train_metrics_aggr_fn: Aggregate | None
    evaluate_metrics_aggr_fn: Aggregate | None


class MethodOptions(TypedDict, total=False):
    """The options of all merging methods but the seed, which is the strategy's; each method takes some of them."""

    beta: float
    coefficient: float | str
    common_space_fraction: float
    convention: str
    density: float
    examples_power: float
    floor: float
    form: str
    gauge: str
    inner: str
    inner_options: Mapping[str, Any]
    iterations: int
    k: float | str
    majority: str
    off_diagonal: float
    rank: float | None
    rho: float
    scope: str
    search: Mapping[str, Sequence[float]] | None
    solver: str
    tolerance: float
    validate: Callable[[Mapping[str, Tensor]], float] | None


class MergeArguments(FedAvgArguments, MethodOptions, total=False):
    """What FedMerge takes beside its own settings."""


class FroMArguments(TypedDict, total=False):
    """What FedFroM takes beside what it spells out: further settings of FedMerge's, and options of FroM's."""

    server_lr: float | str
    min_valid_replies: int
    max_skipped: int | None
    select: str | None
    attackers: int
    lora_config: Any
    frozen: str | Collection[str]
    seed: int
    node_timeout: float
    memory_budget: float | None
    spool: str | Path | None
    on_round: Callable[[RoundReport], object] | None
    dora: bool
    same_base: bool
    checkpoint: str | Path | None
    checkpoints_kept: int
    solver: str
    scope: str
    gauge: str
    coefficient: float | str
    iterations: int
    tolerance: float
    validate: Callable[[Mapping[str, Tensor]], float] | None
    search: Mapping[str, Sequence[float]] | None
