"""A run's settings as plain data, which the run that goes on from its checkpoint must share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np


def fingerprint(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as one flat dict of JSON's values, by dotted name.

    Mappings and dataclasses are taken apart. What is not plain data (functions, above all) has no form that could be
    compared in another process and is left out.
    """
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        _flatten(name, value, flat)
    return json.loads(json.dumps(flat))  # tuples become lists, as they will when read


def _flatten(name: str, value: Any, flat: dict[str, Any]) -> None:
    if isinstance(value, type) or callable(value):
        return
    if is_dataclass(value):
        flat[name] = type(value).__name__
        value = {field.name: getattr(value, field.name) for field in fields(value)}
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
    """Return `name: value there and value here` for every setting that is not the same."""

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
    """Return plain data for what JSON has no form for; words, where nothing else tells it."""
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, Enum):
        return value.value
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else repr(value)
