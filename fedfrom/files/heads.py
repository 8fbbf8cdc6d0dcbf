"""The modules that classifiers' adapters save whole, their heads: each stays with its input."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fedfrom.files.folders import ADAPTER, ADAPTER_CONFIG, Model
from fedfrom.files.tensors import Tensors
from fedfrom.merging.peft.configs import PREFIX
from fedfrom.merging.peft.layers import find_layers

FOLDER = "heads"
# what PEFT saves of every sequence classifier, whatever modules_to_save says
_ALWAYS = ("classifier", "score")

Head = dict[str, Tensor]
"""Module path and parameter, as in the base model ("classifier.weight") -> tensor."""


def head_keys(model: Model) -> dict[str, str]:
    """Return name in the base model -> key, of the tensors that a classifier's adapter saved whole; of others none."""
    if not model.is_adapter or model.config.get("task_type") != "SEQ_CLS":
        return {}
    saved = model.config.get("modules_to_save")
    names = [*_ALWAYS, *(saved if isinstance(saved, list) else [])]
    found = {}
    for name, layer in find_layers(model.tensors, model.name).items():
        inner = name.removeprefix(PREFIX)
        if not layer.is_adapter and any(f".{entry}." in f".{inner}" for entry in names):
            found[inner] = layer.keys["tensor"]
    return found


def set_apart(models: Sequence[Model]) -> tuple[list[Model], list[Head]]:
    """Return the models, without their heads where these differ in names or shapes, and each one's head.

    Heads that agree stay in the models too, to be merged.
    """
    keys = [head_keys(model) for model in models]
    heads = [{name: model.tensors[key] for name, key in own.items()} for model, own in zip(models, keys, strict=True)]
    shapes = [{name: tensor.shape for name, tensor in head.items()} for head in heads]
    if all(shape == shapes[0] for shape in shapes):
        return list(models), heads
    without = []
    for model, own in zip(models, keys, strict=True):
        kept = [key for key in model.tensors if key not in own.values()]
        tensors = Tensors({model.folder / ADAPTER: kept}, model.tensors.device)
        without.append(replace(model, tensors=tensors))
    return without, heads


def folder_names(models: Sequence[Model]) -> list[str]:
    """Return a name for each input's folder in heads/: the last part of the input's own, numbered where it is taken."""
    names: list[str] = []
    for model in models:
        last = Path(model.name.partition("@")[0]).name or model.folder.resolve().name
        plain = re.sub(r"[^\w-]+", "-", last).strip("-") or "input"
        taken = {name.lower() for name in names}  # of file systems that ignore case too
        number = 1
        while (name := plain if number == 1 else f"{plain}-{number}").lower() in taken:
            number += 1
        names.append(name)
    return names


def write_heads(folder: Path, config: Mapping[str, Any], names: Sequence[str], heads: Sequence[Head]) -> None:
    """Write heads/NAME for each input into a merged adapter's folder: the merged body with the input's own head.

    Parameters
    ----------
    folder : Path
        Of the merged adapter, written before.
    config : Mapping
        Its adapter config.
    names : Sequence[str]
        See `folder_names`.
    heads : Sequence[Head]
        In the order of the names. PEFT loads each folder on a base model of that many labels.
    """
    merged = Tensors({folder / ADAPTER: None})
    for name, head in zip(names, heads, strict=True):
        own = {PREFIX + key: tensor.detach().cpu().contiguous() for key, tensor in head.items()}
        state = {key: tensor for key, tensor in merged.items() if key not in own} | own
        place = folder / FOLDER / name
        place.mkdir(parents=True)
        save_file(state, place / ADAPTER, metadata={"format": "pt"})
        (place / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
