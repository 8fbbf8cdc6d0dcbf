"""What a merge did, in a few lines for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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
    """Return the clients' weights, how far their updates agree, and what the rank costs.

    Clients' names are cut to a line of this width. Their end is shown, which tells files of one folder apart.
    """
    count = len(report.clients)
    lines = [f"{_method(report)}: {_several(count, 'input')}, {_several(len(report.layers), 'layer')}"]
    rows = client_rows(report)
    if any(layer.weights for layer in report.layers):
        lines.append("weight, mean over layers (least to most):")
        folder, _ = shared_parts(report.clients, "/")
        for row in rows[:MOST_CLIENTS]:
            numbers = f"  {row.mean:.3f} ({row.least:.3f} to {row.most:.3f})  "
            lines.append(numbers + _ended(row.name.removeprefix(folder), width - len(numbers)))
        if count > MOST_CLIENTS:
            lines.append(f"  and {count - MOST_CLIENTS} more")
    if pairs := [cosine for i, row in enumerate(report.cosines()) for cosine in row[:i]]:
        lines.append(f"cosines between updates: {min(pairs):.2f} to {max(pairs):.2f}")
    if any(layer.is_update for layer in report.layers):
        lines.append(f"interference {report.interference:.2f} (squared distance to the updates over their energy)")
    if adapters := report.adapters:
        rank, most = span(layer.rank_out for layer in adapters), max(layer.energy_dropped for layer in adapters)
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


def span(numbers: Iterable[int]) -> str:
    """Return whole numbers as "8", or "8 to 16" where they differ; "" of none."""
    found = sorted(set(numbers))
    return f"{found[0]} to {found[-1]}" if len(found) > 1 else "".join(map(str, found))


def shared_parts(names: Sequence[str], separator: str) -> tuple[str, str]:
    """Return what all names begin with and what all end with, in whole parts between separators.

    One part of each name is never shared. Of a single name nothing is.
    """
    parts = [name.split(separator) for name in names]
    first = last = 0
    shortest = min(map(len, parts), default=0) if len(names) > 1 else 0
    while first < shortest - 1 and len({own[first] for own in parts}) == 1:
        first += 1
    while last < shortest - first - 1 and len({own[-1 - last] for own in parts}) == 1:
        last += 1
    before, after = (parts[0][:first], parts[0][len(parts[0]) - last :]) if parts else ([], [])
    return "".join(part + separator for part in before), "".join(separator + part for part in after)


def _ended(name: str, width: int) -> str:
    return name if len(name) <= width else "…" + name[1 - width :]
