"""The model card of a merged model: the README.md that the Hub shows."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from fedfrom.files.folders import Model
from fedfrom.merging.report import MergeReport
from fedfrom.merging.solve import RANK_OPTIONS
from fedfrom.merging.summary import client_rows, span

_HUB_NAME = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}")


def model_card(
    report: MergeReport, models: Sequence[Model], base: Model | None, examples: Sequence[float] | None, command: str
) -> str:
    """Return the card: the inputs, the method, each input's weights, and the command that repeats the merge."""
    adapter = models[0].is_adapter
    name = models[0].config.get("base_model_name_or_path") if adapter else (None if base is None else base.name)
    front: dict[str, Any] = {"library_name": "peft" if adapter else "transformers"}
    if isinstance(name, str) and _HUB_NAME.fullmatch(name):  # the Hub accepts no folders
        front["base_model"] = name
    front["tags"] = ["fedfrom", "merge", *(["lora"] if adapter else [])]
    # JSON is valid YAML, and its quotes keep every name inside its field
    head = "\n".join(f"{field}: {json.dumps(value)}" for field, value in front.items())
    what = "LoRA adapter" if adapter else "model"
    idle = () if report.method.get("solver") == "alternating" else ("iterations", "tolerance")
    own = report.method.get("weights")
    # weights are in the table, and full models have no rank
    hidden = {"weights", *idle, *(() if report.has_rank else RANK_OPTIONS)}
    shown = {field: value for field, value in report.method.items() if value is not None and field not in hidden}
    settings = ", ".join(f"{field} = {_number(value)}" for field, value in shown.items())
    lines = [
        "---",
        head,
        "---",
        "",
        f"# Merged {what}",
        "",
        f"{len(models)} {what}{'s' if len(models) > 1 else ''}, merged with [fedfrom](https://arxiv.org/abs/2506.02478).",
        "",
        f"- base model: {cell(str(name)) if name else 'not named by the inputs'}",
        f"- method: {cell(settings)}",
        *([f"- rank: {_rank(report)}"] if adapter else []),
        f"- interference (squared distance of the merge to the updates over their energy): {report.interference:.3f}",
        "",
        "| input | examples | weight given | norm of the update | weight, mean over layers | smallest | largest |",
        "|---|---|---|---|---|---|---|",
    ]
    for i, row in enumerate(client_rows(report)):
        count = "" if examples is None else f"{examples[i]:g}"
        given = "" if own is None else f"{own[i]:g}"
        cells = [
            cell(row.name),
            count,
            given,
            f"{row.norm:.4g}",
            *(f"{weight:.4f}" for weight in (row.mean, row.least, row.most)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if command:
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", command)), default=0))
        lines += ["", f"{fence}sh", command, fence]
    return "\n".join(lines) + "\n"


def _rank(report: MergeReport) -> str:
    """Return the rank, and what the cut to it costs."""
    layers = report.adapters
    ranks, shares = span(layer.rank_out for layer in layers), [layer.energy_dropped for layer in layers] or [0.0]
    lost = f"the cut drops {sum(shares) / len(shares):.1%} in the mean, {max(shares):.1%} at most, of a layer's energy"
    return f"{ranks or 0}{', by layer' if ' to ' in ranks else ''}; {lost}"


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def cell(text: str, most: int = 300) -> str:
    """Return text with Markdown's special characters escaped, on one line of at most so many characters."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]<>|#!])", r"\\\1", flat)[:most]
