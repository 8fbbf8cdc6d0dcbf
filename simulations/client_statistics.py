"""Statistics of a client's own data, Gram matrices or Fisher diagonals, for the strategies that merge by them."""

import dataclasses
from itertools import islice
from typing import Any

from torch import Tensor, nn

from fedfrom import client
from fedfrom.merging.methods.registry import needed_statistics
from simulations import models, training
from simulations.batches import Tokens, training_batches
from simulations.options import Options


def needed(spec: str) -> str | None:
    """Return the statistics that the strategy of a spec (see `strategies.build`) needs: "gram", "fisher" or None."""
    name = spec.split(":")[0]
    return None if name == "fedavg" else needed_statistics(name)


def compute(kind: str, model: nn.Module, tokens: Tokens, options: Options, seed: int) -> dict[str, Tensor]:
    """Return a client's statistics for one round, on the CPU, from some batches of its training examples.

    Parameters
    ----------
    kind : str
        "gram" or "fisher".
    model : nn.Module
        The client's model after its training. It is not changed.
    tokens : Tokens
        The client's training examples.
    options : Options
        `statistics_batches` batches of `batch_size` examples; no example is used twice.
    seed : int
        Fixes the choice of examples.
    """
    where = training.device()
    model.to(where)
    one_pass = dataclasses.replace(options, steps=0, epochs=1)
    chosen = islice(training_batches(tokens, one_pass, seed), options.statistics_batches)
    batches = (_moved(*tokens.batch(rows), where) for rows in chosen)
    if kind == "gram":
        found = client.gram(model, (inputs for inputs, _ in batches))
    else:
        found = client.fisher(model, batches, _loss)
    return {name: tensor.cpu() for name, tensor in found.items()}


def _moved(inputs: dict[str, Tensor], labels: Tensor, where: Any) -> tuple[dict[str, Tensor], Tensor]:
    return {name: value.to(where) for name, value in inputs.items()}, labels.to(where)


def _loss(model: nn.Module, batch: tuple[dict[str, Tensor], Tensor]) -> Tensor:
    inputs, labels = batch
    loss = training.loss_of(models.logits(model, inputs), labels)
    # the squared error is twice the negative log-likelihood of a normal distribution of variance 1
    return loss / 2 if labels.is_floating_point() else loss
