"""The merged models: their tensors' shapes, and random entries. This module needs torch alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MODELS = {"22M": (384, 6, 30522), "110M": (768, 12, 30522), "350M": (1024, 24, 50257)}
"""Width, layers and vocabulary of transformers of about these sizes."""

BF16 = "-bf16"
"""End of the names of models in bfloat16; all others are in float32."""


def size_of(model: str) -> tuple[int, int, int]:
    """Return width, layers and vocabulary of a model by its name, or written as such: "512x6x30522"."""
    model = model.removesuffix(BF16)
    if model in MODELS:
        return MODELS[model]
    width, layers, vocabulary = map(int, model.split("x"))
    return width, layers, vocabulary


def shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's tensors; without a vocabulary it has no embeddings."""
    d, layers, vocabulary = size_of(model)
    found: dict[str, tuple[int, ...]] = {"words": (vocabulary, d), "positions": (512, d)} if vocabulary else {}
    found["norm"] = (d,)
    for i in range(layers):
        for name, shape in {
            **dict.fromkeys(("query", "key", "value", "out"), (d, d)),
            "up": (4 * d, d),
            "down": (d, 4 * d),
        }.items():
            found[f"layer.{i}.{name}.weight"], found[f"layer.{i}.{name}.bias"] = shape, shape[:1]
        found[f"layer.{i}.norm.weight"] = found[f"layer.{i}.norm.bias"] = (d,)
    return found


def numel(model: str) -> int:
    """Return a model's number of parameters."""
    return sum(math.prod(shape) for shape in shapes(model).values())


def dtype_of(model: str) -> torch.dtype:
    """Return the dtype of a model's tensors."""
    return torch.bfloat16 if model.endswith(BF16) else torch.float32


def bytes_of(model: str) -> int:
    """Return the bytes of a model's parameters."""
    return numel(model) * dtype_of(model).itemsize


def examples(client: int) -> int:
    """Return a client's number of examples."""
    return 100 + client


class States:
    """The global model, and clients' states with small changes in each entry; client i's state is always the same."""

    def __init__(self, model: str) -> None:
        self.dtype = dtype_of(model)
        self.noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
        self.reference = {
            key: self._draw(shape, i).to(self.dtype) for i, (key, shape) in enumerate(shapes(model).items())
        }

    def _draw(self, shape: tuple[int, ...], seed: int) -> Tensor:
        """Return random entries that repeat after 4 million: drawing all of them would take longer than the merges."""
        size = math.prod(shape)
        start = 7919 * seed % len(self.noise)
        found = torch.empty(size)
        for position in range(-start, size, len(self.noise)):  # the noise, again and again, from `start` on
            first, last = max(position, 0), min(position + len(self.noise), size)
            found[first:last] = self.noise[first - position : last - position]
        return found.reshape(shape)

    def of(self, client: int) -> dict[str, Tensor]:
        """Return client i's state."""
        moved = 0.01 * (1 + client % 3)
        return {
            key: self._draw(tuple(W.shape), 1000 * client + j).mul_(moved).add_(W).to(self.dtype)
            for j, (key, W) in enumerate(self.reference.items())
        }
