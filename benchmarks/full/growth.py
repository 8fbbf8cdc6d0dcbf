"""The growth of a full model's round with the clients, the parameters, and the layers at equal parameters."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from benchmarks.adapters.figures import Curve, Panel, draw, slope
from benchmarks.full.contenders import FEDAVG, FEDFROM
from benchmarks.full.measure import in_process
from benchmarks.full.models import numel, shapes, size_of
from simulations.tables import write_table

SPOOLED = "FedFroM, spooled"
CLIENTS = (2, 4, 8, 16, 32)
WIDTHS = (128, 256, 512, 1024)
LAYERS = {2: 1024, 8: 512, 32: 256, 128: 128}
"""Width by layers: all have about the same 12 layers width^2 parameters, beside a few biases."""
ABOUT = (
    "Slopes are of a line fitted on log-log scales. Extra memory is the peak beyond the replies in memory and the "
    "global model, of a process of its own; spooled, where replies come one by one and go to disk, beyond the global "
    "model alone"
)


def growth(repeats: int, quick: bool, fits: Callable[[str, int], bool], spool: str) -> list[Panel]:
    """Measure all points that fit, and return the picture's columns: seconds and MiB of each contender."""
    some = slice(0, 2) if quick else slice(None)
    by_clients = [(n, "22M", n) for n in CLIENTS[some]]
    by_width = [(numel(model), model, 4) for model in (f"{d}x6x30522" for d in WIDTHS[some])]
    deep = [f"{d}x{layers}x0" for layers, d in LAYERS.items()]
    by_layers = [(size_of(model)[1], model, 4) for model in (deep[-2:] if quick else deep)]
    tensors = ", ".join(str(len(shapes(model))) for _, model, _ in by_layers)
    panels = [
        Panel(f"by clients, {numel('22M') / 1e6:.0f} M parameters", "clients", {}),
        Panel("by parameters, 4 clients", "parameters", {}),
        Panel(f"by layers, {numel(deep[0]) / 1e6:.0f} M parameters, 4 clients", "layers", {}),
    ]
    print(f"tensors of the models by layers: {tensors}", flush=True)
    found = []
    for panel, points in zip(panels, (by_clients, by_width, by_layers), strict=True):
        points = [point for point in points if fits(*point[1:])]
        curves: dict[str, Curve] = in_memory(points, repeats)
        if panel.quantity == "clients":
            curves[SPOOLED] = on_disk(points, repeats, spool)
        found.append(Panel(panel.title, panel.quantity, curves))
    return found


def in_memory(points: list[tuple[int, str, int]], repeats: int) -> dict[str, Curve]:
    """Return FedFroM's and FedAvg's curves for replies in memory."""
    curves: dict[str, list[tuple[int, float, float]]] = {FEDFROM: [], FEDAVG: []}
    for value, model, clients in points:
        seconds = in_process("timed", model, clients, repeats, list(curves))
        for name, curve in curves.items():
            curve.append((value, seconds[name], in_process("peak", name, model, clients) / 2**20))
            print(name, model, clients, *(f"{number:.3g}" for number in curve[-1][1:]), flush=True)
    return dict(curves)


def on_disk(points: list[tuple[int, str, int]], repeats: int, spool: str) -> Curve:
    """Return FedFroM's curve for replies that all go to disk."""
    curve = []
    for value, model, clients in points:
        runs = [in_process("spooled", model, clients, spool) for _ in range(repeats)]
        seconds = statistics.median(run["seconds"] for run in runs)
        curve.append((value, seconds, max(run["peak"] for run in runs) / 2**20))
        print(SPOOLED, model, clients, *(f"{number:.3g}" for number in curve[-1][1:]), flush=True)
    return curve


def write(panels: list[Panel], folder: Path, about: str) -> None:
    """Write the table and the picture."""
    rows: list[list[object]] = []
    for panel in panels:
        for name, curve in panel.curves.items():
            rows += [[panel.title, name, value, f"{seconds:.4g}", f"{mib:.4g}"] for value, seconds, mib in curve]
            slopes = [f"{slope(panel.fitted(curve), i):.3g}" for i in (1, 2)]
            rows.append([panel.title, name, "slope", *slopes])
    table = pd.DataFrame(rows, columns=["sweep", "contender", "value", "median s", "extra MiB"], dtype=object)
    write_table(folder, "full-growth", table, about)
    draw(panels, folder / "full-growth.png")
