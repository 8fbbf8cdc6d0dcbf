"""One case's times and peaks, each in a process of its own: `in_process` runs this file."""

from __future__ import annotations

import gc
import json
import logging
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message

from benchmarks.full.contenders import CONTENDERS, FEDAVG, LINEAR, ROOT, Linear, Replies, seconds_of, total
from benchmarks.full.models import numel
from benchmarks.messages import Nodes
from benchmarks.peaks import forget_peak, since
from fedfrom import FedFroM


def timed(model: str, clients: int, repeats: int, names: Sequence[str], mergekit: str | None = None) -> dict[str, Any]:
    """Return the median seconds of contenders that take turns; with mergekit's linear also its "versions"."""
    other = None if mergekit is None else Linear(mergekit, model, clients)  # its process makes its states meanwhile
    replies = Replies(model)
    messages = replies.all(clients)
    found: dict[str, list[float]] = {name: [] for name in names}
    found |= {} if other is None else {LINEAR: []}
    totals: dict[str, float] = {}
    for turn in range(repeats + 1):
        # a random order: no contender always runs after the same other one
        for name in random.Random(turn).sample([*found], len(found)):
            if name == LINEAR and other is not None:
                seconds, totals[name] = other.turn()
            else:
                run = CONTENDERS[name](replies, messages)
                seconds, result = seconds_of(run)
                if turn == 0 and name == FEDAVG:
                    totals[name] = total(result)
                del result, run
            gc.collect()
            if turn > 0:  # the first turn is the warm-up
                found[name].append(seconds)
    medians: dict[str, Any] = {name: statistics.median(values) for name, values in found.items()}
    if other is not None:
        other.close()
        if FEDAVG in totals and abs(totals[LINEAR] - totals[FEDAVG]) > 1e-5 * numel(model) ** 0.5:
            raise RuntimeError(f"mergekit's linear merged something else: {totals}")
        medians["versions"] = other.versions
    return medians


def peak(name: str, model: str, clients: int) -> int:
    """Return a contender's peak beyond the replies and the global model, in bytes."""
    replies = Replies("22M")
    CONTENDERS[name](replies, replies.all(2))()  # a first run, which imports libraries
    replies = Replies(model)
    run = CONTENDERS[name](replies, replies.all(clients))
    before = forget_peak()
    run()
    return since(before)


def peak_of_linear(python: str, model: str, clients: int) -> int:
    """Return the peak of mergekit's linear beyond the states, in bytes."""
    command = [python, "-m", "benchmarks.full.linear", model, str(clients), "peak"]
    return int(json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout))


def spooled(model: str, clients: int, folder: str) -> dict[str, float]:
    """Return the seconds and the peak of a round whose replies all go to disk."""
    replies = Replies(model)
    strategy = FedFroM(memory_budget=0, spool=folder)
    asked = strategy.configure_train(1, replies.arrays, ConfigRecord(), Nodes(clients))

    def arriving() -> Iterator[Message]:
        for i, message in enumerate(asked):
            yield replies.one(message, i)

    before = forget_peak()
    result = strategy.aggregate_train(1, arriving())
    found = {"seconds": strategy.reports[1].seconds, "peak": since(before)}
    assert result[0] is not None and strategy.reports[1].valid == clients
    return found


def files(model: str, clients: int, folder: str) -> float:
    """Return the seconds to write the same replies' bytes to files when they arrive, and to read them back."""
    replies = Replies(model)
    asked = FedFroM().configure_train(1, replies.arrays, ConfigRecord(), Nodes(clients))
    block, seconds = np.ones(1 << 24, np.uint8), 0.0
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        for i, message in enumerate(asked):
            arrays = replies.one(message, i).content["arrays"]
            start = time.perf_counter()
            with open(Path(inside) / str(i), "wb", buffering=0) as file:
                for array in arrays.values():
                    for first in range(0, len(array.data), len(block)):
                        file.write(memoryview(array.data)[first : first + len(block)])
            seconds += time.perf_counter() - start
            del arrays
        start = time.perf_counter()
        for i in range(clients):
            with open(Path(inside) / str(i), "rb", buffering=0) as file:
                while file.readinto(block):
                    pass
        return seconds + time.perf_counter() - start


KINDS = {"timed": timed, "peak": peak, "spooled": spooled, "files": files}


def in_process(kind: str, *arguments: Any) -> Any:
    """Return the result of one of the functions above, called in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.full.measure", json.dumps([kind, *arguments])]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.WARNING)
    kind, *arguments = json.loads(sys.argv[1])
    print(json.dumps(KINDS[kind](*arguments)))
