"""State dict <-> layers: the only place that knows PEFT's key names (configs.py knows adapter_config.json).

A layer is the unit of merging: one LoRA module (its A and B together), or one plain tensor. What PEFT holds and is
sound here: Linear, Conv1D, Conv2d and its kin, Embedding, rsLoRA, rank and alpha patterns, modules_to_save,
lora_B.bias and, when asked for, DoRA's magnitudes. What is not is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedfrom.merging.linalg.blocks import Values
from fedfrom.merging.linalg.lowrank import LowRank
from fedfrom.merging.peft.configs import NO_DORA

State = Mapping[str, Tensor]

_LONGEST = 1000  # characters of a key
_LORA = re.compile(r"^(?P<module>.+?)\.(?P<part>lora_[A-Za-z_]+)(?:\.(?P<rest>.+))?$", re.DOTALL)
_PARTS = {
    ("lora_A", "weight"): "A",
    ("lora_B", "weight"): "B",
    ("lora_B", "bias"): "bias",
    ("lora_embedding_A", ""): "embedding_A",
    ("lora_embedding_B", ""): "embedding_B",
    ("lora_magnitude_vector", ""): "magnitude",
    ("lora_magnitude_vector", "weight"): "magnitude",
}
# adapters of other kinds whose factors multiply: averaging them one by one would be wrong without a word
_OTHER_FACTORS = re.compile(r"\.(hada_|lokr_|vera_|oft_|boft_|ada_|lora\.(up|down)\.)|^\.?lora_")
_SAVED = re.compile(r"\.modules_to_save\.[^.]+\.")
_RUNNING = (".running_mean", ".running_var")
# what embeddings are called in transformers' models: word_embeddings, embed_tokens, wte, T5's shared, ...; embed_out is
# GPT-NeoX's head, which is linear
_TABLES = re.compile(r"(^|\.)(\w*embeddings?|embed_(?!out$)\w+|\w*_embed|wte|wpe|shared|relative_attention_bias)$")


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
    def is_table(self) -> bool:
        """Whether this is a plain tensor with an embedding's name, which is all that tells it from a linear layer."""
        return not self.is_adapter and _TABLES.search(self.name.removesuffix(".weight")) is not None

    @property
    def is_running_statistic(self) -> bool:
        """Whether this is a running mean or variance, such as BatchNorm's: a buffer that no gradient trains."""
        return self.name.endswith(_RUNNING)


def find_layers(state: Iterable[str], who: str, pair_factors: bool = True) -> dict[str, Layer]:
    """Return the layers of a state dict by name, in the order of their keys; no tensor is read.

    Parameters
    ----------
    state : Iterable[str]
        The keys of a PEFT adapter's state dict (adapter name in the keys or not), of a full state dict, or of both
        mixed; the mapping itself will do.
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
        if not isinstance(key, str) or len(key) > _LONGEST:
            start = str(key)[:80]
            raise ValueError(f"{who}: expected keys of text, up to {_LONGEST} characters, found {start!r}")
        match = _LORA.match(key) if pair_factors else None
        if pair_factors and _OTHER_FACTORS.search(key):
            raise ValueError(f"{who}, {key!r}: expected LoRA as PEFT names it, found another kind of adapter")
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
        A, B = (t.T if t.ndim == 2 else t for t in (state[layer.keys["embedding_B"]], state[layer.keys["embedding_A"]]))
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
    ((c, B, A),) = matrix.terms
    if c != scaling:  # else B * c / scaling is B, but for rounding
        B = B * c / scaling
    if layer.is_embedding:
        parts = {"embedding_A": B.T, "embedding_B": A.T}
    else:
        shape_A, shape_B = like[layer.keys["A"]].shape, like[layer.keys["B"]].shape
        parts = {"A": A.reshape(-1, *shape_A[1:]), "B": B.reshape(*B.shape, *shape_B[2:])}
    return {layer.keys[part]: value.to(like[layer.keys[part]].dtype).contiguous() for part, value in parts.items()}


def check_dora(layer: Layer, who: str, dora: bool) -> None:
    """Raise ValueError where a layer has DoRA's magnitudes and they were not asked for."""
    if "magnitude" in layer.keys and not dora:
        raise ValueError(f"{who}, {layer.keys['magnitude']!r}: {NO_DORA}")


def difference(found: Iterable[str], expected: Iterable[str]) -> str:
    """Return in words which names are missing and which are more than expected; the first three of each."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    return f"{len(missing)} missing {missing[:3]} and {len(extra)} more {extra[:3]}"


def check_same(
    found: Values,
    expected: Values,
    who: str,
    key: str,
    rank_may_differ: int | None = None,
    is_delta: bool = False,
) -> None:
    """Raise ValueError where shape or dtype are not as expected.

    Parameters
    ----------
    found, expected : Tensor | Reader
        What came and what should have.
    who, key : str
        For the error.
    rank_may_differ : int | None (default: None)
        A dimension that is exempt: the rank of a LoRA factor.
    is_delta : bool (default: False)
        What came is a change, which may be of another floating-point dtype.
    """
    if found.shape == expected.shape and found.dtype == expected.dtype:  # as most are
        return
    shapes = [list(found.shape), list(expected.shape)]
    if rank_may_differ is not None and len(shapes[0]) == len(shapes[1]):
        for shape in shapes:
            shape[rank_may_differ] = -1
    both_float = found.dtype.is_floating_point and expected.dtype.is_floating_point
    other_shape = shapes[0] != shapes[1]
    other_dtype = found.dtype != expected.dtype and not (is_delta and both_float)
    if not other_shape and not other_dtype:
        return
    # what is as expected is left out: it would be taken for the fault
    values = [
        [tuple(t.shape)] * other_shape + [str(t.dtype).removeprefix("torch.")] * other_dtype for t in (expected, found)
    ]
    wanted, came = (" ".join(map(str, parts)) for parts in values)
    raise ValueError(f"{who}, {key!r}: expected {'shape' if other_shape else 'dtype'} {wanted}, found {came}")


RANK_DIMENSION = {"A": 0, "B": 1, "embedding_A": 0, "embedding_B": 1}


def adapter_rank(layer: Layer, state: State) -> set[int]:
    """Return the ranks of a LoRA module's factors: one, where they fit each other."""
    return {state[key].shape[RANK_DIMENSION[part]] for part, key in layer.keys.items() if part in RANK_DIMENSION}


def ranks(layers: Mapping[str, Layer], state: State) -> dict[str, int]:
    """Return the rank of each LoRA module by layer name."""
    return {name: max(adapter_rank(layer, state)) for name, layer in layers.items()}


def cut_to_ranks(state: State, layers: Mapping[str, Layer], ranks: Mapping[str, int]) -> dict[str, Tensor]:
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
