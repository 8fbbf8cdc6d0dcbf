"""Singular values of a strategy's final adapter, module by module."""

import json
import math
import os
from pathlib import Path
from typing import Any

from fedfrom.pages.look import clean

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def singular_values(folder: Path) -> dict[str, list[float]]:
    """Return each LoRA module's singular values s·BA, largest first, to six digits.

    Parameters
    ----------
    folder : Path
        A PEFT adapter, as written by `save_pretrained`. Without adapter_config.json the scaling s is 1.

    Raises
    ------
    ValueError
        There is no adapter, or it can't be read; the message is a sentence with the reason.
    """
    # os.path: pathlib raises for a label whose path no file can have
    if not os.path.isfile(folder / WEIGHTS):
        if os.path.isfile(folder / "model.safetensors"):
            raise ValueError("The full model was fine-tuned: there is no adapter whose products could be taken apart.")
        raise ValueError(f"The final adapter is not beside the results ({clean(folder.name)}/{WEIGHTS}).")
    try:
        return _read(folder)
    except Exception as error:  # damaged files and hostile configs raise many types
        raise ValueError(f"The final adapter can't be read: {clean(error)}.") from None


def _read(folder: Path) -> dict[str, list[float]]:
    import torch

    from fedfrom.files.tensors import Tensors
    from fedfrom.merging.peft.configs import check_config, rank_and_scaling
    from fedfrom.merging.peft.layers import find_layers, read_adapter

    config: dict[str, Any] | None = None
    if (folder / CONFIG).is_file():
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config = check_config(found, CONFIG, dora=True, same_base=True)
    state = Tensors({folder / WEIGHTS: None})
    spectra = {}
    for name, layer in find_layers(state, WEIGHTS).items():
        if layer.is_adapter:
            scaling = rank_and_scaling(config, name)[1] if config else 1.0
            product = read_adapter(layer, state, scaling, WEIGHTS)
            values = torch.linalg.svdvals(product.core()[1])[: product.rank].tolist()
            if not all(map(math.isfinite, values)):
                raise ValueError(f"{name}: expected finite numbers")
            spectra[clean(name)] = [float(f"{value:.6g}") for value in values]
    if not spectra:
        raise ValueError("it holds no LoRA modules")
    return spectra


def rank_holding(values: list[float], share: float) -> int:
    """Return the smallest number of singular values, largest first, with this share of the sum of all squares."""
    squares = [value * value for value in values]
    left = share * math.fsum(squares)
    for rank, square in enumerate(squares, 1):
        left -= square
        if left <= 0:
            return rank
    return len(values)


def stable_rank(values: list[float]) -> float:
    """Return the sum of squares divided by the largest square: between 1 and the rank; 0 for a zero matrix."""
    top = max(values, default=0.0)
    return math.fsum((value / top) ** 2 for value in values) if top else 0.0
