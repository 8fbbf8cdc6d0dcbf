"""Metrics in replies: which of them can be averaged, what each num-examples counts for, and the averages."""

from __future__ import annotations

import logging
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flwr.app import Message, MetricRecord, RecordDict

from fedfrom.wire.contents import metric_record, records_of
from fedfrom.wire.reply import RejectedReply, Reply, rejecting

log = logging.getLogger("flwr")  # where Flower's own strategies log

Aggregate = Callable[[list[RecordDict], str], MetricRecord | None]
"""Takes contents with one MetricRecord each and the name of the weighting metric; returns their average."""


def count_examples(who: str, said: list[tuple[int, float]], cap: float | None, weighted_by: str) -> list[float]:
    """Return what each node's number of examples counts for, and log where it counts for less.

    Parameters
    ----------
    who : str
        Start of the log line.
    said : list[tuple[int, float]]
        Node id and number of examples.
    cap : float | None
        Largest multiple of the median that a number counts for; None is no bound.
    weighted_by : str
        Name of the metric.
    """
    counts = cap_examples([count for _, count in said], cap)
    for (node_id, count), counted in zip(said, counts, strict=True):
        if counted != count:
            log.warning(
                "%s: %s %g of node %d counts as %g, %g times the median of the valid replies",
                who,
                weighted_by,
                count,
                node_id,
                counted,
                cap,
            )
    return counts


def average_train_metrics(
    replies: Sequence[Reply], examples: Sequence[float], weighted_by: str, aggregate: Aggregate
) -> MetricRecord:
    """Average the metrics of the merged replies; replies with NaN or infinity in their metrics are left out."""
    contents = []
    for reply, count in zip(replies, examples, strict=True):
        try:
            check_metrics(reply.content, weighted_by)
            contents.append(with_examples(reply.content, weighted_by, count))
        except RejectedReply as error:
            log.warning("aggregate_train: left the metrics of %s out of the averages: %s", reply.who, error)
    found = average_metrics(contents, weighted_by, aggregate) if contents else None
    return MetricRecord() if found is None else found


def average_evaluate_metrics(
    messages: Iterable[Message], weighted_by: str, cap: float | None, aggregate: Aggregate
) -> MetricRecord | None:
    """Average the metrics of the evaluate replies that can be averaged; None where no reply can.

    Parameters
    ----------
    messages : Iterable[Message]
        Evaluate replies with content.
    weighted_by : str
        Name of the metric with the number of examples.
    cap : float | None
        See `count_examples`.
    aggregate : Aggregate
        The strategy's `evaluate_metrics_aggr_fn`.
    """
    valid = []
    for message in messages:
        node_id = message.metadata.src_node_id
        try:
            metrics = check_metrics(message.content, weighted_by)
            examples: Any = metrics[weighted_by]
            valid.append((repr(sorted(metrics.items())), message.content, (node_id, float(examples))))
        except RejectedReply as error:
            log.warning("aggregate_evaluate: rejected node %d: %s", node_id, error)
    valid.sort(key=lambda reply: reply[0])  # by content: the order of arrival is chance
    counts = count_examples("aggregate_evaluate", [said for _, _, said in valid], cap, weighted_by)
    contents = [
        with_examples(content, weighted_by, count) for (_, content, _), count in zip(valid, counts, strict=True)
    ]
    return average_metrics(contents, weighted_by, aggregate) if contents else None


def average_metrics(contents: Sequence[RecordDict], weighted_by: str, aggregate: Aggregate) -> MetricRecord | None:
    """Average the metrics that most contents have, and log what is left out."""
    kept, dropped, left_out = comparable_metrics(contents)
    if dropped:
        log.warning("metrics %s: not in most replies, or of other lengths: left out of the averages", dropped)
    if left_out:
        log.warning("metrics: %d replies lack some that most have: left out of the averages", left_out)
    return aggregate(kept, weighted_by) if kept else None


def check_metrics(content: RecordDict, weighted_by: str) -> MetricRecord:
    """Return a reply's only MetricRecord, or raise RejectedReply where its metrics can't be averaged."""
    with rejecting("examples"):
        metrics = metric_record(content, weighted_by)
    for key, value in metrics.items():
        numbers = value if isinstance(value, list) else [value]
        if not all(isinstance(number, int) or math.isfinite(number) for number in numbers):
            raise RejectedReply("metrics", f"metric {key!r}: expected finite numbers, found {value!r}")
    return metrics


def cap_examples(counts: Sequence[float], cap: float | None) -> list[float]:
    """Return the numbers of examples, bounded by `cap` times their median; None is no bound."""
    if cap is None or not counts:
        return list(counts)
    most = cap * statistics.median(counts)
    return [min(count, most) for count in counts]


def with_examples(content: RecordDict, weighted_by: str, count: float) -> RecordDict:
    """Return a content whose only MetricRecord has this number of examples; the given content is not changed."""
    name, metrics = next(iter(records_of(content, MetricRecord).items()))
    if metrics[weighted_by] == count:
        return content
    return RecordDict({**content, name: MetricRecord({**metrics, weighted_by: count})})


def comparable_metrics(contents: Sequence[RecordDict]) -> tuple[list[RecordDict], list[str], int]:
    """Return contents whose MetricRecords share all keys, the dropped keys, and the number of contents left out.

    Keys that more than half of the contents have are kept, and contents that lack any of these are left out. So one
    client with other metrics removes nobody else's.

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
