"""Gram matrices of the inputs of linear layers, which RegMean and LoRM merge by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedfrom.client_statistics.batches import evaluating, first_batches, forward
from fedfrom.merging.peft.layers import find_layers


def gram(model: nn.Module, batches: Iterable[Any], max_batches: int | None = None) -> dict[str, Tensor]:
    """Return the Gram matrix G = X^T X / tokens of the inputs of every trained linear layer.

    Parameters
    ----------
    model : nn.Module
        A PeftModel or any module; run in evaluation mode without gradients, and left as it was.
    batches : Iterable
        Inputs on the model's device. A mapping is passed as keywords, a tuple or list as arguments, anything else as
        the only argument. X leaves padding out where the model is called with `attention_mask=`: see `collecting_gram`.
    max_batches : int | None (default: None)
        Largest number of batches to run; None runs all.

    Returns
    -------
    dict[str, Tensor]
        Layer name -> (d_in, d_in) float32, symmetric, positive semidefinite, on the model's device; new memory. The
        names are those of `fedfrom.merging.peft.layers.find_layers`: a LoRA module's path, a plain weight's key without
        ".weight".

    Raises
    ------
    ValueError
        There is no batch or no trained linear layer, or an input is not finite.

    Notes
    -----
    Jin et al. (2023), arXiv 2212.09849, Eq. 2, has G = X^T X. Divided by the number of tokens, G does not grow with the
    amount of data, which the merge weighs by `examples_power`. For a LoRA module, X is the input of the layer that the
    module wraps, before dropout. Costs a forward pass, d_in^2 operations a token, and 8 d_in^2 bytes a layer while it
    runs.
    """
    with collecting_gram(model) as grams, evaluating(model), torch.no_grad():
        for batch in first_batches(batches, max_batches):
            forward(model, batch)
    return grams


@contextmanager
def collecting_gram(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the matrices of `gram` from the forward passes within a `with` block, such as a round of training.

    The yielded dict is filled when the block ends. It lacks layers that are never called, such as the output projection
    of `nn.MultiheadAttention`, whose weight another module multiplies by: those layers are averaged.

    Parameters
    ----------
    model : nn.Module
        The module that is called. Where it is called with the keyword `attention_mask`, (batch, sequence), inputs of
        shape (batch, sequence, d_in) or (batch * sequence, d_in) leave out the rows whose mask is 0. All rows of other
        inputs count.

    Raises
    ------
    ValueError
        There is no trained linear layer, or an input was not finite.
    """
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    mask: Tensor | None = None

    def note_mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal mask
        found = kwargs.get("attention_mask")
        mask = found.bool() if isinstance(found, Tensor) and found.ndim == 2 else None

    def add(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value: Tensor = args[0] if args else next(iter(kwargs.values()))
        X = value.detach().reshape(-1, value.shape[-1]).to(torch.float32)
        flat = value.ndim == 2 and mask is not None and len(X) == mask.numel()
        if mask is not None and (flat or value.shape[:-1] == mask.shape):
            X = X[mask.flatten().to(X.device)]
        with torch.autocast(X.device.type, enabled=False):  # autocast would multiply in half precision
            product = (X.T @ X).to(torch.float64)
        sums[name] = sums[name] + product if name in sums else product
        tokens[name] = tokens.get(name, 0) + len(X)

    grams: dict[str, Tensor] = {}
    layers = _trained_linears(model)
    if not layers:
        raise ValueError("model: expected a linear layer that is trained, plain or by LoRA, found none")
    hooks = [model.register_forward_pre_hook(note_mask, with_kwargs=True)]
    for name, module in layers.items():
        hooks.append(module.register_forward_pre_hook(partial(add, name), with_kwargs=True))
    try:
        yield grams
    finally:
        for hook in hooks:
            hook.remove()
    for name in layers:
        if name in sums:
            G = sums.pop(name) / max(1, tokens[name])
            grams[name] = ((G + G.T) / 2).to(torch.float32)  # X.T @ X may be asymmetric in the last bit
            if not torch.isfinite(grams[name]).all():
                raise ValueError(f"{name!r}: expected finite inputs, found NaN or infinity in their Gram matrix")


def _trained_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return the trained linear layers by layer name: LoRA modules on linear layers, and plain linear layers."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if any(part.startswith("lora_") for part in path.split(".")):
            continue
        # transformers' Conv1D is a linear layer, and its lora_A an nn.Linear; the lora_A of a convolution is not
        factors = getattr(module, "lora_A", None)
        if isinstance(factors, nn.ModuleDict):
            weights = [p for name, p in module.named_parameters() if name.startswith("lora_")]
            linear = any(isinstance(A, nn.Linear) for A in factors.values())
            attention = isinstance(getattr(module, "base_layer", None), nn.MultiheadAttention)  # has several inputs
            if linear and not attention and any(weight.requires_grad for weight in weights):
                found[path] = module
        elif isinstance(module, nn.Linear) and module.weight.requires_grad:
            (name,) = find_layers([f"{path}.weight" if path else "weight"], "this model")
            found[name.removesuffix(".weight")] = module
    return found
