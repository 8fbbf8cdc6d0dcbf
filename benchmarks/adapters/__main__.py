"""`python -m benchmarks.adapters [--quick] [--out results/speed]`: medians and ratios in one run.

Contenders run with one thread each, which is fastest for factors. The growth of FedFroM is measured with one thread for
each core.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import pandas as pd
import torch

from benchmarks.adapters.contenders import (
    ALTERNATING,
    DENSE,
    FLEXLORA,
    GIVEN,
    ITERATIONS,
    KNOTS,
    LEAN,
    PEFT,
    SVD,
    Optimum,
    sample,
)
from benchmarks.adapters.figures import Curve, Panel, draw, slope
from benchmarks.adapters.shapes import MODELS, RANKS, Shape
from benchmarks.adapters.timing import extra_memory, medians
from benchmarks.conditions import conditions
from fedfrom import merge
from simulations.tables import write_table

SQUARE = (4096, 4096)
# entries of the largest matrix whose SVD peers compute; the time of larger ones is scaled by min(d)^2 max(d)
LARGEST = 1024 * 4096


def layer(folder: Path, quick: bool, about: str) -> None:
    """Write the table of one 4096 x 4096 layer, r = 16, beside dense contenders."""
    rows = []
    for clients in (3, 32):
        turns = {SVD: 9, ALTERNATING: 3, KNOTS: 3, GIVEN: 3, LEAN: 3, DENSE: 3}
        if clients > 3:  # more turns would take minutes
            turns = {SVD: 9, ALTERNATING: 3, GIVEN: 1, LEAN: 1, DENSE: 1}
        if quick:
            turns = {SVD: 5, LEAN: 1, DENSE: 1}
        seconds, results = medians(turns, SQUARE, 16, clients)
        optimum = None if quick else Optimum(sample(SQUARE, 16, clients))
        for name, median in seconds.items():
            gap = None if optimum is None or name == KNOTS else optimum.excess(results[name])
            memory = None if quick or (clients > 3 and turns[name] == 1) else extra_memory(name, SQUARE, 16, clients)
            ratios = [seconds[dense] / median if dense in seconds else None for dense in (DENSE, LEAN, GIVEN)]
            rows.append([clients, name, turns[name], *map(_cell, [median, *ratios, gap, memory])])
            print(*rows[-1], sep="\t", flush=True)
    header = ["clients", "contender", "runs", "median s", "x dense", "x lean", "x T given", "excess", "extra MiB"]
    text = (
        f"One 4096 x 4096 layer, r = 16, float32, standard normal factors. {about}\n\n`{DENSE}` is {ITERATIONS} "
        "iterations of Eq. 7 and Eq. 8, with the objective each time, on T = sum w_i B_i A_i. In its time are the n "
        "products, their norms, which the weights are made of, and T, as any dense implementation must form them; the "
        f"products are kept until the weights are known. `{LEAN}` adds each product to T as it comes, which only k = 1 "
        f"allows; `{GIVEN}` is the iterations alone. `x ...`: how many times faster than those. `excess`: how far the "
        "objective is above the exact solution's in float64, of sum w_i |theta_i|^2; KnOTS minimises another."
    )
    write_table(folder, "adapters-layer", pd.DataFrame(rows, columns=header, dtype=object), text)


def models(folder: Path, quick: bool, about: str) -> None:
    """Write the table of whole adapters of three clients, beside PEFT's svd and FlexLoRA's mean of products."""
    rows = []
    for model, shapes in MODELS.items():
        rank, clients = RANKS[model], 3
        states: list[dict[str, torch.Tensor]] = [{} for _ in range(clients)]
        for shape, count in shapes.items():
            for state, one in zip(states, sample(shape, rank, clients), strict=True):
                state |= {f"{j}.{shape[0]}.{shape[1]}.{key}": value for j in range(count) for key, value in one.items()}
        whole = statistics.median(_seconds(states) for _ in range(1 if quick else 3))
        peers = {PEFT: 0.0, FLEXLORA: 0.0}
        scaled = False
        if not (quick and model == "RoBERTa-large"):
            for name in peers:
                known: dict[Shape, float] = {}
                for shape, count in sorted(shapes.items(), key=lambda item: item[0][0] * item[0][1]):
                    if shape[0] * shape[1] <= LARGEST:
                        known[shape] = medians({name: 1}, shape, rank, clients)[0][name]
                        found = known[shape]
                    else:
                        base = max(known, key=_work)
                        found, scaled = known[base] * _work(shape) / _work(base), True
                    peers[name] += count * found
        cells = [whole, *peers.values(), *(seconds / whole for seconds in peers.values())]
        rows.append([model, sum(shapes.values()), rank, *map(_cell, cells), "scaled" if scaled else "measured"])
        print(*rows[-1], sep="\t", flush=True)
    header = ["model", "modules", "rank", "FedFroM s", "PEFT svd s", "FlexLoRA s", "x PEFT", "x FlexLoRA", "peers"]
    text = (
        f"Whole adapters of 3 clients, all linear layers, float32. {about}\n\nFedFroM merges the whole adapter. Of its "
        "peers one module of each shape is timed, once, and counted as often as the model has it. `scaled`: shapes "
        "above 1024 x 4096 were not run; their time is that of 1024 x 4096 times min(d)^2 max(d), as an SVD's "
        "operations grow. 0: not run."
    )
    write_table(folder, "adapters-models", pd.DataFrame(rows, columns=header, dtype=object), text)


def growth(folder: Path, quick: bool, about: str) -> None:
    """Write the table and the picture of time and memory by clients, rank and width."""
    sweeps: dict[str, list[tuple[int, Shape, int, int]]] = {
        "clients, d = 1024, r = 8": [(n, (1024, 1024), 8, n) for n in (32, 100, 316, 1000)],
        "clients, d = 4096, r = 8": [(n, (4096, 4096), 8, n) for n in (3, 10, 32, 100, 316, 1000)],
        "rank, d = 4096, 3 clients": [(r, (4096, 4096), r, 3) for r in (4, 8, 16, 32, 64, 128, 256)],
        "d, r = 16, 3 clients": [(d, (d, d), 16, 3) for d in (256, 512, 1024, 2048, 4096, 8192)],
    }
    if quick:
        sweeps = {key: points[:: 1 if "1024" in key else 3] for key, points in sweeps.items() if "4096, r" not in key}
    rows, curves = [], {}
    for sweep, points in sweeps.items():
        curve = []
        for x, shape, rank, clients in points:
            runs = 1 if quick else 3 if clients * rank * shape[0] > 1 << 21 else 7
            seconds = medians({SVD: runs}, shape, rank, clients)[0][SVD]
            memory = 0.0 if quick else extra_memory(SVD, shape, rank, clients)
            curve.append((x, seconds, memory))
            rows.append([sweep, x, runs, _cell(seconds), _cell(memory)])
            print(*rows[-1], sep="\t", flush=True)
        curves[sweep] = curve
        fitted = [point for point in curve if not sweep.startswith("clients") or point[0] >= 32]
        rows.append([f"{sweep}: slope", "", "", *(_cell(slope(fitted, i)) for i in (1, 2))])
        print(*rows[-1], sep="\t", flush=True)
    header = ["sweep", "value", "runs", "median s", "extra MiB"]
    text = (
        f"FedFroM svd, one layer, float32. {about}\n\nSlopes are of a line fitted on log-log scales, for clients from "
        "32 on. Extra memory is the peak above the inputs, of a process of its own with one thread."
    )
    write_table(folder, "adapters-growth", pd.DataFrame(rows, columns=header, dtype=object), text)
    if not quick:  # the picture needs the memory
        draw(panels(curves), folder / "adapters-growth.png")


def panels(curves: Mapping[str, Curve]) -> list[Panel]:
    """Return the picture's columns: by clients, by rank and by width."""
    titles = {"clients": "by clients", "rank": "by rank", "d": "by width d of a d x d layer"}
    return [
        Panel(
            title,
            quantity,
            {name.split(", ", 1)[1]: curve for name, curve in curves.items() if name.split(",")[0] == quantity},
            32 if quantity == "clients" else 0,
        )
        for quantity, title in titles.items()
    ]


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def _work(shape: Shape) -> int:
    return min(shape) ** 2 * max(shape)


def _seconds(states: list[dict[str, torch.Tensor]]) -> float:
    start = time.perf_counter()
    merge(states)
    return time.perf_counter() - start


def main() -> None:
    """Run the parts asked for."""
    parts = {"layer": layer, "models": models, "growth": growth}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="about a minute or two: fewer points, no memory")
    parser.add_argument("--only", choices=list(parts), help="one part [default: all]")
    parser.add_argument("--out", type=Path, default=Path("results/speed"), help="folder of tables and pictures")
    options = parser.parse_args()
    for name, part in parts.items():
        if options.only in (None, name):
            torch.set_num_threads((os.cpu_count() or 1) if part is growth else 1)
            about = ". ".join(conditions("python -m benchmarks.adapters", "torch", "peft")) + "."
            part(options.out, options.quick, about)


if __name__ == "__main__":
    main()
