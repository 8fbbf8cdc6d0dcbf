"""The contenders that merge full models: FedFroM's and FedAvg's `aggregate_train`, copies, and mergekit's linear."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from benchmarks.full.models import States, examples
from benchmarks.messages import Nodes
from fedfrom import FedFroM
from fedfrom.wire.records import to_record, to_state
from simulations.engines.jobs import set_task_identity

ROOT = Path(__file__).resolve().parents[2]
FEDFROM, FEDAVG, COPY, WARM, LINEAR = "FedFroM", "FedAvg", "copy", "copy, warm", "mergekit linear"


class Replies:
    """The global model as a record, and the replies of clients 0 to n - 1."""

    def __init__(self, model: str) -> None:
        set_task_identity()
        self.states = States(model)
        self.arrays = to_record(self.states.reference)

    def one(self, asked: Message, i: int) -> Message:
        """Return client i's reply."""
        metrics = MetricRecord({"num-examples": examples(i), "loss": 0.5})
        content = RecordDict({"arrays": to_record(self.states.of(i)), "metrics": metrics})
        return Message(content, reply_to=asked)

    def all(self, clients: int) -> list[Message]:
        """Return the replies of all clients."""
        asked = FedFroM().configure_train(1, self.arrays, ConfigRecord(), Nodes(clients))
        return [self.one(message, i) for i, message in enumerate(asked)]


def fedfrom(replies: Replies, messages: list[Message]) -> Callable[[], Any]:
    """Return a function that merges by FedFroM with its defaults."""
    strategy = FedFroM()
    strategy.configure_train(1, replies.arrays, ConfigRecord(), Nodes(len(messages)))
    return lambda: strategy.aggregate_train(1, messages)


def fedavg(replies: Replies, messages: list[Message]) -> Callable[[], Any]:
    """Return a function that merges by Flower's FedAvg."""
    return lambda: FedAvg().aggregate_train(1, messages)


def copy(replies: Replies, messages: list[Message]) -> Callable[[], Any]:
    """Return a function that copies the replies' bytes into fresh memory."""
    arrays = [np.frombuffer(array.data, np.uint8) for m in messages for array in m.content["arrays"].values()]
    return lambda: [array.copy() for array in arrays]


def warm(replies: Replies, messages: list[Message]) -> Callable[[], Any]:
    """Return a function that copies each reply into the same memory, as copies of all would not fit."""
    rows = [[np.frombuffer(a.data, np.uint8) for a in m.content["arrays"].values()] for m in messages]
    targets = [np.full_like(array, 1) for array in rows[0]]
    return lambda: [np.copyto(to, array) for row in rows for to, array in zip(targets, row, strict=True)]


CONTENDERS = {FEDFROM: fedfrom, FEDAVG: fedavg, COPY: copy, WARM: warm}


class Linear:
    """mergekit's linear in a process of another interpreter, which merges when `turn` is called."""

    def __init__(self, python: str, model: str, clients: int) -> None:
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.full.linear", model, str(clients)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.versions = self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("mergekit's linear ended early: see its message above")
        return json.loads(line)

    def turn(self) -> tuple[float, float]:
        """Return the seconds of one merge, and the sum of all entries of its result."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        seconds, total = self._answer()
        return seconds, total

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def total(result: Any) -> float:
    """Return the sum of all entries of a strategy's result."""
    return sum(float(tensor.sum(dtype=torch.float64)) for tensor in to_state(result[0]).values())


def seconds_of(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of a call, and its result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result
