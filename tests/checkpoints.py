"""Runs that keep checkpoints, and what lies in their folder."""

import logging
from pathlib import Path
from typing import Any

import pytest
from flwr.serverapp.strategy import Result

from fedfrom import FedFroM
from tests.inprocess import InProcessGrid
from tests.models import mixed_state, noisy, record_of

ROUNDS = 3


class Stopped(Exception):
    """Ends a run before its time, in this process."""


def errors(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.levelno >= logging.ERROR]


def start(folder: Path | None, rounds: int = ROUNDS, state: dict | None = None, **options: Any) -> Result:
    arrays = record_of(mixed_state() if state is None else state)
    return FedFroM(checkpoint=folder, **options).start(InProcessGrid(noisy, 3), arrays, num_rounds=rounds)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("round-*/*")}
