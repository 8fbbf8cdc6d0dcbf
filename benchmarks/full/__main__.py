"""Full models: a round's `aggregate_train` of FedFroM, Flower's FedAvg and a plain copy of the same bytes, in one run.

    python benchmarks/full.py                  # everything that memory and disk allow; writes results/speed/full*
    python benchmarks/full.py --quick          # about a minute, prints only

In memory: the contenders take turns on the same replies, so that a busy machine slows all of them; medians, and ratios
to the copy. `copy` writes into fresh memory, as a tensor's clone() does; `copy, warm` into memory that was written
before, with no page to be had from the system. The peak of each contender, beyond the replies and the global model, is
that of a process of its own. Spooled: FedFroM with no memory for replies, which come one by one and go to disk, against
writing as many bytes to files there and reading them back; the peak of a process that starts with the global model.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict  # noqa: E402
from flwr.common.constant import SUPERLINK_NODE_ID  # noqa: E402
from flwr.serverapp.strategy import FedAvg  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

from benchmarks.attacks.messages import Nodes  # noqa: E402
from fedfrom import FedFroM  # noqa: E402
from fedfrom.records import to_record, to_state  # noqa: E402
from simulations.environment import machine  # noqa: E402

OUT = ROOT / "results" / "speed"
MODELS = {"22M": (384, 6, 30522), "110M": (768, 12, 30522), "350M": (1024, 24, 50257)}
"""Width, layers and vocabulary of transformers of about these sizes."""

IN_MEMORY = [("22M", 4), ("110M", 4), ("350M", 4), ("22M", 16), ("110M", 16), ("22M", 64)]
SPOOLED = [("110M", 4), ("110M", 16), ("350M", 4), ("22M", 64), ("350M", 16), ("110M", 64)]
LIMIT = 6  # of the machine's memory, what all of a case's replies may take, in tenths


def shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's tensors."""
    d, layers, vocabulary = MODELS[model]
    found: dict[str, tuple[int, ...]] = {"words": (vocabulary, d), "positions": (512, d), "norm": (d,)}
    for i in range(layers):
        for name, shape in {
            **dict.fromkeys(("query", "key", "value", "out"), (d, d)),
            "up": (4 * d, d),
            "down": (d, 4 * d),
        }.items():
            found[f"layer.{i}.{name}.weight"], found[f"layer.{i}.{name}.bias"] = shape, shape[:1]
        found[f"layer.{i}.norm.weight"] = found[f"layer.{i}.norm.bias"] = (d,)
    return found


def numel(model: str) -> int:
    """Return how many parameters a model has."""
    return sum(int(np.prod(shape)) for shape in shapes(model).values())


class Replies:
    """The global model, and what clients reply who moved each number a little; client i always replies the same."""

    def __init__(self, model: str) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK_NODE_ID, 1
        g = torch.Generator().manual_seed(0)
        self.noise = torch.randn(1 << 22, generator=g)
        self.arrays = to_record({key: self._draw(shape, i) for i, (key, shape) in enumerate(shapes(model).items())})

    def _draw(self, shape: tuple[int, ...], seed: int) -> torch.Tensor:
        """Return numbers that repeat after 4 million: drawing them all would take longer than what is measured."""
        size = int(np.prod(shape))
        start = 7919 * seed % len(self.noise)
        found = torch.empty(size)
        for position in range(-start, size, len(self.noise)):  # the noise, again and again, from `start` on
            first, last = max(position, 0), min(position + len(self.noise), size)
            found[first:last] = self.noise[first - position : last - position]
        return found.reshape(shape)

    def one(self, asked: Message, i: int) -> Message:
        """Return client i's reply."""
        state = {}
        for j, (key, W) in enumerate(to_state(self.arrays).items()):
            state[key] = self._draw(tuple(W.shape), 1000 * i + j).mul_(0.01 * (1 + i % 3)).add_(W)
        metrics = MetricRecord({"num-examples": 100 + i, "loss": 0.5})
        return Message(RecordDict({"arrays": to_record(state), "metrics": metrics}), reply_to=asked)

    def all(self, clients: int) -> list[Message]:
        """Return the replies of clients 0 to n - 1."""
        asked = FedFroM().configure_train(1, self.arrays, ConfigRecord(), Nodes(clients))
        return [self.one(message, i) for i, message in enumerate(asked)]


def fedfrom(replies: Replies, messages: list[Message]) -> Any:
    strategy = FedFroM()
    strategy.configure_train(1, replies.arrays, ConfigRecord(), Nodes(len(messages)))
    return lambda: strategy.aggregate_train(1, messages)


def fedavg(replies: Replies, messages: list[Message]) -> Any:
    return lambda: FedAvg().aggregate_train(1, messages)


def copy(replies: Replies, messages: list[Message]) -> Any:
    arrays = [np.frombuffer(array.data, np.uint8) for m in messages for array in m.content["arrays"].values()]
    return lambda: [array.copy() for array in arrays]


def warm(replies: Replies, messages: list[Message]) -> Any:
    """One client's bytes of memory at a time: all of them would not fit beside the replies."""
    rows = [[np.frombuffer(a.data, np.uint8) for a in m.content["arrays"].values()] for m in messages]
    targets = [np.full_like(array, 1) for array in rows[0]]
    return lambda: [np.copyto(to, array) for row in rows for to, array in zip(targets, row, strict=True)]


CONTENDERS: dict[str, Callable[[Replies, list[Message]], Any]] = {
    "FedFroM": fedfrom,
    "FedAvg": fedavg,
    "copy": copy,
    "copy, warm": warm,
}


def timed(model: str, clients: int, repeats: int) -> dict[str, float]:
    """Return each contender's median seconds; they take turns."""
    replies = Replies(model)
    messages = replies.all(clients)
    found: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for turn in range(repeats + 1):
        for name, prepare in CONTENDERS.items():
            run = prepare(replies, messages)
            start = time.perf_counter()
            result = run()
            seconds = time.perf_counter() - start
            del result, run
            gc.collect()
            if turn > 0:  # the first turn is everybody's warm-up
                found[name].append(seconds)
    return {name: statistics.median(values) for name, values in found.items()}


def status(field: str) -> int:
    """Return a number of bytes from /proc/self/status; getrusage would count what the parent had before exec."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def forget_peak() -> int:
    """Start a new peak of resident memory here, and return what it starts from."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what others left there would be used again, and not be seen
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak(name: str, model: str, clients: int) -> int:
    """Return the bytes that a contender takes beyond the replies and the global model, at its peak."""
    replies = Replies("22M")
    CONTENDERS[name](replies, replies.all(2))()  # loads what is loaded once
    replies = Replies(model)
    run = CONTENDERS[name](replies, replies.all(clients))
    before = forget_peak()
    run()
    return status("VmHWM") - before


def spooled(model: str, clients: int, folder: str) -> dict[str, float]:
    """Return the seconds and the peak of a round whose replies all go to disk, and the disk's own seconds."""
    replies = Replies(model)
    strategy = FedFroM(memory_budget=0, spool=folder)
    asked = strategy.configure_train(1, replies.arrays, ConfigRecord(), Nodes(clients))

    def arriving() -> Iterator[Message]:
        for i, message in enumerate(asked):
            yield replies.one(message, i)

    before = forget_peak()
    result = strategy.aggregate_train(1, arriving())
    found = {"seconds": strategy.reports[1].seconds, "peak": status("VmHWM") - before}
    assert result[0] is not None and strategy.reports[1].valid == clients
    size = 4 * numel(model)
    return {**found, "disk": disk(size, clients, folder)}


def disk(size: int, files: int, folder: str) -> float:
    """Return the seconds that writing so many files, and reading them back, take by themselves."""
    data, start = np.ones(1 << 24, np.uint8), time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        for i in range(files):
            with open(Path(inside) / str(i), "wb", buffering=0) as file:
                for _ in range(0, size, len(data)):
                    file.write(data)
        for i in range(files):
            with open(Path(inside) / str(i), "rb", buffering=0) as file:
                while file.readinto(data):
                    pass
        return time.perf_counter() - start


def in_process(*arguments: str) -> Any:
    """Return what this file prints as JSON, called in a process of its own."""
    command = [sys.executable, __file__, "--child", *arguments]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def child(kind: str, *arguments: str) -> None:
    if kind == "timed":
        print(json.dumps(timed(arguments[0], int(arguments[1]), int(arguments[2]))))
    elif kind == "peak":
        print(json.dumps(peak(arguments[0], arguments[1], int(arguments[2]))))
    else:
        print(json.dumps(spooled(arguments[0], int(arguments[1]), arguments[2])))


def memory() -> int:
    """Return the bytes of memory that are free for us."""
    return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])  # type: ignore[index]


def environment() -> list[str]:
    """Return what a reader of the numbers wants to know."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("fedfrom", "flwr", "torch", "numpy"))
    load = "{:.1f} {:.1f} {:.1f}".format(*os.getloadavg())
    threads = torch.get_num_threads()
    return [
        f"Command: `{Path(sys.executable).name} {' '.join(sys.argv)}`",
        f"Machine: {machine()}; {threads} threads; load average before: {load}",
        f"Versions: Python {platform.python_version()}, {versions}",
        "mergekit's linear: left out, it is not among the dependencies and was not installed",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest cases, printed only")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--spool", default=tempfile.gettempdir(), help="where spooled replies go")
    parser.add_argument("--only", choices=["memory", "spooled"], help="half of it")
    parser.add_argument("--cases", nargs="+", help="such as 22M:4 110M:16; all by default")
    parser.add_argument("--largest", type=float, default=16, help="GiB of replies in memory, and twice as much on disk")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    about = environment()
    in_memory = [("22M", 4), ("22M", 16)] if arguments.quick else IN_MEMORY
    on_disk = [("22M", 4), ("22M", 16)] if arguments.quick else SPOOLED
    if arguments.cases:
        named = [(model, int(clients)) for model, clients in (case.split(":") for case in arguments.cases)]
        in_memory = on_disk = named
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    for model, clients in in_memory if arguments.only != "spooled" else []:
        size = 4 * numel(model) * clients
        if size > arguments.largest * 2**30:
            skipped.append(f"{model} x {clients} in memory: {size / 2**30:.1f} GiB of replies")
            continue
        if size > memory() * LIMIT / 10:
            skipped.append(f"{model} x {clients} in memory: {size / 2**30:.0f} GiB, {memory() / 2**30:.0f} GiB free")
            continue
        found = in_process("timed", model, str(clients), str(arguments.repeats))
        for name, seconds in found.items():
            own = in_process("peak", name, model, str(clients)) if name.startswith("Fed") else None
            row = {"where": "memory", "model": model, "clients": clients, "contender": name, "seconds": seconds}
            row |= {"to copy": seconds / found["copy"], "to copy, warm": seconds / found["copy, warm"]}
            row |= {"to FedAvg": seconds / found["FedAvg"], "replies MiB": size / 2**20}
            rows.append(row | {"peak MiB": None if own is None else own / 2**20})
            print(" ".join(f"{key}={show(value)}" for key, value in rows[-1].items()), flush=True)
        if not arguments.quick:  # each case as it is done: the rest takes hours on a small machine
            write(rows, about, skipped, arguments.only)
    for model, clients in on_disk if arguments.only != "memory" else []:
        size = 4 * numel(model) * clients
        if size > arguments.largest * 2**31:
            skipped.append(f"{model} x {clients} spooled: {size / 2**30:.1f} GiB of replies")
            continue
        free = shutil.disk_usage(arguments.spool).free
        if size > free / 2:
            skipped.append(f"{model} x {clients} spooled: {size / 2**30:.0f} GiB, {free / 2**30:.0f} GiB free on disk")
            continue
        found = in_process("spooled", model, str(clients), arguments.spool)
        row = {"where": "disk", "model": model, "clients": clients, "contender": "FedFroM, spooled"}
        row |= {"seconds": found["seconds"], "replies MiB": size / 2**20, "peak MiB": found["peak"] / 2**20}
        rows.append(row)
        rows.append(
            {**row, "contender": "files, written and read", "seconds": found["disk"], "peak MiB": None}  # fmt: skip
        )
        print(" ".join(f"{key}={show(value)}" for key, value in row.items()), f"disk={found['disk']:.2f}", flush=True)
        if not arguments.quick:
            write(rows, about, skipped, arguments.only)
    for line in skipped:
        print("skipped:", line)
    if not arguments.quick:
        write(rows, about, skipped, arguments.only)


COLUMNS = ["where", "model", "clients", "contender", "seconds", "to FedAvg", "to copy", "to copy, warm", "replies MiB"]
COLUMNS += ["peak MiB"]


def show(value: Any) -> str:
    """Return a cell's text."""
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return "" if value is None else str(value)


def write(rows: list[dict[str, Any]], about: list[str], skipped: list[str], only: str | None) -> None:
    """Write the tables."""
    name = "full" if only is None else f"full-{only}"
    OUT.mkdir(parents=True, exist_ok=True)
    with open(OUT / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    lines = ["# Full models: one round's merge", "", *(f"- {line}" for line in about)]
    lines += [f"- Skipped: {line}" for line in skipped] + [""]
    lines += [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(show(row.get(column)) for column in COLUMNS)} |" for row in rows]
    (OUT / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
