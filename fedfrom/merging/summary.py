"""What a merge did, in a few lines for a terminal."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from fedfrom.merging.report import MergeReport

MOST_CLIENTS = 12  # that a summary lists
MUCH = 0.7  # of the weight, from which one client is said to have most of it


@dataclass(frozen=True)
class ClientRow:
    """One client's part in a merge.

    Attributes
    ----------
    name : str
        The client's.
    norm : float
        ||theta_i||_F of its whole update, as sent.
    mean, least, most : float
        Of its weights over the layers.
    """

    name: str
    norm: float
    mean: float
    least: float
    most: float


def client_rows(report: MergeReport) -> list[ClientRow]:
    """Return each client's part, in the order in which clients were given."""
    layers = [layer for layer in report.layers if layer.is_update]
    weighed = layers or [layer for layer in report.layers if layer.weights]
    rows = []
    for i, name in enumerate(report.clients):
        weights = [layer.weights[i] for layer in weighed] or [1 / len(report.clients)]
        norm = math.hypot(*(layer.norms[i] for layer in layers))
        rows.append(ClientRow(name, norm, sum(weights) / len(weights), min(weights), max(weights)))
    return rows


def summary(report: MergeReport, width: int = 80) -> str:
    """Return the clients' weights, how far their updates agree, and what the rank costs; no line is longer than width.

    Of long names the end is shown, which tells files of one folder apart.
    """
    count = len(report.clients)
    lines = [f"{_method(report)}: {_several(count, 'input')}, {_several(len(report.layers), 'layer')}"]
    rows = client_rows(report)
    if any(layer.weights for layer in report.layers):
        lines.append("weight, mean over layers (least to most):")
        prefix = len(os.path.commonpath(report.clients)) if _are_paths(report.clients) else 0
        for row in rows[:MOST_CLIENTS]:
            numbers = f"  {row.mean:.3f} ({row.least:.3f} to {row.most:.3f})  "
            lines.append(numbers + _ended(row.name[prefix:].lstrip("/"), width - len(numbers)))
        if count > MOST_CLIENTS:
            lines.append(f"  and {count - MOST_CLIENTS} more")
    if pairs := [cosine for i, row in enumerate(report.cosines()) for cosine in row[:i]]:
        lines.append(f"cosines between updates: {min(pairs):.2f} to {max(pairs):.2f}")
    if any(layer.is_update for layer in report.layers):
        lines.append(f"interference {report.interference:.2f} (squared distance to the updates over their energy)")
    if ranks := sorted({layer.rank_out for layer in report.layers if layer.kind == "adapter"}):
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        most = max(layer.energy_dropped for layer in report.layers)
        lines.append(f"rank {rank}: the cut drops up to {most:.1%} of a layer's energy")
    largest = max(rows, key=lambda row: row.mean)
    if count > 2 and largest.mean >= MUCH:
        lines.append(f"note: one input has {largest.mean:.0%} of the weight")
    return "\n".join(lines)


def _method(report: MergeReport) -> str:
    """Return the method's name with what was set of its weights, its scale and its share of entries."""
    shown = {name: report.method.get(name) for name in ("k", "coefficient", "density")}
    if report.method["server_lr"] != 1:
        shown["server_lr"] = report.method["server_lr"]
    settings = ", ".join(f"{name} = {value:g}" for name, value in shown.items() if isinstance(value, int | float))
    return f"{report.method['name']} ({settings})" if settings else str(report.method["name"])


def _several(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _are_paths(names: list[str]) -> bool:
    """Return whether names are paths, of which the folder that they share need not be said."""
    return len(names) > 1 and all("/" in name and name.startswith("/") == names[0].startswith("/") for name in names)


def _ended(name: str, width: int) -> str:
    return name if len(name) <= width else "…" + name[1 - width :]
