"""The tables of `fedfrom inspect`, fitted to a terminal: whole columns are left out, numbers are never cut."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from fedfrom.files.inspection import Inspection
from fedfrom.merging.report import LayerReport
from fedfrom.merging.summary import client_rows, shared_parts, span

MOST_LAYERS = 10
_LEAST_NAME = 16  # characters of a name that are on one line before a column is left out for more of them
_RULE = 3  # characters between two columns


@dataclass(frozen=True)
class _Column:
    """One column of numbers.

    Attributes
    ----------
    title : str
        Its heading.
    cells : list[str]
        One text a row.
    order : int
        Columns are tried in this order; each is kept if it still fits.
    """

    title: str
    cells: list[str]
    order: int

    @property
    def width(self) -> int:
        return max(map(len, [self.title, *self.cells]))


def tables(inspection: Inspection, every_layer: bool, width: int) -> Iterator[Table | Text]:
    """Yield the tables of the inputs and of the layers, each with its explanation below.

    Parameters
    ----------
    inspection : Inspection
        What was found.
    every_layer : bool
        All layers by name, in place of the 10 with the largest interference.
    width : int
        Characters of a line. Columns that don't fit are left out and named; names are folded where they have to be.
    """
    names = list(map(os.fspath, inspection.report.clients))
    found, left_out = _fitted("input", _without(names, *shared_parts(names, "/")), _of_inputs(inspection), width)
    found.title = "Inputs"
    yield found
    yield _below(["weight, least, most: mean, smallest and largest of FroM's weights over the layers."], left_out)
    layers = inspection.layers if every_layer else inspection.disagreeing(MOST_LAYERS)
    shown = (
        f"all {len(layers)}" if every_layer else f"{len(layers)} of {len(inspection.layers)}, most disagreement first"
    )
    names = [layer.name for layer in layers]
    shared = shared_parts(names, ".")
    found, left_out = _fitted("layer", _without(names, *shared), _of_layers(inspection, layers), width)
    found.title = f"Layers ({shown})"
    yield found
    lines = [
        f"One number an input, in the order above. weight: FroM's with k = {inspection.report.method['k']}. effective "
        "rank: the stable rank, sum of squared singular values / the largest of them. cosine: of two inputs' updates, "
        "least and largest. interference: share of the updates' energy that the merge loses; in all layers together "
        f"{inspection.report.interference:.2f}."
    ]
    if any(shared):
        lines.append(f"Names of layers are without {' and '.join(repr(part) for part in shared if part)}.")
    yield _below(lines, left_out)


def _of_inputs(inspection: Inspection) -> list[_Column]:
    rows, cosines, layers = client_rows(inspection.report), inspection.report.cosines(), inspection.layers
    places = range(len(rows))
    ranks = [span(layer.ranks_in[i] for layer in layers if layer.ranks_in) for i in places]
    effective = [[inspection.effective_ranks[layer.name][i] for layer in layers] for i in places]
    columns = [
        _Column("ranks", ranks, 4),
        _Column("norm", [f"{row.norm:.4g}" for row in rows], 1),
        _Column("effective rank", [f"{sum(values) / len(values):.1f}" for values in effective], 5),
        _Column("weight", [f"{row.mean:.3f}" for row in rows], 0),
        _Column("least", [f"{row.least:.3f}" for row in rows], 2),
        _Column("most", [f"{row.most:.3f}" for row in rows], 2),
    ]
    shown = range(len(rows)) if cosines and 1 < len(rows) <= 8 else ()
    return [*columns, *(_Column(f"cos {j + 1}", [f"{cosines[i][j]:.2f}" for i in places], 3) for j in shown)]


def _of_layers(inspection: Inspection, layers: Sequence[LayerReport]) -> list[_Column]:
    cosines = "cosine" if len(inspection.report.clients) > 1 else "cosine (one input)"
    return [
        _Column("rank", [_each(layer.ranks_in, "{:d}") for layer in layers], 5),
        _Column("norm", [_each(layer.norms, "{:.3g}") for layer in layers], 3),
        _Column("effective rank", [_each(inspection.effective_ranks[layer.name], "{:.1f}") for layer in layers], 4),
        _Column("weight", [_each(layer.weights, "{:.2f}") for layer in layers], 2),
        _Column(cosines, [_pairs(layer) for layer in layers], 1),
        _Column("interference", [f"{layer.interference:.2f}" for layer in layers], 0),
    ]


def _fitted(title: str, labels: list[str], columns: list[_Column], width: int) -> tuple[Table, list[str]]:
    """Return a table of the columns that fit beside the labels, numbered, and the titles of those that don't."""
    number = len(str(len(labels)))
    least = min(max(map(len, [title, *labels])), _LEAST_NAME)
    kept: list[_Column] = []
    for column in sorted(columns, key=lambda each: each.order):
        if number + least + sum(each.width + _RULE for each in [*kept, column]) + 3 * _RULE <= width:
            kept.append(column)
    table = Table(title_justify="left", title_style="bold")
    table.add_column("", justify="right")
    table.add_column(title, overflow="fold")
    shown = [column for column in columns if column in kept]
    for column in shown:
        table.add_column(column.title, justify="right", no_wrap=True, min_width=column.width)
    for place, label in enumerate(labels):
        table.add_row(str(place + 1), Text(label), *(column.cells[place] for column in shown))
    return table, [column.title for column in columns if column not in kept]


def _below(lines: list[str], left_out: list[str]) -> Text:
    if left_out:
        lines = [*lines, f"Left out to fit: {', '.join(left_out)}; --wide shows all columns."]
    return Text("\n".join([*lines, ""]), style="dim")


def _without(names: list[str], before: str, after: str) -> list[str]:
    return [name[len(before) : len(name) - len(after)] for name in names]


def _each(values: Sequence[int] | Sequence[float], form: str) -> str:
    shown = [form.format(value) for value in values[:8]]
    return " ".join(shown) + (" …" if len(values) > 8 else "")


def _pairs(layer: LayerReport) -> str:
    pairs = [value for i, row in enumerate(layer.cosines) for value in row[:i]]
    return f"{min(pairs):.2f} {max(pairs):.2f}" if pairs else ""
