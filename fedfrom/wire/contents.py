"""The records of a message's content: which one holds the model, and which one the metrics."""

from __future__ import annotations

import sys
from typing import TypeVar

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

STATISTICS_KEY = "fedfrom.statistics"
"""Name of the ArrayRecord with a client's Gram or Fisher statistics, in replies."""

_R = TypeVar("_R", ArrayRecord, ConfigRecord, MetricRecord)


def records_of(content: RecordDict, kind: type[_R]) -> dict[str, _R]:
    """Return a content's records of one type, by name.

    Flower's own views (`content.array_records`) make a reference cycle: a message read through them stays in memory
    until Python's next garbage collection.
    """
    return {name: record for name, record in content.items() if isinstance(record, kind)}


def array_bytes(content: RecordDict) -> int:
    """Return the bytes of all arrays of a content, headers included."""
    return sum(len(array.data) for record in records_of(content, ArrayRecord).values() for array in record.values())


def model_record(content: RecordDict, arrayrecord_key: str) -> ArrayRecord:
    """Return the ArrayRecord that holds the model: the one with that name, or the only one beside statistics."""
    records = records_of(content, ArrayRecord)
    records.pop(STATISTICS_KEY, None)
    if arrayrecord_key in records:
        return records[arrayrecord_key]
    if len(records) == 1:
        return next(iter(records.values()))
    raise ValueError(f"expected an ArrayRecord {arrayrecord_key!r}, or a single one, found {sorted(records)}")


def metric_record(content: RecordDict, weighted_by: str) -> MetricRecord:
    """Return the only MetricRecord, whose metric `weighted_by` is checked to be a finite number > 0.

    Raises
    ------
    ValueError
        There is no MetricRecord or several, or the metric is missing, no single number, not finite or not above 0.
    """
    records = records_of(content, MetricRecord)
    if len(records) != 1:
        raise ValueError(f"expected one MetricRecord, found {sorted(records)}")
    metrics = next(iter(records.values()))
    value = metrics.get(weighted_by)
    # compared, not converted: an int may be beyond any float
    if not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"metric {weighted_by!r}: expected a finite number > 0, found {value!r}")
    return metrics
