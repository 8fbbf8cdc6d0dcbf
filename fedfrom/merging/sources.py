"""What n clients sent and were sent: states with their layers and scalings, and the order that sums run in."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedfrom.merging.linalg import blocks, sums
from fedfrom.merging.linalg.blocks import Values
from fedfrom.merging.linalg.lowrank import LowRank
from fedfrom.merging.peft import layers as L
from fedfrom.merging.peft.configs import rank_and_scaling
from fedfrom.merging.peft.layers import Layer, State

# torch has no arithmetic of these
_UNSUPPORTED = {getattr(torch, name) for name in dir(torch) if re.match(r"uint(16|32|64)$|float[48]_", name)}


class Readable(Mapping[str, Tensor]):
    """A state whose tensors are dense numbers in memory: what it can't give raises ValueError, naming whose it is."""

    def __init__(self, state: State, who: str) -> None:
        self._state, self._who = state, who
        self.is_read = hasattr(state, "reader")
        """Whether the state has what reads its tensors a block at a time."""
        self.is_lazy = not self.is_read and not isinstance(state, dict)
        """Whether its tensors may be read, whole, when they are asked for."""

    def __getitem__(self, key: str) -> Tensor:
        """Return the tensor of a key that is there."""
        try:
            tensor: Any = self._state[key]
        except Exception as error:  # files that are read when asked fail in ways of their own
            found = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{self._who}, {key!r}: expected a readable tensor, found {found}") from error
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{self._who}, {key!r}: expected a tensor, found {type(tensor).__name__}")
        unusual = tensor.is_quantized or tensor.is_complex() or tensor.is_meta or tensor.is_nested
        if unusual or tensor.layout != torch.strided or tensor.dtype in _UNSUPPORTED:
            kind = f"{tensor.device.type}, {tensor.layout}, {tensor.dtype}".replace("torch.", "")
            raise ValueError(f"{self._who}, {key!r}: expected a dense tensor of real numbers, found {kind}")
        return tensor

    def stored_dtype(self, key: str) -> torch.dtype:
        """Return the dtype that a tensor came in, where its state reads it in a wider one."""
        state: Any = self._state
        return state.stored_dtype(key) if hasattr(state, "stored_dtype") else self[key].dtype

    def entries(self, key: str) -> Values:
        """Return the tensor of a key, or what reads it a block at a time where the state has that."""
        state: Any = self._state
        return state.reader(key) if self.is_read else self[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


@dataclass(frozen=True)
class Source:
    """A state, where its layers lie, and the config that gives its scalings.

    Attributes
    ----------
    who : str
        What errors call it.
    sliced : bool
        The factors are leading parts of those that the config describes: its ranks do not hold, its scalings do.
    statistics : Mapping[str, Tensor] | None
        What a client sent beside its state: Gram matrices by module, or Fisher diagonals by key.
    norms : Mapping[str, float]
        ||W_i - ref_i||_F of plain tensors by layer, where that is known.
    deltas : Collection[str]
        Plain tensors, by layer, in whose place this has W_i - ref_i.
    """

    who: str
    state: Readable
    layers: dict[str, Layer]
    config: dict[str, Any] | None
    sliced: bool = False
    statistics: State | None = None
    norms: Mapping[str, float] = field(default_factory=dict)
    deltas: Collection[str] = ()

    def scaling(self, name: str) -> float:
        """Return s of an adapter layer; 1 without a config."""
        return 1.0 if self.config is None else rank_and_scaling(self.config, name)[1]

    def adapter(self, name: str) -> LowRank:
        """Return an adapter layer's product s B A."""
        product = L.read_adapter(self.layers[name], self.state, self.scaling(name), self.who)
        if self.config is not None and not self.sliced:
            expected = rank_and_scaling(self.config, name)[0]
            if product.rank != expected:
                raise ValueError(
                    f"{self.who}, {name!r}: expected rank {expected} as its adapter config says, found {product.rank}"
                )
        return product

    def tensor(self, name: str, part: str = "tensor") -> Tensor:
        """Return one of a layer's tensors."""
        return self.state[self.layers[name].keys[part]]

    def values(self, name: str, part: str = "tensor") -> Values:
        """Return one of a layer's tensors, unread where it can be read a block at a time."""
        return self.state.entries(self.layers[name].keys[part])


@dataclass(frozen=True)
class Inputs:
    """What n clients sent and were sent.

    Attributes
    ----------
    sent : list[Source]
        W_i.
    reference : Source | None
        W.
    received : list[Source | None]
        ref_i; None is W. A state that several clients were sent is one Source.
    examples : list[float] | None
        n_i.
    weights : list[float] | None
        u_i >= 0, the user's own weights, at least one above 0; None is 1 each.
    """

    sent: list[Source]
    reference: Source | None
    received: list[Source | None]
    examples: list[float] | None
    weights: list[float] | None = None

    @property
    def with_weight(self) -> list[int]:
        """The places of the clients whose own weight is above 0."""
        return [i for i in range(len(self.sent)) if self.weights is None or self.weights[i] > 0]

    def reference_of(self, name: str) -> Source | None:
        """Return the source of a layer's W, None where it has none."""
        return self.reference if self.reference is not None and name in self.reference.layers else None

    def template(self, name: str) -> Source:
        """Return the source whose keys, dtypes and dimensions a merged layer has."""
        return self.reference_of(name) or self.sent[0]

    def statistics(self, name: str, order: Sequence[int], shape: tuple[int, ...]) -> list[Tensor] | None:
        """Return what the clients sent beside a layer, in that order; None where none of them did.

        Raises
        ------
        ValueError
            Some clients sent it and some did not, it has another shape, or a number in it is not finite.
        """
        found = [(self.sent[i].statistics or {}).get(name) for i in order]
        if all(tensor is None for tensor in found):
            return None
        for i, tensor in zip(order, found, strict=True):
            if tensor is None:
                raise ValueError(f"{self.sent[i].who}, {name!r}: expected statistics as other clients sent, found none")
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{self.sent[i].who}, {name!r}: expected statistics of shape {shape}, found {tuple(tensor.shape)}"
                )
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"{self.sent[i].who}, {name!r}: expected finite numbers in its statistics, found NaN or infinity"
                )
        return [tensor for tensor in found if tensor is not None]

    def received_of(self, name: str) -> list[Source | None]:
        """Return the source of each client's ref_i of a layer."""
        W = self.reference_of(name)
        return [W if W is None or source is None else source for source in self.received]


def check_norms(norms: list[float], inputs: Inputs, name: str) -> list[float]:
    """Return the norms of the clients' updates, or raise ValueError naming what is not finite."""
    for sent, received, norm in zip(inputs.sent, inputs.received_of(name), norms, strict=True):
        if not math.isfinite(norm):
            check_finite([received, sent], name, list(sent.layers[name].keys))
            raise ValueError(f"{sent.who}, {name!r}: expected finite numbers, found an update of norm {norm}")
    return norms


def check_finite(sources: Sequence[Source | None], name: str, parts: list[str]) -> None:
    """Raise ValueError for the first tensor with NaN or infinity in it."""
    for source in sources:
        for part in parts if source is not None else []:
            assert source is not None
            if not sums.is_finite(source.tensor(name, part)):
                key = source.layers[name].keys[part]
                raise ValueError(f"{source.who}, {key!r}: expected finite numbers, found NaN or infinity")


def check_result(key: str, tensor: Tensor, is_finite: bool) -> None:
    """Raise ValueError where a merged tensor left its dtype's range."""
    if not is_finite:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{key!r}: expected a result in {kind}'s range, found infinity: use a wider dtype")


def summing_order(inputs: Inputs, name: str, sizes: list[float]) -> list[int]:
    """Return the clients in the order that sums run in, one that does not depend on the order they came in.

    By size, a number of each one's delta that is 0 where that is zero; then by examples, and by weight; the content is
    digested only to part clients that tie in all of them with a delta that counts.
    """
    ones = [1.0] * len(sizes)
    keys = list(zip(sizes, inputs.examples or ones, inputs.weights or ones, strict=True))
    times = Counter(keys)

    def key(i: int) -> tuple[float, float, float, bytes]:
        tied = keys[i][0] > 0 and times[keys[i]] > 1
        return (*keys[i], _digest(inputs.sent[i], name) if tied else b"")

    return sorted(range(len(keys)), key=key)


def _digest(source: Source, name: str) -> bytes:
    digest = hashlib.blake2b()
    for part in sorted(source.layers[name].keys):
        for block in blocks.in_order(source.values(name, part)):
            digest.update(block.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.digest()
