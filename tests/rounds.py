"""Rounds of FedFroM on the in-process Grid, faults of their clients, and what was logged of them."""

import logging
from typing import Any

import pytest
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import Result

from fedfrom import FedFroM
from tests.inprocess import InProcessGrid
from tests.models import (
    Arrays,
    mixed_state,
    noisy,
    record_of,
)

Q = "base_model.model.q"


def logged(log: pytest.LogCaptureFixture, *words: str) -> list[logging.LogRecord]:
    return [record for record in log.records if all(word in record.getMessage() for word in words)]


def run(client: Any = noisy, nodes: int = 3, rounds: int = 2, state: Arrays | None = None, **options: Any) -> Result:
    state = mixed_state() if state is None else state
    return FedFroM(**options).start(InProcessGrid(client, nodes), record_of(state), num_rounds=rounds)


def raising(content: RecordDict) -> None:
    raise RuntimeError("out of memory")


def emptied(content: RecordDict) -> None:
    content["arrays"] = ArrayRecord()


UNIT = {"r": 4, "lora_alpha": 4}  # the config of mixed_state's adapter, at scaling 1


def stable(metrics: dict[int, MetricRecord]) -> dict[int, dict[str, Any]]:
    """All metrics but the clock's."""
    return {r: {k: v for k, v in record.items() if k != "merge-seconds"} for r, record in metrics.items()}
