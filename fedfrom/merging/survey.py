"""What a method of scope="model" has to know of the whole updates before any layer is merged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedfrom.merging.adapters import adapter_deltas
from fedfrom.merging.linalg import blocks
from fedfrom.merging.linalg.entries import Entries, Histogram, kth_largest
from fedfrom.merging.methods.base import Method, Survey
from fedfrom.merging.sources import Inputs, check_norms
from fedfrom.merging.tensors import delta_norms, plain_tensors
from fedfrom.merging.weighing import clip_factors


def survey(inputs: Inputs, method: Method, clip: float | None) -> Survey:
    """Return the method's survey of the clients' updates; buffers and layers without a delta are left out."""
    if method.scope != "model":
        return Survey()
    mixed = len({inputs.sent[0].layers[name].is_adapter for name in updated(inputs)}) > 1
    if mixed and inputs.sent[0].config is None:
        raise ValueError(
            "scope: expected adapter configs with scope='model', which compares adapters with plain tensors by their "
            "true size, found none: give configs= (a strategy: lora_config=), or scope='layer'"
        )
    if method.kept(0) is not None:
        return Survey(thresholds=_thresholds(inputs, method, clip))
    norms = [0.0] * len(inputs.sent)
    for name in updated(inputs):
        found = _norms(inputs, name)
        norms = [math.hypot(a, b * c) for a, b, c in zip(norms, found, clip_factors(found, clip), strict=True)]
    return Survey(norms=norms)


def _norms(inputs: Inputs, name: str) -> list[float]:
    """Return the norms of the clients' updates of one layer."""
    if inputs.sent[0].layers[name].is_adapter:
        found = [delta.norm() for delta in adapter_deltas(inputs, name)[2]]
    else:
        return delta_norms(inputs, name)
    return check_norms(found, inputs, name)


def _thresholds(inputs: Inputs, method: Method, clip: float | None) -> list[float]:
    """Return the magnitude that each client's largest entries reach; holds one dense adapter layer at a time."""
    names = updated(inputs)
    factors = {name: clip_factors([] if clip is None else _norms(inputs, name), clip) for name in names}
    layers = inputs.sent[0].layers
    wide = any(layers[name].is_adapter or _dtype(inputs, name) == torch.float64 for name in names)
    dtype = torch.float64 if wide else torch.float32
    thresholds = []
    for i in range(len(inputs.sent)):
        own = {name: 1.0 if clip is None else factors[name][i] for name in names}
        kept = method.kept(sum(_numel(inputs, name) for name in names)) or 0

        def counts(histogram: Histogram, i: int = i, own: dict[str, float] = own) -> Iterator[Tensor]:
            for name in names:
                yield from _counts(inputs, name, i, own[name], histogram, dtype)

        thresholds.append(float("inf") if kept == 0 else kth_largest(counts, kept, dtype)[0])
    return thresholds


def _numel(inputs: Inputs, name: str) -> int:
    """Return how many entries a layer's update has."""
    if inputs.sent[0].layers[name].is_adapter:
        return math.prod(inputs.sent[0].adapter(name).shape)
    return inputs.sent[0].values(name).numel()


def _dtype(inputs: Inputs, name: str) -> torch.dtype:
    """Return the dtype that a plain layer's updates are formed in."""
    return blocks.arithmetic(inputs.template(name).values(name).dtype)


def _counts(
    inputs: Inputs, name: str, i: int, factor: float, histogram: Histogram, dtype: torch.dtype
) -> Sequence[Tensor]:
    """Return counts of the magnitudes of client i's update of one layer, clipped, in that dtype."""
    if inputs.sent[0].layers[name].is_adapter:
        return [histogram(adapter_deltas(inputs, name)[2][i].dense().to(dtype).abs().reshape(-1).mul_(factor))]
    _, values, references = plain_tensors(inputs, name)
    return Entries([values[i]], [references[i]], [factor], _dtype(inputs, name)).counts(0, histogram, dtype)


def updated(inputs: Inputs) -> list[str]:
    """Return the names of the layers that have an update."""
    names = []
    for name, layer in inputs.sent[0].layers.items():
        plain = not layer.is_adapter
        without = plain and (layer.is_running_statistic or inputs.reference_of(name) is None)
        if not (without or (plain and not inputs.sent[0].values(name).dtype.is_floating_point)):
            names.append(name)
    return names
