"""Adapter configs in messages: rank and scaling, from the server and in replies."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import ConfigRecord

from fedfrom.merging.peft.configs import spell_out
from fedfrom.merging.peft.layers import find_layers
from fedfrom.numeric import is_number, is_whole

ADAPTER_KEY = "fedfrom.adapter"
"""Name of the ConfigRecord that carries an adapter's rank and scaling, from the server and in replies."""

_NUMBERS = ("r", "lora_alpha", "use_rslora")
_PATTERNS = ("rank_pattern", "alpha_pattern")
_MODULE = re.compile(r"[\w.-]+")


def config_to_record(config: Mapping[str, Any], modules: Iterable[str]) -> ConfigRecord:
    """Return the part of an adapter config that the other side needs: r, lora_alpha, use_rslora and the patterns.

    Parameters
    ----------
    config : Mapping
        The content of adapter_config.json.
    modules : Iterable[str]
        Names of the adapter's layers. Patterns travel spelled out as module names: neither side runs a regular
        expression that came in a message.
    """
    config = spell_out(config, modules)
    record = ConfigRecord({field: config[field] for field in _NUMBERS})
    for field in _PATTERNS:
        record[field] = json.dumps(config[field])
    return record


def adapter_record(config: Mapping[str, Any], keys: Iterable[str], who: str) -> ConfigRecord:
    """Return the record that tells the other side an adapter's config.

    Parameters
    ----------
    config : Mapping
        The content of adapter_config.json.
    keys : Iterable[str]
        The keys of the adapter's arrays.
    who : str
        Whose adapter this is, for errors.
    """
    layers = find_layers(keys, who)
    return config_to_record(config, [name for name, layer in layers.items() if layer.is_adapter])


def record_to_config(record: ConfigRecord, who: str = ADAPTER_KEY) -> dict[str, Any]:
    """Return the adapter config that `config_to_record` wrote.

    Raises
    ------
    ValueError
        A field is missing, of another type or out of range. No other error is raised, whatever the record holds.
    """
    try:
        config: dict[str, Any] = {field: record[field] for field in _NUMBERS}
        patterns = {field: json.loads(str(record[field])) for field in _PATTERNS}
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{who}: expected {', '.join(_NUMBERS + _PATTERNS)} as fedfrom.client writes them, "
            f"found {sorted(record)} ({type(error).__name__}: {error})"
        ) from error
    if config["use_rslora"] not in (False, True):
        raise ValueError(f"{who}, 'use_rslora': expected true or false, found {config['use_rslora']!r}")
    if not all(isinstance(pattern, dict) for pattern in patterns.values()):
        raise ValueError(f"{who}: expected patterns as JSON objects, found {patterns}")
    for name in {**patterns["rank_pattern"], **patterns["alpha_pattern"]}:
        if not _MODULE.fullmatch(name):
            raise ValueError(f"{who}, rank_pattern and alpha_pattern: expected module names, found {name!r}")
    return {
        "r": _positive(who, "r", config["r"], int),
        "lora_alpha": _positive(who, "lora_alpha", config["lora_alpha"], float),
        "use_rslora": bool(config["use_rslora"]),
        "rank_pattern": {
            k: _positive(who, f"rank_pattern[{k!r}]", v, int) for k, v in patterns["rank_pattern"].items()
        },
        "alpha_pattern": {
            k: _positive(who, f"alpha_pattern[{k!r}]", v, float) for k, v in patterns["alpha_pattern"].items()
        },
    }


def _positive(who: str, field: str, value: Any, kind: type[int] | type[float]) -> int | float:
    """Return the value as a number > 0 that a float can hold, whole where `kind` is int; or raise ValueError."""
    if not (is_whole(value) if kind is int else is_number(value)) or not 0 < value <= sys.float_info.max:
        whole = "whole " if kind is int else ""
        raise ValueError(f"{who}, {field}: expected a {whole}number > 0, found {value!r}")
    return kind(value)
