"""Each task's rows: to train on, to tune on (held out of the training set), and to report on (of the dev set)."""

import random
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from simulations import metrics, models, tasks
from simulations.batches import Tokens, tokenise
from simulations.studies.glue.options import GlueOptions

_METRIC = {"cola": "matthews", "mrpc": "matthews", "qqp": "matthews", "stsb": "spearman"}
_SEED = 0  # of all rows: every seed of the study trains and reports on the same ones


@dataclass(frozen=True)
class TaskData:
    """One task's rows, tokenised.

    Attributes
    ----------
    task : str
        The task.
    head : models.Head
        Its head.
    train, tuning, reported : Tokens
        The rows.
    absent : tuple[int, ...]
        Classes of the head that the task does not have: they are no answer.
    """

    task: str
    head: models.Head
    train: Tokens
    tuning: Tokens
    reported: Tokens
    absent: tuple[int, ...] = ()

    @property
    def constant(self) -> float:
        """Score of the best constant answer on the reported rows."""
        labels = self.reported.labels.numpy()
        return 0.0 if self.head.regression else score(self.task, metrics.majority(labels), labels)


@lru_cache(maxsize=1)
def load(options: GlueOptions) -> dict[str, TaskData]:
    """Return the rows of every task.

    Raises
    ------
    BadInput
        The data or the tokenizer can't be used.
    """
    return {task: _load(options, task) for task in options.tasks}


def _load(options: GlueOptions, task: str) -> TaskData:
    simulation = options.simulation(task, _SEED)
    (found,) = tasks.load(replace(simulation, train_examples=0, eval_examples=options.reported_examples))
    rows = list(range(len(found.train)))
    random.Random(f"glue:{task}").shuffle(rows)
    tuning, train = rows[: options.tuning_examples], rows[options.tuning_examples :]
    if options.train_examples:
        train = train[: options.train_examples]
    tokenizer = models.tokenizer(simulation)
    head = models.Head(found.num_labels, found.regression)
    parts = (found.train.select(sorted(train)), found.train.select(tuning), found.held_out)
    train_on, tune_on, report = (tokenise(part, tokenizer, simulation, head.regression) for part in parts)
    data = TaskData(task, head, train_on, tune_on, report)
    return _three_way(data) if options.suite == "nli" and head.num_labels == 2 else data


def _three_way(data: TaskData) -> TaskData:
    """Return a task of entailment or not under a head whose class 1, neutral, it does not have."""
    train_on, tune_on, report = (
        replace(tokens, labels=2 * tokens.labels) for tokens in (data.train, data.tuning, data.reported)
    )
    return TaskData(data.task, models.Head(3, False), train_on, tune_on, report, absent=(1,))


def metric(task: str) -> str:
    """Return "matthews" for CoLA, MRPC and QQP, whose classes are uneven, "spearman" for STS-B, else "accuracy"."""
    return _METRIC.get(task, "accuracy")


def score(task: str, answers: NDArray[np.generic], labels: NDArray[np.generic]) -> float:
    """Return the task's `metric`. A correlation with a constant is 0: see `metrics.scores`."""
    return metrics.metric(metric(task), answers, labels)
