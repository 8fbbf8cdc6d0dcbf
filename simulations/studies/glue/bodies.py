"""The models that are merged: for each task and seed an adapter and a head, trained once and kept in a folder."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simulations import client_statistics, models, training
from simulations.studies.glue.data import TaskData
from simulations.studies.glue.options import GlueOptions
from simulations.studies.shelf import Shelf

State = dict[str, Tensor]


def shelf(options: GlueOptions) -> Shelf:
    """Return the folder of the trained models, one for each set of the settings of training."""
    parts = [
        options.suite,
        options.model,
        options.layers,
        options.lora_r,
        options.lora_alpha,
        options.lr,
        options.batch_size,
    ]
    parts += [options.group_by_length, options.precision, options.epochs, options.small_epochs, options.max_length]
    parts += [options.train_examples, options.tuning_examples]
    name = "-".join(str(part).replace(os.sep, "_") for part in parts)
    return Shelf(Path(os.path.expanduser(options.cache)) / name)


def train(options: GlueOptions, seed: int, data: TaskData) -> float:
    """Train one task's adapter and head from the common start, keep them, and return the training's loss.

    The start is the pretrained encoder with one fresh adapter, the same for all tasks of a seed, under a fresh head.
    """
    simulation = options.simulation(data.task, seed)
    model = models.adapt(models.base_model(simulation, data.head), simulation, options.lora_r)
    done = training.train(model, data.train, simulation, _order(seed, data.task), rate=training.warmed_up)
    shelf(options).put(_name(seed, data.task), models.trained_state(model.cpu()))
    return done.loss


def ensure(options: GlueOptions, seed: int, data: TaskData) -> None:
    """Train the task's model unless it is in the folder."""
    if _name(seed, data.task) not in shelf(options):
        train(options, seed, data)


def body(options: GlueOptions, seed: int, task: str) -> State:
    """Return a task's adapter, without its head."""
    return {key: tensor for key, tensor in _state(options, seed, task).items() if "lora_" in key}


def head(options: GlueOptions, seed: int, task: str) -> State:
    """Return the weight and the bias of a task's head."""
    return {key.rsplit(".", 1)[1]: tensor for key, tensor in _state(options, seed, task).items() if "lora_" not in key}


def with_norms(states: Sequence[State], k: float) -> list[State]:
    """Return the adapters with ||B A||_F of each module in proportion to its k-th power; their sum stays."""
    found = [dict(state) for state in states]
    for key in found[0]:
        if "lora_B" in key:
            other = key.replace("lora_B", "lora_A")
            norms = torch.stack([(state[key].double() @ state[other].double()).norm() for state in found])
            factors = norms ** (k - 1) * norms.sum() / (norms**k).sum()
            for state, factor in zip(found, factors.tolist(), strict=True):
                state[key] = state[key] * factor
    return found


def gram(options: GlueOptions, seed: int, data: TaskData) -> State:
    """Return the Gram matrices of the inputs of a task's own model, by module, on some of its training rows."""
    simulation = options.simulation(data.task, seed)
    model = models.adapt(models.base_model(simulation, data.head), simulation, options.lora_r)
    models.load_trained_state(model, _state(options, seed, data.task))
    return client_statistics.compute("gram", model, data.train, simulation, _order(seed, data.task))


def config(options: GlueOptions) -> dict[str, Any]:
    """Return the rank and the scaling of every adapter."""
    return {"r": options.lora_r, "lora_alpha": options.lora_alpha}


def _state(options: GlueOptions, seed: int, task: str) -> State:
    return shelf(options).get(_name(seed, task))


def _order(seed: int, task: str) -> int:
    """Return the seed of the order of a task's rows."""
    return training.round_seed(seed, sum(task.encode()))


def _name(seed: int, task: str) -> str:
    return f"{task}-s{seed}"
