"""The tables of `fedfrom inspect` for a terminal."""

from __future__ import annotations

import os
from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from fedfrom.files.inspection import Inspection
from fedfrom.merging.report import LayerReport
from fedfrom.merging.summary import client_rows

MOST_LAYERS = 10


def tables(inspection: Inspection, every_layer: bool) -> Iterator[Table]:
    """Yield a table of the inputs and one of the layers: the 10 with the largest interference, or all by name."""
    names = inspection.report.clients
    yield _inputs(inspection)
    layers = inspection.layers if every_layer else inspection.disagreeing(MOST_LAYERS)
    shown = (
        f"all {len(layers)}" if every_layer else f"{len(layers)} of {len(inspection.layers)}, most disagreement first"
    )
    table = Table(title=f"Layers ({shown})", title_justify="left", title_style="bold")
    table.add_column("layer", overflow="fold")
    for title in ("rank", "norm", "effective rank", "weight", "cosine", "interference"):
        table.add_column(title, justify="right")
    for layer in layers:
        effective = inspection.effective_ranks[layer.name]
        table.add_row(
            Text(layer.name),
            _each(layer.ranks_in, "{:d}"),
            _each(layer.norms, "{:.3g}"),
            _each(effective, "{:.1f}"),
            _each(layer.weights, "{:.2f}"),
            _pairs(layer),
            f"{layer.interference:.2f}",
        )
    table.caption = (
        f"One number an input, in the order above. weight: FroM's with k = {inspection.report.method['k']}. effective "
        "rank: the stable rank, sum of squared singular values / the largest of them. cosine: of two inputs' updates, "
        f"least and largest. interference: share of the updates' energy that the merge loses; in all layers together "
        f"{inspection.report.interference:.2f}."
    )
    table.caption_justify = "left"
    if len(names) == 1:
        table.columns[5].header = "cosine (one input)"
    yield table


def _inputs(inspection: Inspection) -> Table:
    rows, cosines = client_rows(inspection.report), inspection.report.cosines()
    table = Table(title="Inputs", title_justify="left", title_style="bold")
    table.add_column("", justify="right")
    table.add_column("input", overflow="fold")
    for title in ("ranks", "norm", "effective rank", "weight, mean", "least", "most"):
        table.add_column(title, justify="right")
    shown = cosines and 1 < len(rows) <= 8
    for i in range(len(rows) if shown else 0):
        table.add_column(f"cosine to {i + 1}", justify="right")
    for i, row in enumerate(rows):
        ranks = sorted({layer.ranks_in[i] for layer in inspection.layers if layer.ranks_in})
        effective = [inspection.effective_ranks[layer.name][i] for layer in inspection.layers]
        table.add_row(
            str(i + 1),
            Text(os.fspath(row.name)),
            "" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
            f"{row.norm:.4g}",
            f"{sum(effective) / len(effective):.1f}",
            *(f"{weight:.3f}" for weight in (row.mean, row.least, row.most)),
            *([f"{value:.2f}" for value in cosines[i]] if shown else []),
        )
    return table


def _each(values: list[int] | list[float], form: str) -> str:
    shown = [form.format(value) for value in values[:8]]
    return " ".join(shown) + (" …" if len(values) > 8 else "")


def _pairs(layer: LayerReport) -> str:
    pairs = [value for i, row in enumerate(layer.cosines) for value in row[:i]]
    return f"{min(pairs):.2f} {max(pairs):.2f}" if pairs else ""
