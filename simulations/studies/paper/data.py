"""The examples: training sets, and two halves of each task's dev set, one to choose by and one to report."""

import random
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from fedfrom.errors import BadInput
from simulations import models, tasks
from simulations.batches import Tokens, tokenise, training_batches
from simulations.options import Options
from simulations.studies.paper.options import BASE_TASK, TASKS, PaperOptions
from simulations.training import round_seed

VALIDATION, REPORTED = "validation", "reported"


@dataclass(frozen=True)
class TaskData:
    """One task's training examples, and the two halves of its dev set, which share no example."""

    train: Tokens
    validation: Tokens
    reported: Tokens

    def half(self, name: str) -> Tokens:
        """Return the half of that name."""
        return {VALIDATION: self.validation, REPORTED: self.reported}[name]


def halves(count: int, validation: int, reported: int) -> tuple[list[int], list[int]]:
    """Return the rows of a dev set to choose by and to report, the same for all seeds of training.

    Parameters
    ----------
    count : int
        Rows of the dev set.
    validation, reported : int
        Largest number of rows in each half. Each has at most half of all rows; an odd row goes to the reported half.
    """
    order = list(range(count))
    random.Random("halves").shuffle(order)
    middle = count // 2
    return sorted(order[:middle][:validation]), sorted(order[middle:][:reported])


@lru_cache(maxsize=2)
def load(options: PaperOptions) -> dict[str, TaskData]:
    """Return every task's examples by the task's name. MNLI is made binary: class 0 is entailment in all tasks.

    Raises
    ------
    BadInput
        The data or the tokenizer can't be used.
    """
    simulation = options.simulation("full", 0)
    tokenizer = models.tokenizer(simulation)
    found: dict[str, TaskData] = {}
    for name in (BASE_TASK, *TASKS):
        (task,) = tasks.load(replace(simulation, task=(name,), partition="iid"))
        train, dev = (tokenise(part, tokenizer, simulation, False) for part in (task.train, task.held_out))
        if options.apart and models.pooling(simulation) == "mean" and "token_type_ids" not in dev.pad:
            raise BadInput(f"--apart: the tokenizer of {options.model} marks no second sentence; say --no-apart")
        first, second = halves(len(dev), options.validation_examples, options.reported_examples)
        found[name] = TaskData(_binary(train), _binary(dev.select(first)), _binary(dev.select(second)))
    return found


def _binary(tokens: Tokens) -> Tokens:
    """Return the examples with all classes but entailment as class 1."""
    return replace(tokens, labels=torch.clamp(tokens.labels, max=1))


def pooled(parts: list[tuple[Tokens, Options, int]]) -> Tokens:
    """Return one set with the examples of each task's own training, each as often as that training sees it.

    Parameters
    ----------
    parts : list
        For each task its examples, the options with its steps, and the seed of its order.
    """
    rows, labels, pad = [], [], {}
    for tokens, options, seed in parts:
        seen = tokens.select([row for batch in training_batches(tokens, options, seed) for row in batch])
        rows += seen.rows
        labels.append(seen.labels)
        pad = seen.pad
    return Tokens.of(rows, torch.cat(labels), pad)


def constant(tokens: Tokens) -> dict[str, float]:
    """Return the number of right answers of the most frequent class."""
    return {"correct": int(torch.bincount(tokens.labels).max()), "total": len(tokens)}


def order_seed(seed: int, task: str) -> int:
    """Return the seed of the order of a task's training examples."""
    return round_seed(seed, 0, (BASE_TASK, *TASKS, "pooled").index(task))
