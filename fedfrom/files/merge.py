"""The merge of `fedfrom merge`, from folders to a folder: one layer at a time, with the inputs read in blocks."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedfrom.errors import BadInput
from fedfrom.files.card import model_card
from fedfrom.files.chosen import Choose
from fedfrom.files.compatibility import check_alike, names_in_base
from fedfrom.files.folders import (
    ADAPTER,
    ADAPTER_CONFIG,
    CONFIG,
    INDEX,
    MODEL,
    TUNING,
    Model,
    carried_files,
    copy_files,
    open_model,
)
from fedfrom.files.heads import Head, folder_names, set_apart, write_heads
from fedfrom.files.output import Output, write_card
from fedfrom.files.tensors import Spec, Tensors, Writer
from fedfrom.merging.clients import Round, clients_of
from fedfrom.merging.linalg import sums
from fedfrom.merging.merge import LayerByLayer, layer_by_layer
from fedfrom.merging.methods.base import Method
from fedfrom.merging.report import LayerReport, MergeReport

Progress = Callable[[int, int], None]


def open_inputs(
    inputs: Sequence[str],
    base: str | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    force_base: bool = False,
    own_heads: bool = False,
) -> tuple[list[Model], Model | None, list[Head]]:
    """Return the models, the base, and with `own_heads` each model's head, checked against each other.

    No tensor is read but those of heads.

    Parameters
    ----------
    inputs : Sequence[str]
        At least one: see `open_model`.
    base : str | None (default: None)
        The pretrained checkpoint.
    dtype : torch.dtype | None (default: None)
        Where given, floating-point tensors are read in the widest of their dtypes and this one.
    device : str (default: "cpu")
        Device of the tensors.
    force_base : bool (default: False)
        Accept adapters whose base models go by different names.
    own_heads : bool (default: False)
        Classifiers' heads may differ, and are then no part of the models; and the base is needed to run the adapters,
        but is no reference where it has none of the tensors that they saved whole.

    Raises
    ------
    ValueError
        Names the input, what was expected and what to do.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {device}: not there: {str(error).partition(chr(10))[0]}") from None
    models = [open_model(name, device) for name in inputs]
    pretrained = None if base is None else open_model(base, device)
    heads: list[Head] = []
    if own_heads:
        models, heads = set_apart(models)
        if pretrained is not None and not names_in_base(models[0], pretrained):
            pretrained = None
    if dtype is not None:
        everything = [*models, *([] if pretrained is None else [pretrained])]
        # torch promotes no 8-bit floats
        floats = {spec.dtype for each in everything for spec in each.tensors.specs.values()}
        wide = [torch.float32 if d.itemsize == 1 else d for d in floats if d.is_floating_point]
        for each in everything:
            each.tensors.wide = functools.reduce(torch.promote_types, wide, dtype)
    check_alike(models, pretrained, force_base)
    return models, pretrained, heads


def prepare(
    models: Sequence[Model],
    base: Model | None,
    method: Method,
    examples: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    server_lr: float | str = 1.0,
    clip: float | None = None,
    dora: bool = False,
    same_base: bool = False,
) -> LayerByLayer:
    """Return the merge of opened models, which runs a layer at a time; see `fedfrom.merge` for the arguments."""
    if method.validate is not None:
        raise BadInput("'auto' and greedy-soup need validation data: call fedfrom.merge(..., validate=) in Python")
    if method.needs:
        raise BadInput(
            f"method: {type(method).__name__} needs statistics that clients compute from their data "
            f"(fedfrom.client.{method.needs}), which no folder holds: call fedfrom.merge(..., statistics=) in Python"
        )
    checkpoints = not models[0].is_adapter
    # without a reference only a mean is defined, that of the values; all other merges need updates
    if checkpoints and base is None and (not method.is_mean or clip is not None or server_lr != 1.0):
        raise BadInput(
            "--base: expected the pretrained model, which full checkpoints' updates are relative to, found none: pass "
            "--base MODEL, or --method average for the plain mean"
        )
    clients = clients_of(
        [model.tensors for model in models],
        configs=None if checkpoints else [model.config for model in models],
        examples=examples,
        weights=weights,
        names=[model.name for model in models],
    )
    reference = None if base is None else _Reference(base.tensors, names_in_base(models[0], base))
    shared = Round(reference, server_lr=server_lr, clip=clip, dora=dora, same_base=same_base)
    return layer_by_layer(clients, shared, method)


def merge_folders(
    out: str,
    inputs: Sequence[str],
    method: Method,
    *,
    base: str | None = None,
    examples: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    server_lr: float | str = 1.0,
    clip: float | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    force: bool = False,
    force_base: bool = False,
    dora: bool = False,
    same_base: bool = False,
    command: str = "",
    progress: Progress | None = None,
    choose: Choose | None = None,
) -> MergeReport:
    """Merge adapters or checkpoints on disk into a new folder, which PEFT or transformers load.

    A checkpoint is written a tensor at a time, into files named like the first input's. One layer of all models is in
    memory at a time; of the inputs' large tensors only blocks are, except for RegMean, LoRM and methods on singular
    directions. An adapter is small, and is written at the end, when its ranks are known.

    Parameters
    ----------
    out : str
        A new folder. It appears when it is complete.
    inputs : Sequence[str]
        Folders or names on the Hub: adapters, or checkpoints.
    method : Method
        See `fedfrom.merging.methods.registry.make_method`.
    base : str | None (default: None)
        The pretrained checkpoint, the reference of full checkpoints' updates (and of adapters' saved modules).
    examples, weights, server_lr, clip, dora, same_base
        See `fedfrom.merge`.
    dtype : torch.dtype | None (default: None)
        Dtype of the result. None is that of the inputs, which must then be the same for all.
    device : str (default: "cpu")
        Device on which layers are merged.
    force : bool (default: False)
        Replace an earlier result.
    force_base : bool (default: False)
        Accept adapters whose base models go by different names.
    command : str (default: "")
        Command for the model card.
    progress : Callable[[int, int], None] | None (default: None)
        Called after each layer with the merged bytes of input and with all bytes of input.
    choose : Choose | None (default: None)
        Chooses method and server_lr in place of those given, once the inputs are checked; adapters alone.

    Raises
    ------
    ValueError
        Bad input, or OUT can't be written. An earlier OUT is then unchanged, and no new one is left.
    """
    models, pretrained, heads = open_inputs(inputs, base, dtype, device, force_base, own_heads=choose is not None)
    folders = [model.folder for model in (*models, *([] if pretrained is None else [pretrained]))]
    output = Output(Path(out).expanduser(), folders, force)
    chosen = None
    prepared = functools.partial(
        prepare, models, pretrained, examples=examples, weights=weights, clip=clip, dora=dora, same_base=same_base
    )
    if choose is not None:
        chosen = choose(models, heads, prepared)
        method, server_lr = chosen.method, chosen.scale
    layers = prepared(method, server_lr=server_lr)
    carried = carried_files(models[0])
    watch = _Watch(models, layers, progress)
    with output as folder:
        copy_files(carried, folder)
        if models[0].is_adapter:
            report = _write_adapter(folder, layers, watch, dtype)
            (folder / ADAPTER_CONFIG).write_text(json.dumps(report.config, indent=2, sort_keys=True) + "\n")
        else:
            report = _write_checkpoint(folder, layers, watch, models[0], dtype)
            _write_config(folder / CONFIG, models[0].config, dtype)
        card = model_card(report, models, pretrained, examples, command)
        if chosen is not None:
            if chosen.heads:
                cast = [{key: _cast(key, tensor, dtype) for key, tensor in head.items()} for head in chosen.heads]
                write_heads(folder, report.config or {}, folder_names(models), cast)
            (folder / TUNING).write_text(json.dumps(chosen.record, indent=1, allow_nan=False) + "\n")
            card = f"{card}\n{chosen.card}"
        write_card(folder, card)
    return report


class _Reference(Mapping[str, Tensor]):
    """The base model's tensors that the inputs have as well, under the inputs' names of their layers."""

    def __init__(self, tensors: Tensors, keys: Mapping[str, str]) -> None:
        self._tensors, self._keys = tensors, keys

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._keys[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class _Watch:
    """Counts the merged bytes."""

    def __init__(self, models: Sequence[Model], layers: LayerByLayer, progress: Progress | None) -> None:
        self._progress, self._done = progress, 0
        self._sizes = {
            name: sum(
                model.tensors.specs[key].size
                for model, source in zip(models, layers.inputs.sent, strict=True)
                for key in source.layers[name].keys.values()
            )
            for name in layers.inputs.sent[0].layers
        }

    def layers(self, layers: LayerByLayer, reports: list[LayerReport]) -> Iterator[dict[str, Tensor]]:
        """Yield each merged layer's tensors by key, and append its report; the dict is emptied before the next."""
        total = sum(self._sizes.values())
        if self._progress:
            self._progress(0, total)
        for ((part, report),) in layers:
            reports.append(report)
            yield part
            part.clear()  # before the next layer is read
            self._done += self._sizes[report.name]
            if self._progress:
                self._progress(self._done, total)


def _write_adapter(folder: Path, layers: LayerByLayer, watch: _Watch, dtype: torch.dtype | None) -> MergeReport:
    reports: list[LayerReport] = []
    state: dict[str, Tensor] = {}
    for part in watch.layers(layers, reports):
        state.update({key: _cast(key, tensor, dtype) for key, tensor in part.items()})
    report = layers.report(reports)
    with _writing(folder / ADAPTER, {key: Spec(t.dtype, tuple(t.shape)) for key, t in state.items()}) as writer:
        for key, tensor in state.items():
            writer.write(key, tensor)
    return report


def _write_checkpoint(
    folder: Path, layers: LayerByLayer, watch: _Watch, first: Model, dtype: torch.dtype | None
) -> MergeReport:
    file_of: dict[str, str] = {}
    specs: dict[str, dict[str, Spec]] = {}
    for name, layer in layers.inputs.sent[0].layers.items():
        written = layers.inputs.template(name).layers[name].keys
        for part, key in layer.keys.items():
            spec = first.tensors.spec(key)
            floats = dtype is not None and spec.dtype.is_floating_point
            file_of[written[part]] = first.file_of[key]
            files = specs.setdefault(first.file_of[key], {})
            files[written[part]] = Spec(dtype, spec.shape) if floats and dtype is not None else spec
    reports: list[LayerReport] = []
    writers: dict[str, Writer] = {}
    complete = False
    try:
        for file, own in specs.items():
            writers[file] = Writer(folder / file, own)
        for merged in watch.layers(layers, reports):
            for key in merged:
                writers[file_of[key]].write(key, _cast(key, merged[key], dtype))
        complete = True
    finally:
        for writer in writers.values():
            writer.close(complete)
    if set(specs) != {MODEL}:
        total = sum(spec.size for own in specs.values() for spec in own.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return layers.report(reports)


class _writing:
    """A Writer that is closed at the end: complete, unless an exception was raised."""

    def __init__(self, path: Path, specs: Mapping[str, Spec]) -> None:
        self._writer = Writer(path, specs)

    def __enter__(self) -> Writer:
        return self._writer

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._writer.close(complete=error is None)


def _cast(key: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a floating-point tensor in the given dtype; raise BadInput where a value is out of its range."""
    if dtype is None or tensor.dtype == dtype or not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    if not sums.is_finite(cast):
        raise BadInput(f"{key!r}: expected a result in {dtype}'s range, found infinity: use a wider --dtype")
    return cast


def _write_config(path: Path, config: dict[str, Any], dtype: torch.dtype | None) -> None:
    """Write config.json; with --dtype it names the new dtype, in which transformers loads the model."""
    if dtype is not None:
        for field in ("dtype", "torch_dtype"):
            if field in config:
                config = {**config, field: str(dtype).removeprefix("torch.")}
    path.write_text(json.dumps(config, indent=2) + "\n")
