"""The report of each training round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Self

from flwr.app import Message, MetricRecord

from fedfrom.merging import MergeReport
from fedfrom.outcome import Outcome
from fedfrom.wire.contents import array_bytes
from fedfrom.wire.pulling import Arriving


@dataclass(frozen=True, repr=False)
class RoundReport:
    """What happened to the replies of one training round. `print(report.summary())` says it in a few lines.

    Attributes
    ----------
    nodes : list[int]
        Ids of the nodes whose replies were merged, in the order of every list in `merge`.
    valid : int
        Number of valid replies; a greedy soup merges some of them.
    rejected : dict[int, str]
        Node id -> why its reply was rejected.
    failed : dict[int, str]
        Node id -> the error that it replied with.
    missing : list[int]
        Ids of the nodes that did not reply in time.
    merge : MergeReport | None
        None where the round was skipped.
    seconds : float
        Time spent reading, merging and writing; time spent waiting for replies is not in it.
    reasons : dict[str, int]
        Kind of rejection -> number of replies: see `fedfrom.wire.reply.Rejection`.
    examples_capped : int
        Number of valid replies whose num-examples counted for less than the client said.
    bytes_down : int
        Bytes of the arrays that nodes were sent to train.
    bytes_up : int
        Bytes of the arrays in their replies, rejected replies included.
    server_round : int
        The round's number.
    scores : dict[str, dict[str, Any]]
        The round's metrics, once the round is over: "train" and "evaluate" as aggregated, and "server".
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

    @classmethod
    def of(
        cls,
        server_round: int,
        outcome: Outcome,
        failed: Mapping[int, str],
        asked: Sequence[Message],
        arriving: Arriving,
    ) -> Self:
        """Return the report of a round that has just been merged or skipped.

        Parameters
        ----------
        server_round : int
            The round's number.
        outcome : Outcome
            What came of the replies.
        failed : Mapping[int, str]
            Node id -> the error that it replied with.
        asked : Sequence[Message]
            The round's messages to the nodes.
        arriving : Arriving
            The replies, all of which have been read.
        """
        valid, rejected, merge = outcome.valid, outcome.rejected, outcome.merge
        nodes = {message.metadata.dst_node_id for message in asked}
        return cls(
            # a greedy soup leaves some valid replies out
            nodes=[reply.node_id for reply in valid if merge is not None and reply.who in merge.clients],
            valid=len(valid),
            rejected={node_id: reason for node_id, (_, reason) in rejected.items()},
            failed=dict(failed),
            missing=sorted(nodes - {*(reply.node_id for reply in valid), *rejected, *failed}),
            merge=merge,
            seconds=arriving.seconds(),
            reasons=dict(Counter(sorted(kind for kind, _ in rejected.values()))),
            examples_capped=outcome.examples_capped,
            bytes_down=sum(array_bytes(message.content) for message in asked),
            bytes_up=arriving.bytes,
            server_round=server_round,
        )

    def __repr__(self) -> str:
        return f"<RoundReport of round {self.server_round}: {self.line()}>"

    def line(self) -> str:
        """Return the round in one line: merged and rejected replies, weights, cosine, energy dropped, seconds."""
        found = self._figures
        parts = [f"merged {len(self.nodes)} of {self.asked}", f"rejected {len(self.rejected)}"]
        if "weight-min" in found:
            parts.append(f"weights {found['weight-min']:.3f} to {found['weight-max']:.3f}")
        if "cosine-mean" in found:
            parts.append(f"cosine {found['cosine-mean']:.2f}")
        if "energy-dropped-max" in found:
            parts.append(f"energy dropped {found['energy-dropped-max']:.1%}")
        return ", ".join([*parts, f"{self.seconds:.2f} s"])

    def summary(self) -> str:
        """Return the round's line, what became of the other replies, and the merge's summary."""
        lines = [f"round {self.server_round}: {self.line()}"]
        for kind, by_node in (("rejected", self.rejected), ("failed", self.failed)):
            lines += [f"node {node} {kind}: {why}" for node, why in by_node.items()]
        if self.missing:
            lines.append(f"no reply from {', '.join(map(str, self.missing))}")
        return "\n".join([*lines, *([] if self.merge is None else [self.merge.summary()])])

    @property
    def asked(self) -> int:
        """Number of nodes that were asked to train."""
        return self.valid + len(self.rejected) + len(self.failed) + len(self.missing)

    def numbers(self) -> dict[str, float]:
        """Return the single numbers among `scores`, named "train/loss" and the like."""
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
        """Return the report that `to_dict` wrote, also from JSON, which turns all keys into strings."""
        by_node = {name: {int(node): why for node, why in report[name].items()} for name in ("rejected", "failed")}
        merged = None if report["merge"] is None else MergeReport.from_dict(report["merge"])
        return cls(**{**report, **by_node, "merge": merged})

    def metrics(self) -> MetricRecord:
        """Return the round's main figures as a MetricRecord, which `start` adds to the clients' training metrics."""
        return MetricRecord(dict(self._figures))

    @cached_property
    def _figures(self) -> dict[str, Any]:
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
        if self.merge is not None and weighed:
            metrics["weight-min"] = min(min(layer.weights) for layer in weighed)
            metrics["weight-max"] = max(max(layer.weights) for layer in weighed)
            metrics["clients-effective"] = sum(layer.clients_effective for layer in weighed) / len(weighed)
            metrics["lambda-max"] = max(layer.lambda_max for layer in weighed)
            metrics["server-lr-min"] = min(layer.server_lr for layer in weighed)
            metrics["updates-clipped"] = sum(factor < 1 for layer in weighed for factor in layer.clipped)
            metrics["interference"] = self.merge.interference
            if pairs := [row[j] for i, row in enumerate(self.merge.cosines()) for j in range(i)]:
                metrics["cosine-mean"] = sum(pairs) / len(pairs)
            if self.merge.validation:
                metrics |= {name: float(self.merge.method[name]) for name in self.merge.searched}
                metrics["validation-score"] = max(score for *_, score in self.merge.validation)
        if adapters := [] if self.merge is None else self.merge.adapters:
            metrics["rank-max"] = max(layer.rank_out for layer in adapters)
            metrics["energy-dropped-max"] = max(layer.energy_dropped for layer in adapters)
        return metrics
