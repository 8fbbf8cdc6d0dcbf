"""What a strategy says of each round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from flwr.app import MetricRecord

from fedfrom.merging import MergeReport


@dataclass(frozen=True)
class RoundReport:
    """What happened to the replies of one training round.

    Attributes
    ----------
    nodes : list[int]
        Ids of the nodes whose replies were merged, in the order of every list in `merge`.
    valid : int
        How many replies were valid; a greedy soup merges some of them.
    rejected, failed : dict[int, str]
        Node id -> why its reply was rejected, and what error it replied with.
    missing : list[int]
        Ids of the nodes that did not reply in time.
    merge : MergeReport | None
        None where the round was skipped.
    seconds : float
        Spent reading, merging and writing; not waiting for replies.
    reasons : dict[str, int]
        Kind of rejection -> how many replies: see `fedfrom.wire.reply.Rejection`.
    examples_capped : int
        Replies whose num-examples counted for less than they said.
    bytes_down, bytes_up : int
        Of the arrays that nodes were sent to train, and of those in their replies, rejected ones too.
    server_round : int
        Which round it was.
    scores : dict[str, dict[str, Any]]
        The round's metrics, once it is over: of "train" and "evaluate" as aggregated, and of "server".
    """

    nodes: list[int]
    valid: int
    rejected: dict[int, str]
    failed: dict[int, str]
    missing: list[int]
    merge: MergeReport | None
    seconds: float
    reasons: dict[str, int] = field(default_factory=dict)
    examples_capped: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    server_round: int = 0
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """Return all of `scores` that are single numbers, as "train/loss" and the like."""
        return {
            f"{kind}/{name}": float(value)
            for kind, metrics in self.scores.items()
            for name, value in metrics.items()
            if isinstance(value, int | float)
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and numbers."""
        return {**asdict(self), "merge": None if self.merge is None else self.merge.to_dict()}

    @classmethod
    def from_dict(cls, report: Mapping[str, Any]) -> Self:
        """Return the report whose `to_dict` this is, as it comes out of JSON too, where all keys are strings."""
        by_node = {name: {int(node): why for node, why in report[name].items()} for name in ("rejected", "failed")}
        merged = None if report["merge"] is None else MergeReport.from_dict(report["merge"])
        return cls(**{**report, **by_node, "merge": merged})

    def metrics(self) -> MetricRecord:
        """Return what a user wants to see of each round, as numbers."""
        metrics: dict[str, Any] = {
            "replies-valid": self.valid,
            "replies-rejected": len(self.rejected),
            "replies-failed": len(self.failed),
            "replies-missing": len(self.missing),
            "examples-capped": self.examples_capped,
            "bytes-down": self.bytes_down,
            "bytes-up": self.bytes_up,
            "merge-seconds": self.seconds,
            **{f"replies-rejected-{kind}": count for kind, count in self.reasons.items()},
        }
        weighed = [layer for layer in (self.merge.layers if self.merge else []) if layer.is_update]
        if weighed:
            metrics["weight-min"] = min(min(layer.weights) for layer in weighed)
            metrics["weight-max"] = max(max(layer.weights) for layer in weighed)
            metrics["clients-effective"] = sum(layer.clients_effective for layer in weighed) / len(weighed)
            metrics["lambda-max"] = max(layer.lambda_max for layer in weighed)
            metrics["server-lr-min"] = min(layer.server_lr for layer in weighed)
            metrics["updates-clipped"] = sum(factor < 1 for layer in weighed for factor in layer.clipped)
        if self.merge is not None and weighed:
            metrics["interference"] = self.merge.interference
            if pairs := [row[j] for i, row in enumerate(self.merge.cosines()) for j in range(i)]:
                metrics["cosine-mean"] = sum(pairs) / len(pairs)
            if self.merge.validation:
                metrics["k"] = float(self.merge.method["k"])
                metrics["validation-score"] = max(score for _, score in self.merge.validation)
        if adapters := [layer for layer in weighed if layer.kind == "adapter"]:
            metrics["rank-max"] = max(layer.rank_out for layer in adapters)
            metrics["energy-dropped-max"] = max(layer.energy_dropped for layer in adapters)
        return MetricRecord(metrics)
