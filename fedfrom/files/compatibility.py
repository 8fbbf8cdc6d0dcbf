"""Checks that models can be merged with each other, before a tensor is read; errors name the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedfrom.errors import BadInput
from fedfrom.files.folders import Model
from fedfrom.files.tensors import Spec
from fedfrom.merging.peft import layers as L
from fedfrom.merging.peft.configs import PREFIX

# fields of adapter_config.json that must be equal in all adapters
_SAME = ("task_type", "fan_in_fan_out", "layers_to_transform", "layers_pattern")


def check_alike(models: Sequence[Model], base: Model | None, force_base: bool) -> None:
    """Raise BadInput for the first model that can't be merged with the first one, or does not fit the base.

    Parameters
    ----------
    models : Sequence[Model]
        The inputs.
    base : Model | None
        The pretrained model, the reference of all tensors that are no LoRA factors.
    force_base : bool
        Accept adapters of base models of different names.
    """
    first = models[0]
    for model in models[1:]:
        if model.is_adapter != first.is_adapter:
            kinds = {True: "an adapter", False: "a checkpoint"}
            raise BadInput(
                f"{model.name}: expected {kinds[first.is_adapter]} as {first.name}, found {kinds[model.is_adapter]}: "
                "merge like with like"
            )
        if first.is_adapter:
            _check_configs(model, first, force_base)
        elif (found := model.config.get("model_type")) != (expected := first.config.get("model_type")):
            raise BadInput(
                f"{model.name}: expected model_type {_text(expected)} as {first.name}, found {_text(found)}: only "
                "models of one architecture can be merged"
            )
    if base is not None and base.is_adapter:
        raise BadInput(f"{base.name}: expected a checkpoint as --base, found an adapter: give the pretrained model")
    for model in models:
        _check_tensors(model, first)
    if base is not None:
        _check_base(models, base)


def _check_configs(model: Model, first: Model, force_base: bool) -> None:
    if bool(model.config.get("use_dora")) != bool(first.config.get("use_dora")):
        kinds = ["DoRA" if each.config.get("use_dora") else "LoRA" for each in (first, model)]
        raise BadInput(
            f"{model.name}: expected {kinds[0]} as {first.name}, found {kinds[1]}: merge each kind by itself"
        )
    for field in _SAME:
        expected, found = first.config.get(field), model.config.get(field)
        if (expected or None) != (found or None):
            raise BadInput(
                f"{model.name}: expected {field} {_text(expected)} as {first.name}, found {_text(found)}: only "
                "adapters made for one use can be merged"
            )
    for field in ("base_model_name_or_path", "revision"):
        expected, found = first.config.get(field), model.config.get(field)
        if expected and found and expected != found and not force_base:  # a missing name may be the same
            raise BadInput(
                f"{model.name}: expected {field} {_text(expected)} as {first.name}, found {_text(found)}: if they are "
                "the same model under two names pass --force-base"
            )


def _check_tensors(model: Model, first: Model) -> None:
    """Raise BadInput where layers, shapes or dtypes differ; adapters may have different ranks."""
    # the merge itself refuses unknown kinds of layers by name
    found, expected = _layers(model), _layers(first)
    if found.keys() != expected.keys():
        adapted = any(layer.is_adapter for layer in (*found.values(), *expected.values()))
        raise BadInput(
            f"{model.name}: expected the layers of {first.name}, found {L.difference(found, expected)}: "
            + ("only adapters of the same modules can be merged" if adapted else "is it the same architecture?")
        )
    for name, layer in found.items():
        for part, key in layer.keys.items():
            if part not in expected[name].keys:
                continue  # the merge refuses it
            ours, theirs = model.tensors.spec(key), first.tensors.spec(expected[name].keys[part])
            free = L.RANK_DIMENSION.get(part)
            if _without(ours, free) != _without(theirs, free):
                raise BadInput(_other(model, key, ours, first, theirs))


def _check_base(models: Sequence[Model], base: Model) -> None:
    plain = {name: layer.keys["tensor"] for name, layer in _layers(models[0]).items() if not layer.is_adapter}
    if not plain:
        raise BadInput(f"--base {base.name}: not needed: these adapters hold nothing but LoRA factors; leave it out")
    shared = names_in_base(models[0], base)
    for name, key in shared.items():
        ours, theirs = models[0].tensors.spec(plain[name]), base.tensors.spec(key)
        if ours != theirs:
            raise BadInput(_other(models[0], plain[name], ours, base, theirs))
    if not shared:
        raise BadInput(
            f"--base {base.name}: expected tensors such as {next(iter(plain.values()))!r}, found "
            f"{next(iter(base.tensors), None)!r}: give the model that the inputs were fine-tuned from"
        )


def names_in_base(model: Model, base: Model) -> dict[str, str]:
    """Return the key in the base of each layer that both have; LoRA modules are left out.

    PEFT adds base_model.model. to a base model's names. Transformers adds a prefix such as bert. to the names of the
    body where a model has a head. Of all ways to add or remove one such prefix, the one that matches the most layers is
    used.
    """
    outer = PREFIX if model.is_adapter else ""
    names = [name for name, layer in _layers(model).items() if not layer.is_adapter]
    inner = [name.removeprefix(outer) for name in names]
    added = [f"{first}." for first in sorted({key.partition(".")[0] for key in base.tensors})]
    removed = [f"{first}." for first in sorted({name.partition(".")[0] for name in inner})]
    found: list[dict[str, str]] = []
    for more, less in [("", ""), *((prefix, "") for prefix in added), *(("", prefix) for prefix in removed)]:
        keys = [more + name.removeprefix(less) for name in inner]
        found.append({name: key for name, key in zip(names, keys, strict=True) if key in base.tensors})
    return max(found, key=len)  # the first of equals, which are the unchanged names


def _layers(model: Model) -> dict[str, L.Layer]:
    return L.find_layers(model.tensors, model.name)


def _without(spec: Spec, dimension: int | None) -> Spec:
    shape = list(spec.shape)
    if dimension is not None and len(shape) > dimension:
        shape[dimension] = -1
    return Spec(spec.dtype, tuple(shape))


def _other(model: Model, key: str, found: Spec, first: Model, expected: Spec) -> str:
    text = f"{model.name}, {key!r}: expected {expected} as in {first.name}, found {found}: "
    if found.shape == expected.shape or (found.dtype != expected.dtype and "lora_" in key):  # LoRA's ranks may differ
        return text + "pass --dtype to bring all to one"
    vocabulary = len(found.shape) == 2 and found.shape[1:] == expected.shape[1:]
    if vocabulary and any(word in key.lower() for word in ("emb", "head", "wte", "decoder", "words")):
        return text + "the vocabularies differ: resize them to one (resize_token_embeddings) and save the model again"
    return text + "only models of one architecture and size can be merged"


def _text(value: Any) -> str:
    return repr(value)[:100]
