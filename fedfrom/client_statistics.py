"""What clients know of their own data and a merge can use: Gram matrices of linear inputs, Fisher diagonals.

Torch alone; PEFT's modules are known by their attributes. Both helpers leave the model as it was: modes, gradients,
hooks. `fedfrom.client.reply(statistics=)` sends what they return.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fedfrom.merging.peft.layers import find_layers


def gram(model: nn.Module, batches: Iterable[Any], max_batches: int | None = None) -> dict[str, Tensor]:
    """Return the Gram matrix G = X^T X / tokens of the inputs of every linear layer that is trained.

    Parameters
    ----------
    model : nn.Module
        A PeftModel or any module; run in evaluation mode without gradients, and left as it was.
    batches : Iterable
        Inputs on the model's device: a mapping is passed as keywords, a tuple or list as arguments, all else as the
        only one. Padding is left out of X where the model is called with `attention_mask=`, see `collecting_gram`.
    max_batches : int | None (default: None)
        Run so many batches at most.

    Returns
    -------
    dict[str, Tensor]
        Layer name -> (d_in, d_in) float32, symmetric, positive semidefinite, on the model's device; new memory. The
        names are those of `fedfrom.merging.peft.layers.find_layers`: a LoRA module's path, a plain weight's key without
        ".weight".

    Raises
    ------
    ValueError
        There is no batch or no linear layer that is trained, or an input is not finite.

    Notes
    -----
    Jin et al. (2023), arXiv 2212.09849, Eq. 2, has G = X^T X; divided by the tokens it does not grow with the data,
    whose amount the merge weighs by `examples_power`. For a LoRA module X is the input of the layer that it wraps,
    before dropout. Costs a forward pass, d_in^2 operations a token, and 8 d_in^2 bytes a layer while it runs.
    """
    with collecting_gram(model) as grams, _evaluating(model), torch.no_grad():
        for batch in _some(batches, max_batches):
            _call(model, batch)
    return grams


@contextmanager
def collecting_gram(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect what `gram` returns from the forward passes within a `with` block, such as a round of training.

    The dict that it gives is filled when the block ends. Layers that are never called are not in it (`nn.Module`s
    whose weights others multiply by, such as the output projection of `nn.MultiheadAttention`): they are averaged.

    Parameters
    ----------
    model : nn.Module
        The module that is called. Rows of X where its keyword `attention_mask`, (batch, sequence), is 0 do not count
        in inputs of shape (batch, sequence, d_in) or (batch * sequence, d_in); all rows of other inputs do.

    Raises
    ------
    ValueError
        There is no linear layer that is trained, or an input was not finite.
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
        with torch.autocast(X.device.type, enabled=False):  # it would multiply in half precision
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
            grams[name] = ((G + G.T) / 2).to(torch.float32)  # a product's two halves may differ in the last bit
            if not torch.isfinite(grams[name]).all():
                raise ValueError(f"{name!r}: expected finite inputs, found NaN or infinity in their Gram matrix")


def _trained_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules whose inputs count, by layer name: LoRA modules on linear layers, plain linear layers."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if any(part.startswith("lora_") for part in path.split(".")):
            continue
        # transformers' Conv1D is linear too, and its lora_A is an nn.Linear; a convolution's is not
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


def fisher(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    max_batches: int | None = None,
) -> dict[str, Tensor]:
    """Return the diagonal of the empirical Fisher matrix: the mean over examples of the squared gradient.

    Parameters
    ----------
    model : nn.Module
        A PeftModel or any module; run in evaluation mode, and left as it was.
    batches : Iterable
        Tensors with one example an entry of dimension 0, on the model's device, or mappings, tuples and lists of them.
    loss_fn : Callable[[nn.Module, Any], Tensor]
        `loss_fn(model, batch)`: the negative log-likelihood of the label, for a batch of one example. It is called for
        each example alone, in the form of the batch, so a mean over the batch is the example's own:
        `lambda model, batch: model(**batch).loss`.
    max_batches : int | None (default: None)
        Take so many batches at most.

    Returns
    -------
    dict[str, Tensor]
        State-dict key (without adapter names, as PEFT writes it) -> float32, the shape and device of the parameter,
        >= 0; new memory. Every parameter that is trained, those that the loss does not reach with zeros.

    Raises
    ------
    ValueError
        There is no batch or no parameter that is trained, or a gradient is not finite.

    Notes
    -----
    Matena & Raffel (2022), arXiv 2111.09832, Eq. 3, takes the expectation over the model's own predictions; the
    empirical Fisher takes the data's labels, at the cost of one backward pass an example instead of one a class.
    The gradient is squared for each example: the square of a batch's mean gradient is something else.
    """
    adapters = "|".join(map(re.escape, getattr(model, "peft_config", None) or {}))
    parameters: dict[str, nn.Parameter] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):  # tied weights have a key each
        if parameter.requires_grad:
            key = _state_key(path, adapters)
            if key in parameters:
                raise ValueError(f"{path!r}: expected one adapter that is trained, found another's {key!r} too")
            parameters[key] = parameter
    if not parameters:
        raise ValueError("model: expected a parameter that is trained, found none")
    unique = list({id(parameter): parameter for parameter in parameters.values()}.values())
    squares = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in unique]
    examples = 0
    with _evaluating(model), torch.enable_grad():
        for batch in _some(batches, max_batches):
            for i in range(_size(batch)):
                gradients = torch.autograd.grad(loss_fn(model, _example(batch, i)).sum(), unique, allow_unused=True)
                for square, gradient in zip(squares, gradients, strict=True):
                    if gradient is not None:
                        square += gradient.to(torch.float32).square()
                examples += 1
    where = {id(parameter): square / max(1, examples) for parameter, square in zip(unique, squares, strict=True)}
    result = {key: where[id(parameter)].clone() for key, parameter in parameters.items()}
    for key, diagonal in result.items():
        if not torch.isfinite(diagonal).all():
            raise ValueError(f"{key!r}: expected finite gradients, found NaN or infinity in their squares")
    return result


def _state_key(path: str, adapters: str) -> str:
    """Return the key of a parameter in the state dict that is sent: PEFT's has no adapter names."""
    if not adapters:
        return path
    path = re.sub(rf"\.modules_to_save\.(?:{adapters})\.", ".", path)
    return re.sub(rf"(\.lora_[A-Za-z_]+)\.(?:{adapters})(?=\.|$)", r"\1", path)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every module back into its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _some(batches: Iterable[Any], at_most: int | None) -> Iterator[Any]:
    """Yield the first batches, or raise ValueError where there is none."""
    found = False
    for batch in islice(batches, at_most):
        found = True
        yield batch
    if not found:
        raise ValueError("batches: expected at least one, found none")


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | tuple | list):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)


def _size(batch: Any) -> int:
    """Return the number of examples of a batch, or raise ValueError where its tensors differ in it."""
    sizes = {len(tensor) for tensor in _tensors(batch) if tensor.ndim}
    if len(sizes) != 1:
        raise ValueError(f"batches: expected tensors with one example an entry of dimension 0, found {sorted(sizes)}")
    return sizes.pop()


def _example(batch: Any, i: int) -> Any:
    """Return a batch of one example, in the form of the batch."""
    if isinstance(batch, Tensor):
        return batch[i : i + 1] if batch.ndim else batch
    if isinstance(batch, Mapping):
        return {name: _example(part, i) for name, part in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [_example(part, i) for part in batch]
        return tuple(parts) if isinstance(batch, tuple) else parts
    return batch
