"""Diagonals of the empirical Fisher matrix, which Fisher merging weighs entries by."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fedfrom.client_statistics.batches import evaluating, first_batches, num_examples, one_example


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
        Tensors on the model's device with examples along dimension 0, or mappings, tuples and lists of such tensors.
    loss_fn : Callable[[nn.Module, Any], Tensor]
        `loss_fn(model, batch)`: the negative log-likelihood of the label. It is called with one example at a time, in
        the form of a batch, so a mean over the batch is the example's own loss:
        `lambda model, batch: model(**batch).loss`.
    max_batches : int | None (default: None)
        Largest number of batches to take; None takes all.

    Returns
    -------
    dict[str, Tensor]
        State-dict key (without adapter names, as PEFT writes it) -> float32, the shape and device of the parameter,
        >= 0; new memory. Every trained parameter has an entry: zeros where the loss does not depend on it.

    Raises
    ------
    ValueError
        There is no batch or no trained parameter, or a gradient is not finite.

    Notes
    -----
    Matena & Raffel (2022), arXiv 2111.09832, Eq. 3, takes the expectation over the model's own predictions; the
    empirical Fisher takes the data's labels, which costs one backward pass an example instead of one a class.
    The gradient is squared for each example: the square of a batch's mean gradient is another quantity.
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
    with evaluating(model), torch.enable_grad():
        for batch in first_batches(batches, max_batches):
            for i in range(num_examples(batch)):
                gradients = torch.autograd.grad(loss_fn(model, one_example(batch, i)).sum(), unique, allow_unused=True)
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
    """Return a parameter's key in the state dict that is sent, where PEFT leaves adapter names out."""
    if not adapters:
        return path
    path = re.sub(rf"\.modules_to_save\.(?:{adapters})\.", ".", path)
    return re.sub(rf"(\.lora_[A-Za-z_]+)\.(?:{adapters})(?=\.|$)", r"\1", path)
