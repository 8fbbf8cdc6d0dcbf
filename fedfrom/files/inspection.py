"""The comparison of models on disk before they are merged: the findings of `fedfrom inspect`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fedfrom.errors import BadInput
from fedfrom.files.merge import Progress, open_inputs, prepare
from fedfrom.merging.deltas import adapter_deltas, plain_tensors
from fedfrom.merging.linalg import blocks, norms
from fedfrom.merging.linalg.lowrank import LowRank
from fedfrom.merging.methods.frobenius import FroM
from fedfrom.merging.report import LayerReport, MergeReport
from fedfrom.merging.sources import Inputs

# the power iteration of `stable_rank`, for tensors that are no LoRA products
_BLOCK, _MOST_STEPS, _TOLERANCE = 8, 50, 1e-5


@dataclass(frozen=True)
class Inspection:
    """The comparison of the inputs, by layer.

    Attributes
    ----------
    report : MergeReport
        Report of a merge by FroM with the given k: norms, weights, cosines, interference.
    effective_ranks : dict[str, list[float]]
        Layer name -> the stable rank of each input's update, in the order of the inputs.
    """

    report: MergeReport
    effective_ranks: dict[str, list[float]]

    @property
    def layers(self) -> list[LayerReport]:
        """The layers with an update, sorted by name, layer 9 before layer 10."""

        def place(layer: LayerReport) -> list[tuple[int, str]]:
            return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", layer.name)]

        return sorted((layer for layer in self.report.layers if layer.is_update), key=place)

    def disagreeing(self, most: int) -> list[LayerReport]:
        """Return the layers in which a merge loses the largest share of the updates' energy, largest first."""
        return sorted(self.layers, key=lambda layer: -layer.interference)[:most]

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain JSON types; infinity becomes "infinity"."""
        wanted = ("name", "kind", "norms", "weights", "ranks_in", "cosines", "interference", "lambda_max", "k")
        layers = []
        for layer in self.layers:
            found = {name: value for name, value in asdict(layer).items() if name in wanted}
            found["ranks"] = found.pop("ranks_in")
            layers.append({**found, "effective_ranks": self.effective_ranks[layer.name]})
        return {
            "inputs": self.report.clients,
            "k": self.report.method["k"],
            "effective_rank": "stable rank: sum of squared singular values / the largest of them",
            "norms": [math.hypot(*(layer.norms[i] for layer in self.layers)) for i in range(len(self.report.clients))],
            "cosines": self.report.cosines(),
            "interference": self.report.interference,
            "layers": layers,
            "without_update": [layer.name for layer in self.report.layers if not layer.is_update],
        }


def inspect_folders(
    inputs: Sequence[str],
    k: float = 1.0,
    base: str | None = None,
    device: str = "cpu",
    force_base: bool = False,
    dora: bool = False,
    same_base: bool = False,
    progress: Progress | None = None,
) -> Inspection:
    """Compare adapters or checkpoints without writing a file: see `merge_folders` for the arguments.

    Parameters
    ----------
    k : float (default: 1.0)
        Power of the norm in the predicted weights, >= 0.

    Raises
    ------
    ValueError
        As `merge_folders`; checkpoints need a base.
    """
    models, pretrained, _ = open_inputs(inputs, base, None, device, force_base)
    if not models[0].is_adapter and pretrained is None:
        raise BadInput("--base: expected the pretrained model, which checkpoints' updates are relative to: pass --base")
    layers = prepare(models, pretrained, FroM(k=k), dora=dora, same_base=same_base)
    reports: list[LayerReport] = []
    found: dict[str, list[float]] = {}
    total = len(layers.inputs.sent[0].layers)
    for ((_, report),) in layers:
        reports.append(report)
        if report.is_update:
            found[report.name] = _stable_ranks(layers.inputs, report.name)
        if progress:
            progress(len(reports), total)
    if not found:
        raise BadInput(f"{models[0].name}: expected layers with an update, found none: are these fine-tuned models?")
    return Inspection(layers.report(reports), found)


def _stable_ranks(inputs: Inputs, name: str) -> list[float]:
    with torch.no_grad():
        if inputs.sent[0].layers[name].is_adapter:
            return [stable_rank(delta) for delta in adapter_deltas(inputs, name)[2]]
        _, values, references = plain_tensors(inputs, name)
        pairs = zip(values, references, strict=True)
        return [stable_rank(blocks.delta(value, reference)) for value, reference in pairs]


def stable_rank(matrix: LowRank | Tensor) -> float:
    """Return the sum of squared singular values / the largest: 1 for one direction, r for r equally strong directions.

    The value of an adapter's product is exact, from its small core. That of a tensor (flattened from dim 1) comes from
    a block power iteration, which ends when the largest singular value changes by less than 1e-5: it is within about a
    thousandth, and takes time linear in the tensor's size. A zero update has 0, a vector 1.
    """
    if isinstance(matrix, LowRank):
        S = torch.linalg.svdvals(matrix.core()[1])
        return _ratio(float(S[0]), float(torch.linalg.vector_norm(S)))
    norm = norms.delta_norm(matrix, None)
    if matrix.ndim < 2 or norm == 0.0:
        return 1.0 if norm else 0.0
    rows = matrix.flatten(1) / norm
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(rows.shape[1], min(_BLOCK, *rows.shape), dtype=rows.dtype, generator=generator).to(rows.device)
    largest = 0.0
    for _ in range(_MOST_STEPS):
        Y = rows @ torch.linalg.qr(X).Q
        before, largest = largest, float(torch.linalg.matrix_norm(Y.to(torch.float64), 2))
        if largest - before <= _TOLERANCE * largest:
            break
        X = rows.T @ Y
    return _ratio(largest, 1.0)


def _ratio(largest: float, norm: float) -> float:
    return (norm / largest) ** 2 if largest > 0 else 0.0
