"""Full models: a round's `aggregate_train` of FedFroM, Flower's FedAvg and a plain copy of the same bytes, in one run.

    python -m benchmarks.full                       # all that memory and disk allow; writes results/speed/full-*
    python -m benchmarks.full --only growth         # how time and memory grow, with a picture
    python -m benchmarks.full --mergekit PYTHON     # mergekit's linear too, by an interpreter that has mergekit
    python -m benchmarks.full --quick               # a minute or two, writes nothing but to --out

memory: medians of the contenders, and ratios to the copy. The contenders take turns on the same replies, so that a busy
machine slows all of them. `copy` writes into fresh memory, as a tensor's clone() does; `copy, warm` writes into memory
that was written before, whose pages are already mapped. mergekit's linear has the same tensors in a process of its own,
which waits while others have their turn; it starts from tensors, which the strategies have to decode first. Each
contender's peak, beyond the replies and the global model, is measured in a process of its own.
spooled: medians and the highest peak of FedFroM without memory for replies: each reply goes to disk when it arrives.
Beside it, the same bytes are written to plain files on that disk when they arrive, and read back. Both take turns, each
in a process of its own that starts with the global model, since writes to a disk take longer where the system has to
find memory first. Cases above 8 GiB run once.
growth: FedFroM and FedAvg in memory, and FedFroM spooled, by clients, parameters and layers.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import re
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.conditions import conditions
from benchmarks.full import growth
from benchmarks.full.contenders import CONTENDERS, COPY, FEDAVG, FEDFROM, LINEAR, ROOT, WARM
from benchmarks.full.measure import in_process, peak_of_linear
from benchmarks.full.models import BF16, bytes_of
from fedfrom.atomic import write_whole
from simulations.tables import markdown

OUT = ROOT / "results" / "speed"
IN_MEMORY = [("22M", 4), ("110M", 4), ("350M", 4), ("22M", 16), ("110M", 16), ("350M", 16), ("22M", 64)]
IN_MEMORY += [("110M", 64), ("350M", 64)]
SPOOLED = [("110M", 4), ("110M", 16), ("350M", 4), ("22M", 64), ("350M", 16), ("110M", 64), ("350M", 64)]
SPOOLED += [("350M-bf16", 4), ("350M-bf16", 64)]
QUICK = [("22M", 4), ("22M", 16)]
LIMIT = 0.6  # share of the free memory that a case's replies may take
LIMIT_OF_DISK = 0.8  # share of the free disk that a case's replies may take
ONCE = 8 * 2**30  # bytes of spooled replies beyond which a case is not repeated
COLUMNS = ["model", "clients", "contender", "seconds", "to FedAvg", "to copy", "to copy, warm", "replies MiB"]
COLUMNS += ["peak MiB"]
Case = tuple[str, int]


def memory() -> int:
    """Return the bytes of available memory."""
    return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])  # type: ignore[index]


class Bounds:
    """The cases that memory and disk allow; `skipped` has the others with the reason."""

    def __init__(self, largest: float, spool: str, copies: int) -> None:
        self.largest, self.spool, self.copies = largest * 2**30, spool, copies
        self.skipped: list[str] = []

    def in_memory(self, model: str, clients: int) -> bool:
        """Return whether all contenders accept a case's replies, and all copies of the replies fit."""
        if model.endswith(BF16):
            self.skipped.append(f"{model} x {clients} in memory: FedAvg takes no bfloat16")
            return False
        size = bytes_of(model) * clients
        return self._fits(f"{model} x {clients} in memory", size * self.copies, self.largest, LIMIT * memory(), size)

    def on_disk(self, model: str, clients: int) -> bool:
        """Return whether a case's replies fit on disk; FedFroM's are deleted before the plain files are written."""
        size = bytes_of(model) * clients
        free = LIMIT_OF_DISK * shutil.disk_usage(self.spool).free
        return self._fits(f"{model} x {clients} spooled", size, 2 * self.largest, free, size)

    def _fits(self, what: str, needed: float, largest: float, free: float, size: int) -> bool:
        fits = needed <= min(largest, free)
        if not fits:
            limit = f"{min(largest, free) / 2**30:.1f} GiB {'are the limit' if largest < free else 'may be taken'}"
            self.skipped.append(f"{what}: {size / 2**30:.1f} GiB of replies, {needed / 2**30:.1f} needed, {limit}")
        return fits


def conditions_here() -> list[str]:
    """Return the conditions of the measurement."""
    return conditions("python -m benchmarks.full", "fedfrom", "flwr", "torch", "numpy")


def in_memory(cases: list[Case], repeats: int, bounds: Bounds, mergekit: str | None, table: Table) -> None:
    """Time all contenders on replies in memory."""
    table.about.append(f"{LINEAR}: left out, no interpreter that has mergekit was given" if mergekit is None else "")
    for model, clients in cases:
        if not bounds.in_memory(model, clients):
            continue
        found = in_process("timed", model, clients, repeats, list(CONTENDERS), mergekit)
        if mergekit is not None:
            table.about[-1] = f"{LINEAR}: {found.pop('versions')}, {repeats} runs in a process of its own"
        for name, seconds in found.items():
            own = None
            if name in (FEDFROM, FEDAVG):
                own = in_process("peak", name, model, clients)
            elif name == LINEAR and mergekit is not None:
                own = peak_of_linear(mergekit, model, clients)
            row = {"model": model, "clients": clients, "contender": name, "seconds": seconds}
            row |= {"to copy": seconds / found[COPY], "to copy, warm": seconds / found[WARM]}
            row |= {"to FedAvg": seconds / found[FEDAVG], "replies MiB": bytes_of(model) * clients / 2**20}
            table.add(row | {"peak MiB": None if own is None else own / 2**20})
        table.write(bounds.skipped)  # after each case: all cases take hours on a small machine


def on_disk(cases: list[Case], repeats: int, spool: str, bounds: Bounds, table: Table) -> None:
    """Time FedFroM on replies that go to disk."""
    for model, clients in cases:
        if not bounds.on_disk(model, clients):
            continue
        size = bytes_of(model) * clients
        found: dict[str, list[Any]] = {"spooled": [], "files": []}
        for turn in range(repeats if size <= ONCE else 1):
            for kind in random.Random(turn).sample([*found], 2):
                found[kind].append(in_process(kind, model, clients, spool))
        row = {"model": model, "clients": clients, "replies MiB": size / 2**20}
        seconds = statistics.median(run["seconds"] for run in found["spooled"])
        peak = max(run["peak"] for run in found["spooled"])
        table.add({**row, "contender": growth.SPOOLED, "seconds": seconds, "peak MiB": peak / 2**20})
        table.add({**row, "contender": "files, written and read", "seconds": statistics.median(found["files"])})
        table.write(bounds.skipped)


class Table:
    """Rows that are printed when they are added, and written to a folder where one is given."""

    def __init__(self, name: str, about: list[str], folder: Path | None) -> None:
        self.name, self.about, self.folder = name, list(about), folder
        self.rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        """Add a row and print it."""
        self.rows.append(row)
        print(" ".join(f"{key}={show(value)}" for key, value in row.items() if value is not None), flush=True)

    def write(self, skipped: list[str]) -> None:
        """Write the table so far."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        table = pd.DataFrame(self.rows, columns=COLUMNS, dtype=object)
        write_whole(self.folder / f"{self.name}.csv", table.to_csv(index=False, lineterminator="\n"))
        lines = ["# Full models: one round's merge", "", *(f"- {line}" for line in self.about)]
        lines += [f"- Skipped: {line}" for line in skipped] + ["", *markdown(table.map(show))]
        write_whole(self.folder / f"{self.name}.md", "\n".join(lines) + "\n")


def show(value: Any) -> str:
    """Return a cell's text: three digits of a float, nothing for None and NaN."""
    if pd.isna(value):
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return str(value)


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest cases, each once")
    parser.add_argument("--repeats", type=int, help="runs that a median is of [default: 3; with --quick 1]")
    parser.add_argument("--spool", default=tempfile.gettempdir(), help="where spooled replies go")
    parser.add_argument("--only", choices=["memory", "spooled", "growth"], help="one part [default: all]")
    parser.add_argument(
        "--cases",
        nargs="+",
        help="such as 22M:4 110M:16, for memory and spooled, 350M-bf16:64, for spooled [default: all]",
    )
    parser.add_argument("--largest", type=float, default=16, help="GiB of replies in memory, and twice as much on disk")
    parser.add_argument("--mergekit", metavar="PYTHON", help="interpreter that has mergekit [default: this, if it has]")
    parser.add_argument("--out", type=Path, help="folder to write to [default: results/speed; --quick: none]")
    options = parser.parse_args()
    here = sys.executable if importlib.util.find_spec("mergekit") else None
    mergekit = options.mergekit or here
    repeats = options.repeats or (1 if options.quick else 3)
    folder = options.out or (None if options.quick else OUT)
    named = [(model, int(n)) for model, n in (case.split(":") for case in options.cases)] if options.cases else None
    if options.only in (None, "memory"):
        bounds = Bounds(options.largest, options.spool, copies=1 if mergekit is None else 2)
        table = Table("full-memory", conditions_here(), folder)
        in_memory(named or (QUICK if options.quick else IN_MEMORY), repeats, bounds, mergekit, table)
        finish(table, bounds)
    if options.only in (None, "spooled"):
        bounds = Bounds(options.largest, options.spool, copies=1)
        table = Table("full-spooled", conditions_here(), folder)
        on_disk(named or (QUICK if options.quick else SPOOLED), repeats, options.spool, bounds, table)
        finish(table, bounds)
    if options.only in (None, "growth"):
        bounds = Bounds(options.largest, options.spool, copies=1)
        about = conditions_here()  # before the load of the measurement itself
        panels = growth.growth(repeats, options.quick, bounds.in_memory, options.spool)
        if folder is not None:
            growth.write(panels, folder, ". ".join([*about, *bounds.skipped, growth.ABOUT]))


def finish(table: Table, bounds: Bounds) -> None:
    """Write the finished table, and print the skipped cases."""
    table.write(bounds.skipped)
    for line in bounds.skipped:
        print("skipped:", line)


if __name__ == "__main__":
    main()
