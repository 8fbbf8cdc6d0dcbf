"""Running a model over batches of any form, in evaluation mode: whole batches, or one example at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode within a `with` block, then every module back into its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def first_batches(batches: Iterable[Any], at_most: int | None) -> Iterator[Any]:
    """Yield the first batches, or raise ValueError where there is none."""
    found = False
    for batch in islice(batches, at_most):
        found = True
        yield batch
    if not found:
        raise ValueError("batches: expected at least one, found none")


def forward(model: nn.Module, batch: Any) -> Any:
    """Call a model with a mapping as keywords, a tuple or list as arguments, anything else as the only argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | tuple | list):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)


def num_examples(batch: Any) -> int:
    """Return the number of examples in a batch, or raise ValueError where its tensors disagree."""
    sizes = {len(tensor) for tensor in _tensors(batch) if tensor.ndim}
    if len(sizes) != 1:
        raise ValueError(f"batches: expected tensors with one example an entry of dimension 0, found {sorted(sizes)}")
    return sizes.pop()


def one_example(batch: Any, i: int) -> Any:
    """Return example i of a batch as a batch of one, in the same form."""
    if isinstance(batch, Tensor):
        return batch[i : i + 1] if batch.ndim else batch
    if isinstance(batch, Mapping):
        return {name: one_example(part, i) for name, part in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [one_example(part, i) for part in batch]
        return tuple(parts) if isinstance(batch, tuple) else parts
    return batch
