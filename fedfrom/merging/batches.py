"""Which layers are merged together: small plain tensors in batches, since calls take most of their time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from fedfrom.merging.adapters import AdapterUpdates
from fedfrom.merging.clients import Round
from fedfrom.merging.layer import LayerUpdates
from fedfrom.merging.linalg import blocks
from fedfrom.merging.linalg.threads import begin
from fedfrom.merging.methods.base import Method
from fedfrom.merging.report import LayerReport
from fedfrom.merging.sources import Inputs
from fedfrom.merging.stability import Weighing, once_each, weigh
from fedfrom.merging.tensors import TensorUpdates, keep

Results = list[tuple[dict[str, Tensor], LayerReport]]
"""One layer's merge by each candidate: tensors by key, and the report."""

# Maximum float32 entries held per batch: results, small tensors' updates (float64, all clients), cosines.
_BATCH = 1 << 23


class Part(NamedTuple):
    """A layer of a batch.

    Attributes
    ----------
    name : str
        The layer.
    is_plain : bool
        A floating-point plain tensor: neither an adapter nor integers.
    is_light : bool
        Merging it keeps no client's tensor in memory.
    entries_to_read : int
        Entries of a tensor that is read from elsewhere, a block at a time; 0 of one in memory.
    """

    name: str
    is_plain: bool = False
    is_light: bool = False
    entries_to_read: int = 0


def batches(inputs: Inputs) -> Iterator[list[Part]]:
    """Yield the layers in order: as many small plain tensors at once as one batch holds, all else one by one."""
    clients = len(inputs.sent)
    lazy = any(source.state.is_lazy for source in inputs.sent)
    is_read = any(source.state.is_read for source in inputs.sent)
    others = [source for source in (inputs.reference, *inputs.received) if source is not None]
    in_memory = not any(source.state.is_lazy or source.state.is_read for source in others)
    batch: list[Part] = []
    taken = 0
    for name, layer in inputs.sent[0].layers.items():
        part, own = Part(name), _BATCH
        if not layer.is_adapter:
            values = inputs.sent[0].values(name)
            size = values.numel()
            # a tensor that is read whole when it is asked for is held for one layer alone
            held = inputs.sent[0].state.is_read and isinstance(values, Tensor)
            part = Part(name, values.dtype.is_floating_point, in_memory and not held, size if is_read else 0)
            if not lazy:
                rows = 2 * clients * size if blocks.is_small(values) and part.is_light else 0
                own = size + rows + (2 * clients**2 if part.is_light else 0)
        if batch and taken + own > _BATCH:
            yield batch
            batch, taken = [], 0
        batch.append(part)
        taken += own
    if batch:
        yield batch


def merge_batch(batch: Sequence[Part], inputs: Inputs, methods: Sequence[Method], shared: Round) -> dict[str, Results]:
    """Return each layer of a batch merged by each method."""

    def merged(parts: Sequence[Part]) -> list[Results]:
        return _merge_tensors(parts, inputs, methods, shared)

    light = [part for part in batch if part.is_plain and part.is_light]
    apart = [part for part in batch if part.is_plain and not part.is_light]
    waiting = [begin(part.entries_to_read, partial(merged, [part])) for part in apart]
    found = dict(zip([part.name for part in light], merged(light), strict=True))
    found |= {part.name: wait()[0] for part, wait in zip(apart, waiting, strict=True)}
    for name in [part.name for part in batch if not part.is_plain]:
        if inputs.sent[0].layers[name].is_adapter:
            layer = AdapterUpdates(inputs, name, shared)
            [weighings] = weigh([layer], methods, inputs.examples, inputs.weights, shared.server_lr)
            found[name] = once_each(weighings, layer.merge)
        else:
            found[name] = [keep(inputs, name)] * len(methods)
    return found


def _merge_tensors(parts: Sequence[Part], inputs: Inputs, methods: Sequence[Method], shared: Round) -> list[Results]:
    """Return plain tensors merged by each method, all of them weighed together.

    A tensor without a reference, or a running statistic, has no update that a norm could weigh or the server scale: it
    becomes the mean of the clients' values.
    """

    def read(name: str) -> TensorUpdates:
        layer = TensorUpdates(inputs, name, shared)
        layer.gram  # noqa: B018 (formed here, on the thread that reads)
        return layer

    reading = [begin(part.entries_to_read, partial(read, part.name)) for part in parts]
    layers = [wait() for wait in reading]
    weighings: dict[str, list[Weighing]] = {}
    for alike in _by_kind(layers):
        own, alpha = methods, shared.server_lr
        if not alike[0].is_update:
            alpha = 1.0
            # methods with Gram or Fisher statistics merge values without a reference too; buffers are always averaged
            if alike[0].is_buffer or not methods[0].needs:
                own = [Method(examples_power=methods[0].examples_power)] * len(methods)
        found = weigh(alike, own, inputs.examples, inputs.weights, alpha)
        weighings |= {layer.name: each for layer, each in zip(alike, found, strict=True)}
    merging = [
        begin(part.entries_to_read, partial(once_each, weighings[layer.name], layer.merge))
        for part, layer in zip(parts, layers, strict=True)
    ]
    return [wait() for wait in merging]


def _by_kind(layers: Sequence[TensorUpdates]) -> list[list[TensorUpdates]]:
    """Return the tensors in groups that are weighed alike."""
    kinds: dict[tuple[bool, bool], list[TensorUpdates]] = {}
    for layer in layers:
        kinds.setdefault((layer.is_update, layer.is_buffer), []).append(layer)
    return list(kinds.values())


class Layers:
    """The layers that have an update, for `Method.survey`; each pass reads them anew, one at a time.

    Parameters
    ----------
    inputs : Inputs
        What the clients sent and were sent.
    shared : Round
        What the clients share.
    """

    def __init__(self, inputs: Inputs, shared: Round) -> None:
        self._inputs, self._shared = inputs, shared
        self._norms: dict[str, list[float]] = {}

    def __iter__(self) -> Iterator[LayerUpdates]:
        names = updated(self._inputs)
        self._check_scalings(names)
        for name in names:
            kind = AdapterUpdates if self._inputs.sent[0].layers[name].is_adapter else TensorUpdates
            layer: LayerUpdates = kind(self._inputs, name, self._shared, self._norms.get(name))
            self._norms[name] = layer.norms
            yield layer

    def _check_scalings(self, names: Sequence[str]) -> None:
        """Raise ValueError where adapters stand beside plain tensors and their scalings are not known."""
        first = self._inputs.sent[0]
        if first.config is None and len({first.layers[name].is_adapter for name in names}) > 1:
            raise ValueError(
                "scope: expected adapter configs with scope='model', which compares adapters with plain tensors by "
                "their true size, found none: give configs= (a strategy: lora_config=), or scope='layer'"
            )


def updated(inputs: Inputs) -> list[str]:
    """Return the names of the layers that have an update: no buffers, integers, or tensors without a reference."""
    names = []
    for name, layer in inputs.sent[0].layers.items():
        plain = not layer.is_adapter
        without = plain and (layer.is_running_statistic or inputs.reference_of(name) is None)
        if not (without or (plain and not inputs.sent[0].values(name).dtype.is_floating_point)):
            names.append(name)
    return names
