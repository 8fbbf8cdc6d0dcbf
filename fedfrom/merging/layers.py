"""State dict <-> layers: the only place that knows PEFT's key names and adapter_config.json.

A layer is the unit of merging: one LoRA module (its A and B together), or one plain tensor. What PEFT holds and is
sound here: Linear, Conv1D, Conv2d and its kin, Embedding, rsLoRA, rank and alpha patterns, modules_to_save,
lora_B.bias and, when asked for, DoRA's magnitudes. What is not is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from fedfrom.merging.lowrank import LowRank

State = Mapping[str, Tensor]
Config = Mapping[str, Any]

_PREFIX = "base_model.model."
_LORA = re.compile(r"^(?P<module>.+?)\.(?P<part>lora_[A-Za-z_]+)(?:\.(?P<rest>.+))?$")
_PARTS = {
    ("lora_A", "weight"): "A",
    ("lora_B", "weight"): "B",
    ("lora_B", "bias"): "bias",
    ("lora_embedding_A", ""): "embedding_A",
    ("lora_embedding_B", ""): "embedding_B",
    ("lora_magnitude_vector", ""): "magnitude",
    ("lora_magnitude_vector", "weight"): "magnitude",
}
_SAVED = re.compile(r"\.modules_to_save\.[^.]+\.")
_RUNNING = (".running_mean", ".running_var")
# initialisations that subtract from the base model what they put into the adapter
_ALTERS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Layer:
    """Where one layer lies in a state dict.

    Attributes
    ----------
    name : str
        The module's path for an adapter, the key for a plain tensor; without adapter names.
    keys : dict[str, str]
        Part -> key. Parts of an adapter: "A" and "B", or "embedding_A" and "embedding_B", and "bias" and "magnitude"
        where present. Of a plain tensor: "tensor".
    """

    name: str
    keys: dict[str, str]

    @property
    def is_adapter(self) -> bool:
        """Whether this is a LoRA module."""
        return "tensor" not in self.keys

    @property
    def is_embedding(self) -> bool:
        """Whether this is a LoRA module on an embedding, whose factors are named and laid out the other way."""
        return "embedding_A" in self.keys or "embedding_B" in self.keys

    @property
    def is_running_statistic(self) -> bool:
        """Whether this is a running mean or variance, such as BatchNorm's: a buffer that no gradient trains."""
        return self.name.endswith(_RUNNING)


def find_layers(state: Iterable[str], who: str, pair_factors: bool = True) -> dict[str, Layer]:
    """Return the layers of a state dict by name, in the order of their keys; no tensor is read.

    Parameters
    ----------
    state : Iterable[str]
        The keys of, or as a mapping, a PEFT adapter's state dict (adapter name in the keys or not), a full state dict, or both mixed.
    who : str
        Whose state this is, for the errors.
    pair_factors : bool (default: True)
        False takes every tensor for a plain one, A and B apart.

    Raises
    ------
    ValueError
        A key is of a kind that can't be merged, or half of an adapter is missing.
    """
    layers: dict[str, Layer] = {}
    adapters: set[str] = set()
    for key in state:
        match = _LORA.match(key) if pair_factors else None
        if match is None:
            name = _SAVED.sub(".", key)
            if name in layers:
                raise ValueError(f"{who}, {key!r}: expected one adapter in the state, found another's {name!r} too")
            layers[name] = Layer(name, {"tensor": key})
            continue
        tokens = (match["rest"] or "").split(".")
        leaf = tokens.pop() if tokens[-1] in ("weight", "bias", "") else ""
        part = _PARTS.get((match["part"], leaf))
        if part is None or len(tokens) > 1:
            raise ValueError(
                f"{who}, {key!r}: expected lora_A, lora_B, lora_embedding_A, lora_embedding_B or "
                f"lora_magnitude_vector, found {match['part']}: this kind of adapter can't be merged"
            )
        layer = layers.setdefault(match["module"], Layer(match["module"], {}))
        if part in layer.keys:
            raise ValueError(
                f"{who}, {key!r}: expected one adapter in the state, found {layer.keys[part]!r} too; keep one of them"
            )
        layer.keys[part] = key
        adapters.update(tokens)
    for layer in layers.values():
        pair = {"embedding_A", "embedding_B"} if layer.is_embedding else {"A", "B"}
        others = {"A", "B", "embedding_A", "embedding_B"} - pair
        if layer.is_adapter and not (pair <= layer.keys.keys() and others.isdisjoint(layer.keys)):
            found = sorted(layer.keys.values())
            raise ValueError(f"{who}, {layer.name!r}: expected both lora_A and lora_B, found {found}")
    if len(adapters) > 1:
        raise ValueError(f"{who}: expected one adapter in the state, found {sorted(adapters)}; keep one of them")
    return layers


def read_adapter(layer: Layer, state: State, scaling: float, who: str) -> LowRank:
    """Return the product that one LoRA module adds to its base weight, scaling * B @ A.

    Linear: A (r, d_in), B (d_out, r). Convolution: A (r, c_in, *kernel) flattened from dim 1, B (d_out, r, 1, ...).
    Embedding: the product is the update of its (vocabulary, d) weight, embedding_A^T embedding_B^T.

    Parameters
    ----------
    layer : Layer
        From `find_layers` of this state.
    state : Mapping[str, Tensor]
        Holds the layer's keys.
    scaling : float
        s of this module.
    who : str
        Whose state this is, for the errors.

    Raises
    ------
    ValueError
        The factors do not fit each other.
    """
    if layer.is_embedding:
        A, B = state[layer.keys["embedding_B"]].T, state[layer.keys["embedding_A"]].T
        key = layer.keys["embedding_A"]
    else:
        A, B = state[layer.keys["A"]], state[layer.keys["B"]]
        key = layer.keys["A"]
        if A.ndim < 2 or B.ndim < 2 or any(size != 1 for size in B.shape[2:]):
            raise ValueError(
                f"{who}, {key!r}: expected A (r, d_in, ...) and B (d_out, r, 1, ...), found {tuple(A.shape)} and "
                f"{tuple(B.shape)}"
            )
        if A.ndim > 2 and A.shape[0] != B.shape[1]:
            raise ValueError(
                f"{who}, {key!r}: expected B with {A.shape[0]} columns, found {tuple(B.shape)}: LoRA on a grouped "
                "convolution is not one product B @ A and can't be merged"
            )
        A, B = A.flatten(1), B.flatten(1)
    fit = A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1] and A.numel() and B.numel()
    if not (fit and A.is_floating_point() and B.is_floating_point()):
        raise ValueError(
            f"{who}, {key!r}: expected floating-point factors with one rank, found A {tuple(A.shape)} {A.dtype} and "
            f"B {tuple(B.shape)} {B.dtype}"
        )
    return LowRank(B, A, scaling)


def write_adapter(layer: Layer, matrix: LowRank, like: State, scaling: float) -> dict[str, Tensor]:
    """Return the factors of `matrix` under the layer's keys, laid out and typed as the factors in `like`.

    Parameters
    ----------
    layer : Layer
        Its keys are the output's, and are looked up in `like`.
    matrix : LowRank
        One product, float64.
    like : Mapping[str, Tensor]
        Gives dtype, device and trailing dimensions.
    scaling : float
        s of the config that the result goes with: B is divided by it.
    """
    B, A = matrix.B / scaling, matrix.A
    if layer.is_embedding:
        parts = {"embedding_A": B.T, "embedding_B": A.T}
    else:
        shape_A, shape_B = like[layer.keys["A"]].shape, like[layer.keys["B"]].shape
        parts = {"A": A.reshape(-1, *shape_A[1:]), "B": B.reshape(*B.shape, *shape_B[2:])}
    return {layer.keys[part]: value.to(like[layer.keys[part]].dtype).contiguous() for part, value in parts.items()}


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return what PEFT takes from a pattern dict: the first key that matches the end of the module's path."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _peft_name(module: str) -> str:
    """Return what PEFT matches patterns with: a MultiheadAttention's output projection goes by the whole's name."""
    return module.removeprefix(_PREFIX).removesuffix(".base_layer.out_proj")


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
    config = {key: _plain(value) for key, value in (config.to_dict() if hasattr(config, "to_dict") else config).items()}
    kind = str(config.get("peft_type") or "LORA")
    if kind != "LORA":
        raise ValueError(f"{who}: expected an adapter config of peft_type LORA, found {kind}")
    numbers = {"r": config.get("r"), "lora_alpha": config.get("lora_alpha")}
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern, value in (config.get(field) or {}).items():
            numbers[f"{field}[{pattern!r}]"] = value
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"{who}: expected regular expressions in {field}, found {pattern!r}: {error}"
                ) from None
    for field, number in numbers.items():
        if not isinstance(number, int | float) or not 0 < number < float("inf"):
            raise ValueError(f"{who}: expected a number {field} > 0 in its adapter config, found {number!r}")
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
        raise ValueError(f"{who}: {_NO_DORA}")
    return config


def _plain(value: Any) -> Any:
    """Return what adapter_config.json has for a LoraConfig's field: lists for sets, strings for enums."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value.value if isinstance(value, Enum) else value


_NO_DORA = (
    "expected LoRA, found DoRA: its magnitudes can only be averaged, 6 to 17 % off the mean effective weight; pass "
    "dora=True to accept that"
)


def check_dora(layer: Layer, who: str, dora: bool) -> None:
    """Raise ValueError where a layer has DoRA's magnitudes and they were not asked for."""
    if "magnitude" in layer.keys and not dora:
        raise ValueError(f"{who}, {layer.keys['magnitude']!r}: {_NO_DORA}")


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


def check_same(found: Tensor, expected: Tensor, who: str, key: str, rank_may_differ: int | None = None) -> None:
    """Raise ValueError where shape or dtype are not as expected.

    Parameters
    ----------
    found, expected : Tensor
        What came and what should have.
    who, key : str
        For the error.
    rank_may_differ : int | None (default: None)
        A dimension that is exempt: the rank of a LoRA factor.
    """
    shapes = [list(found.shape), list(expected.shape)]
    if rank_may_differ is not None and found.ndim == expected.ndim:
        for shape in shapes:
            shape[rank_may_differ] = -1
    if shapes[0] != shapes[1] or found.dtype != expected.dtype:
        names = [f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (expected, found)]
        raise ValueError(f"{who}, {key!r}: expected shape {names[0]}, found {names[1]}")


RANK_DIMENSION = {"A": 0, "B": 1, "embedding_A": 0, "embedding_B": 1}


def adapter_rank(layer: Layer, state: State) -> set[int]:
    """Return the ranks of a LoRA module's factors: one, where they fit each other."""
    return {state[key].shape[RANK_DIMENSION[part]] for part, key in layer.keys.items() if part in RANK_DIMENSION}


def ranks(layers: Mapping[str, Layer], state: State) -> dict[str, int]:
    """Return the rank of each LoRA module by layer name."""
    return {name: max(adapter_rank(layer, state)) for name, layer in layers.items()}


def leading(state: State, layers: Mapping[str, Layer], ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the state that a client of smaller rank is sent: the leading rows of A and columns of B (views).

    Parameters
    ----------
    state : Mapping[str, Tensor]
        The global state.
    layers : Mapping[str, Layer]
        Its layers.
    ranks : Mapping[str, int]
        Layer name -> the client's rank; a rank above the state's leaves it as it is.
    """
    result = dict(state)
    for name, rank in ranks.items():
        for part, key in layers[name].keys.items():
            if part in RANK_DIMENSION:
                length = min(rank, state[key].shape[RANK_DIMENSION[part]])
                result[key] = torch.narrow(state[key], RANK_DIMENSION[part], 0, length)
    return result
