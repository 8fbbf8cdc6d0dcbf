"""The times of contenders, which take turns, and the peak memory of each in a process of its own."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.adapters.contenders import contender, sample
from benchmarks.adapters.shapes import Shape
from benchmarks.peaks import forget_peak, since


def medians(names: Mapping[str, int], shape: Shape, rank: int, clients: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the median seconds and a result of each contender; `names` has the number of runs of each.

    The contenders take turns, so that a busy machine slows all of them. Those with several runs are warmed up first.
    """
    states = sample(shape, rank, clients)
    runs = {name: contender(name, states) for name in names}
    results = {name: run() for name, run in runs.items() if names[name] > 1}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(max(names.values())):
        for name, run in runs.items():
            if turn < names[name]:
                start = time.perf_counter()
                results[name] = run()
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}, results


def extra_memory(name: str, shape: Shape, rank: int, clients: int) -> float:
    """Return one contender's peak memory above its inputs', in MiB, measured in a process of its own."""
    arguments = [name, *shape, rank, clients]
    command = [sys.executable, "-m", "benchmarks.adapters.timing", *map(str, arguments)]
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root)
    return int(found.stdout.split()[-1]) / 2**20


def _measure() -> None:
    import torch

    torch.set_num_threads(1)
    name, (d_out, d_in, rank, clients) = sys.argv[1], map(int, sys.argv[2:])
    contender(name, sample((64, 64), min(rank, 8), 3))()  # a first run, which imports libraries
    run = contender(name, sample((d_out, d_in), rank, clients))
    before = forget_peak()
    run()
    print(since(before))


if __name__ == "__main__":
    _measure()
