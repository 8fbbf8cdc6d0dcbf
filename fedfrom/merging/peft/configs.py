"""adapter_config.json: a module's rank and scaling, what is refused, and the config that goes with a merged adapter."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from fedfrom.numeric import is_number

Config = Mapping[str, Any]

# initialisations that subtract from the base model what they put into the adapter
_ALTERS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
PREFIX = "base_model.model."
# a pattern that is a module's name: compared, never compiled
_NAME = re.compile(r"[\w.-]+")
# what in an expression is neither a repetition nor a choice
_ATOM = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_MOST_STEPS = 24  # log2 of the ways that an expression may take through a module's name

NO_DORA = (
    "expected LoRA, found DoRA: its magnitudes can only be averaged, 6 to 17 % off the mean effective weight; pass "
    "dora=True to accept that"
)


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return what PEFT takes from a pattern dict: the first key that matches the end of the module's path."""
    for pattern, value in (patterns or {}).items():
        if _matches(pattern, module):
            return value
    return default


def _matches(pattern: str, module: str) -> bool:
    if not _NAME.fullmatch(pattern):
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    before, end = module[: -len(pattern)], module[-len(pattern) :]
    same = len(end) == len(pattern) and all(p in (".", c) for p, c in zip(pattern, end, strict=True))
    return same and (not before or before.endswith("."))


def _check_expression(pattern: Any, field: str, who: str) -> None:
    """Raise ValueError where a pattern is no expression, or one that could be tried for hours on a module's name."""
    expected = f"{who}: expected regular expressions in {field}, found {str(pattern)[:80]!r}"
    if not isinstance(pattern, str):
        raise ValueError(expected)
    if _NAME.fullmatch(pattern):
        return
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{expected}: {error}") from None
    bare = _ATOM.sub("x", pattern).replace("(?", "(")
    ways, groups = 1, [1]
    for character in bare:
        if character == "(":
            groups.append(1)
        elif character == "|":
            groups[-1] += 1
        elif character == ")" and len(groups) > 1:
            ways *= groups.pop()
    steps = math.log2(ways * groups[0]) + bare.count("?") + 6 * len(re.findall(r"[*+{]", bare))
    if steps > _MOST_STEPS or re.search(r"\)[*+{]", bare):
        raise ValueError(
            f"{expected}: no group may be repeated, and no more than {_MOST_STEPS // 6} characters: trying it may take "
            "for ever; name the modules"
        )


def _peft_name(module: str) -> str:
    """Return what PEFT matches patterns with: a MultiheadAttention's output projection goes by the whole's name."""
    return module.removeprefix(PREFIX).removesuffix(".base_layer.out_proj")


def rank_and_scaling(config: Config, module: str) -> tuple[int, float]:
    """Return (r, s) of one module: s = lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA, patterns applied."""
    module = _peft_name(module)
    r = int(_pattern(config.get("rank_pattern"), module, config["r"]))
    alpha = float(_pattern(config.get("alpha_pattern"), module, config["lora_alpha"]))
    return r, alpha / (r**0.5 if config.get("use_rslora") else r)


def check_config(config: Any, who: str, dora: bool = False, same_base: bool = False) -> dict[str, Any]:
    """Return a PEFT adapter config as a dict, or refuse what can't be merged.

    Parameters
    ----------
    config : Mapping or peft.LoraConfig
        adapter_config.json's content, or the object. "r" and "lora_alpha" are enough.
    who : str
        Whose config this is, for the errors.
    dora : bool (default: False)
        Accept DoRA: its magnitudes are then averaged with the module's weights, which is 6 to 17 % off the mean
        effective weight.
    same_base : bool (default: False)
        Accept initialisations that alter the base model, because all clients share one altered base.

    Raises
    ------
    ValueError
        Not LoRA, or LoRA of a kind whose products can't be merged.
    """
    if not (isinstance(config, Mapping) or hasattr(config, "to_dict")):
        raise ValueError(f"{who}: expected an adapter config (a mapping or a LoraConfig), found {config!r}")
    config = {key: _plain(value) for key, value in (config.to_dict() if hasattr(config, "to_dict") else config).items()}
    kind = str(config.get("peft_type") or "LORA")
    if kind != "LORA":
        raise ValueError(f"{who}: expected an adapter config of peft_type LORA, found {kind!r}")
    numbers = {"r": config.get("r"), "lora_alpha": config.get("lora_alpha")}
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(field) or {}, Mapping):
            raise ValueError(f"{who}: expected {field} to map names to numbers, found {config[field]!r}")
        for pattern, value in (config.get(field) or {}).items():
            _check_expression(pattern, field, who)
            numbers[f"{field}[{pattern!r}]"] = value
    for field, number in numbers.items():
        # compared, not converted: an int may be beyond any float
        if not is_number(number) or not 0 < number <= sys.float_info.max:
            raise ValueError(f"{who}: expected a number {field} > 0 in its adapter config, found {number!r}")
        if field.startswith("r") and number != int(number):
            raise ValueError(f"{who}: expected a whole number {field} in its adapter config, found {number!r}")
    for field in ("use_rslora", "use_dora"):
        # text such as "False" would count as true
        if not isinstance(config.get(field), bool | None):
            raise ValueError(
                f"{who}: expected true or false for {field} in its adapter config, found {config[field]!r}"
            )
    init = str(config.get("init_lora_weights") or "").lower()
    if init.startswith(_ALTERS_BASE) and not same_base:
        raise ValueError(
            f"{who}: expected an initialisation that leaves the base model as it is, found init_lora_weights={init!r}: "
            "its adapter is relative to an altered base; convert it to plain LoRA when saving (PEFT's "
            "path_initial_model_for_weight_conversion), or pass same_base=True if all clients share one altered base"
        )
    if config.get("target_parameters"):
        raise ValueError(f"{who}: expected LoRA on modules, found target_parameters, which can't be merged")
    for field in ("use_bdlora", "kasa_config", "arrow_config"):
        if config.get(field):
            raise ValueError(f"{who}: expected plain LoRA, found {field}, which can't be merged")
    if config.get("use_dora") and not dora:
        raise ValueError(f"{who}: {NO_DORA}")
    return config


def _plain(value: Any) -> Any:
    """Return what adapter_config.json has for a LoraConfig's field: lists for sets, strings for enums."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value.value if isinstance(value, Enum) else value


def output_config(config: Config, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the config that goes with a merged adapter whose B's carry the scaling.

    r = lora_alpha = the largest rank, so that s = 1, without rsLoRA. Where layers differ, rank_pattern and
    alpha_pattern name every module in full, longest first: PEFT takes the first that matches the end of a path.

    Parameters
    ----------
    config : Mapping
        A client's config; all else is taken from it.
    ranks : Mapping[str, int]
        Layer name -> rank of the merged factors.
    """
    r = max(ranks.values())
    modules: dict[str, int] = {}
    for name, rank in ranks.items():
        if modules.setdefault(_peft_name(name), rank) != rank:
            raise ValueError(
                f"rank, {name!r}: expected one rank for both projections of a MultiheadAttention, as PEFT has, found "
                f"{modules[_peft_name(name)]} and {rank}: ask for a whole rank"
            )
    pattern = _full_names(modules)
    return {
        **config,
        "r": r,
        "lora_alpha": r,
        "use_rslora": False,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "init_lora_weights": True,
    }


def _full_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pattern dict that gives each module its value; none where all have one value."""
    if len(set(values.values())) < 2:
        return {}
    # longest first; among names of one length those with fewer dots: a dot matches any character
    return {name: values[name] for name in sorted(values, key=lambda name: (-len(name), name.count("."), name))}


def spell_out(config: Config, names: Iterable[str]) -> dict[str, Any]:
    """Return what of a config gives ranks and scalings, with patterns as full module names instead of expressions.

    Parameters
    ----------
    config : Mapping
        Checked by `check_config`.
    names : Iterable[str]
        The adapter's layers.
    """
    modules = [_peft_name(name) for name in names]
    ranks = {module: int(_pattern(config.get("rank_pattern"), module, config["r"])) for module in modules}
    alphas = {module: float(_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])) for module in modules}
    return {
        "r": max(ranks.values(), default=int(config["r"])),
        "lora_alpha": max(alphas.values(), default=float(config["lora_alpha"])),
        "use_rslora": bool(config.get("use_rslora")),
        "rank_pattern": _full_names(ranks),
        "alpha_pattern": _full_names(alphas),
    }
