"""A run's settings as plain data: a run resumed from a checkpoint must have the same ones."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord

from fedfrom.settings import RUN


def run_settings(
    strategy: Any, initial_arrays: ArrayRecord, train_config: ConfigRecord, evaluate_config: ConfigRecord
) -> dict[str, Any]:
    """Return the settings that a resumed run must share with the run before.

    These are the arguments of the strategy's constructors but for those of `fedfrom.settings.RUN`, the configs, and the
    dtypes and shapes of the initial arrays.
    """
    inits = [vars(kind)["__init__"] for kind in type(strategy).__mro__ if "__init__" in vars(kind)]
    names = {name for init in inits for name in inspect.signature(init).parameters}
    arguments = {name: getattr(strategy, name) for name in sorted(names - RUN) if hasattr(strategy, name)}
    if arguments.get("lora_config") is not None:  # the PEFT version that wrote the config makes no difference
        arguments["lora_config"] = {k: v for k, v in arguments["lora_config"].items() if k != "peft_version"}
    configs = {"train_config": train_config, "evaluate_config": evaluate_config}
    sent = {
        name: {key: value for key, value in config.items() if key != "server-round"} for name, config in configs.items()
    }
    arrays = {key: f"{array.dtype} {tuple(array.shape)}" for key, array in initial_arrays.items()}
    return {"strategy": type(strategy).__name__, **arguments, **sent, "initial_arrays": arrays}


def fingerprint(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as one flat dict of JSON values, by dotted name.

    Mappings and dataclasses are flattened. Values that are not plain data, functions above all, can't be compared in
    another process and are left out.
    """
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        _flatten(name, value, flat)
    return json.loads(json.dumps(flat))  # tuples become lists, as in what is read from a checkpoint


def _flatten(name: str, value: Any, flat: dict[str, Any]) -> None:
    if isinstance(value, type) or callable(value):
        return
    if is_dataclass(value):
        flat[name] = type(value).__name__
        value = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _flatten(f"{name}.{key}", entry, flat)
        return
    if isinstance(value, set | frozenset | Enum | np.generic | np.ndarray):
        value = as_json(value)
    elif isinstance(value, bytes | Path):
        value = repr(value)
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return
    flat[name] = value


def differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return "name = value here where the checkpoint has value" for every setting that differs."""

    def shown(settings: Mapping[str, Any], name: str) -> str:
        text = repr(settings[name]) if name in settings else "nothing"
        return text if len(text) <= 80 else f"{text[:77]}..."

    names = [*saved, *(name for name in here if name not in saved)]
    return [
        f"{name} = {shown(here, name)} where the checkpoint has {shown(saved, name)}"
        for name in names
        if name not in saved or name not in here or saved[name] != here[name]
    ]


def as_json(value: Any) -> Any:
    """Return plain data for a value that JSON can't hold: its `repr` where no list or number is equivalent."""
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, Enum):
        return value.value
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else repr(value)
