"""The data of one strategy in results.json, as plain JSON for a page's tables and pictures."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fedfrom.pages.look import clean, display_name
from fedfrom.pages.runs import Run, adapter_folder, entries, mapping, number
from fedfrom.pages.spectra import singular_values

OF_ROUNDS = ("bytes-up", "bytes-down", "seconds", "server-seconds", "evaluation-seconds")


def strategy(run: Run, label: str) -> dict[str, Any]:
    """Return all data of one strategy of a run on a page.

    Texts are cleaned. Values that the file lacks, or has in another type, are None or empty. Keys have the names of
    results.json. Lists under "by-round" have an entry for each of "rounds"; lists under "merges" for each of "rounds"
    there.
    """
    found = mapping(mapping(run.found["strategies"]).get(label))
    rounds = [entry for entry in map(mapping, entries(found.get("rounds"))) if isinstance(entry.get("number"), int)]
    reports = _reports(found)
    names = _clients_of_nodes(reports.values())
    merges = {at: merge for at, report in reports.items() if (merge := mapping(report.get("merge")))}
    scores = [number(mapping(entry.get("scores")).get("score")) for entry in rounds]
    values = {
        "label": clean(label),
        "name": clean(display_name(label)),
        "final": number(found.get("final", scores[-1] if scores else None)),
        "best": number(found.get("best")),
        "rounds-to-target": number(found.get("rounds-to-target")),
        "bytes-up": number(found.get("bytes-up")),
        "bytes-down": number(found.get("bytes-down")),
        "rounds": [entry["number"] for entry in rounds],
        "by-round": {
            "score": scores,
            "loss": [number(mapping(entry.get("scores")).get("loss")) for entry in rounds],
            **{name: [number(entry.get(name)) for entry in rounds] for name in OF_ROUNDS},
        },
        "weights": _weights(rounds),
        "merges": {"rounds": list(merges), **_merges(list(merges.values()))},
        "last-merge": _last(merges, reports),
        "replies": [_replies(at, report, names) for at, report in reports.items()],
        "replied": {str(entry["number"]): len(mapping(entry.get("clients"))) for entry in rounds if entry["number"]},
        "seconds": _seconds(found),
    }
    try:
        folder = adapter_folder(run, label)
        if folder is None:
            raise ValueError("The strategy's name names no folder.")
        return {**values, "spectra": singular_values(folder), "no-spectra": None}
    except ValueError as error:
        return {**values, "spectra": {}, "no-spectra": str(error)}


def _reports(found: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    reports = mapping(found.get("reports"))
    return {int(key): mapping(reports[key]) for key in sorted((key for key in reports if _whole(key)), key=int)}


def _whole(key: str) -> bool:
    return key.isascii() and key.isdigit() and len(key) < 10


def _clients_of_nodes(reports: Any) -> dict[str, str]:
    """Return the client of each node that was merged in any round; of other nodes the client is not known."""
    return {
        str(node): f"client {clean(client)}"
        for report in reports
        for node, client in zip(entries(report.get("nodes")), entries(report.get("clients")), strict=False)
        if client is not None
    }


def _weights(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return each client's weight by round, mean over layers; None in rounds without the client."""
    weighed = [entry for entry in rounds if mapping(entry.get("weights"))]
    clients = sorted({key for entry in weighed for key in entry["weights"]}, key=_order)
    return {
        "rounds": [entry["number"] for entry in weighed],
        "clients": list(map(clean, clients)),
        "values": [[number(entry["weights"].get(client)) for entry in weighed] for client in clients],
    }


def _order(key: str) -> tuple[int, str]:
    return (int(key), "") if _whole(key) else (10**9, key)


def _merges(merges: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    layers = [_layers(merge) for merge in merges]
    adapters = [[layer for layer in found if layer["kind"] == "adapter"] for found in layers]
    return {
        "interference": [number(merge.get("interference")) for merge in merges],
        "cosine-mean": [_mean(_pairs(_matrix(merge.get("cosines")))) for merge in merges],
        "lambda-max": [_most(layer["lambda-max"] for layer in found) for found in layers],
        "energy-dropped": [_mean(layer["energy-dropped"] for layer in found) for found in adapters],
        "energy-dropped-most": [_most(layer["energy-dropped"] for layer in found) for found in adapters],
        "rank-out": [_most(layer["rank-out"] for layer in found) for found in adapters],
    }


def _layers(merge: Mapping[str, Any]) -> list[dict[str, Any]]:
    numbers = ("rank_out", "energy_dropped", "interference", "lambda_max", "clients_effective")
    return [
        {
            "name": clean(layer.get("name", "")),
            "kind": clean(layer.get("kind", "")),
            "ranks-in": list(map(number, entries(layer.get("ranks_in")))),
            "weights": list(map(number, entries(layer.get("weights")))),
            **{name.replace("_", "-"): number(layer.get(name)) for name in numbers},
        }
        for layer in map(mapping, entries(merge.get("layers")))
    ]


def _last(merges: Mapping[int, Mapping[str, Any]], reports: Mapping[int, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the last merge: its clients in order, their cosines, and the layers."""
    if not merges:
        return None
    last = max(merges)
    report, merge = reports[last], merges[last]
    clients = entries(report.get("clients")) or entries(merge.get("clients"))
    cosines = _matrix(merge.get("cosines"))
    if len(cosines) != len(clients):  # their clients are not known
        cosines = []
    order = sorted(range(len(clients)), key=lambda i: _order(str(clients[i])))
    cosines = [[cosines[i][j] for j in order] for i in order] if cosines else []
    clients = [clients[i] for i in order]
    return {"round": last, "clients": list(map(clean, clients)), "cosines": cosines, "layers": _layers(merge)}


def _matrix(value: Any) -> list[list[float | None]]:
    rows = [list(map(number, entries(row))) for row in entries(value)]
    return rows if all(len(row) == len(rows) for row in rows) else []


def _pairs(matrix: Sequence[Sequence[float | None]]) -> list[float | None]:
    return [row[j] for i, row in enumerate(matrix) for j in range(i)]


def _replies(server_round: int, report: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    def who(node: Any) -> str:
        return names.get(str(node), f"node {clean(node)}")

    lost = {
        kind: {who(node): clean(why) for node, why in mapping(report.get(kind)).items()}
        for kind in ("rejected", "failed")
    }
    return {
        "round": server_round,
        "merged": len(entries(report.get("nodes"))) if mapping(report.get("merge")) else 0,
        **lost,
        "missing": [who(node) for node in entries(report.get("missing"))],
        "skipped": not mapping(report.get("merge")),
        "examples-capped": number(report.get("examples_capped")),
    }


def _seconds(found: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the parts of the wall time; "rest" is the time in no part, None where a part is unknown."""
    names = ("training-seconds", "evaluation-seconds", "server-seconds", "wall-seconds")
    parts = {name: number(found.get(name)) for name in names}
    *busy, wall = parts.values()
    known = [seconds for seconds in busy if seconds is not None]
    # the parts come from the clocks of two processes: their sum may exceed the wall time by milliseconds
    rest = max(0.0, wall - sum(known)) if wall is not None and len(known) == len(busy) else None
    return {**parts, "rest-seconds": rest, "overhead": number(found.get("overhead"))}


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _most(values: Any) -> float | None:
    return max((value for value in values if value is not None), default=None)
