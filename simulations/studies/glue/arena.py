"""Scores of one body under every task's head."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedfrom.merging.peft.configs import PREFIX
from fedfrom.tuning.bias import refitted_bias
from simulations import models, training
from simulations.batches import Tokens
from simulations.studies.glue import bodies
from simulations.studies.glue.data import TaskData, score
from simulations.studies.glue.options import GlueOptions

_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Answers:
    """A body's outputs on some rows of one task.

    Attributes
    ----------
    task : str
        The task.
    outputs : NDArray
        (n, classes) float32 logits, or (n, 1) scores.
    labels : NDArray
        (n,) the right answers.
    """

    task: str
    outputs: NDArray[np.float32]
    labels: NDArray[np.generic]

    def followed_by(self, other: "Answers") -> "Answers":
        """Return these rows and another's of the same task."""
        labels = np.concatenate([self.labels, other.labels])
        return Answers(self.task, np.concatenate([self.outputs, other.outputs]), labels)

    def score(self, bias: NDArray[np.float64] | None = None) -> float:
        """Return the score, with a bias added to the logits where one is given."""
        if bias is None:
            return score(self.task, self.answers, self.labels)
        return score(self.task, (self.outputs + bias).argmax(1), self.labels)

    @property
    def answers(self) -> NDArray[np.generic]:
        """(n,) the classes with the highest logits, or the scores."""
        return self.outputs[:, 0] if self.outputs.shape[1] == 1 else self.outputs.argmax(1)

    def bias(self) -> NDArray[np.float64] | None:
        """Return (classes,) what added to the logits gives the lowest cross-entropy; None for real numbers.

        The head's bias is fitted anew: see `refitted_bias`.
        """
        return None if self.outputs.shape[1] == 1 else refitted_bias(self.outputs, self.labels)  # type: ignore[arg-type]


class Arena:
    """The pretrained encoder, whose weights a merged body is added to.

    Parameters
    ----------
    options : GlueOptions
        Of the study.
    seed : int
        Whose heads are used.
    data : Mapping[str, TaskData]
        Every task's rows.
    """

    def __init__(self, options: GlueOptions, seed: int, data: Mapping[str, TaskData]) -> None:
        first = next(iter(data.values()))
        self._model: nn.Module = models.base_model(options.simulation(first.task, seed), first.head)
        self._data, self._precision = data, options.precision
        self._threads = max(1, training.free_workers() // max(1, options.processes))
        self._heads = {task: bodies.head(options, seed, task) for task in data}
        self._pretrained: dict[str, Tensor] = {}

    def load(self, body: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Set the encoder to its pretrained weights plus scale B A for each module of an adapter.

        B carries the adapter's scaling.
        """
        with torch.no_grad():
            for key, B in body.items():
                if key.endswith(_B):
                    module = key.removeprefix(PREFIX).removesuffix(_B)
                    weight: Any = self._model.get_submodule(module).weight
                    start = self._pretrained.setdefault(module, weight.detach().cpu().clone())
                    A = body[key.removesuffix(_B) + _A]
                    weight.copy_(start + scale * (B.double() @ A.double()).to(start.dtype))

    def answer(self, task: str, tokens: Tokens) -> Answers:
        """Return what the loaded body answers under the task's head."""
        head = nn.Linear(self._heads[task]["weight"].shape[1], self._heads[task]["weight"].shape[0])
        head.load_state_dict(self._heads[task])
        self._model.classifier = head
        found = np.empty((len(tokens), head.out_features), np.float32)
        for chosen, output in training.outputs(self._model, tokens, self._threads, self._precision):
            found[chosen] = output.cpu().numpy()
        found[:, list(self._data[task].absent)] = -np.inf
        return Answers(task, found, tokens.labels.numpy())

    def reported(self) -> dict[str, Answers]:
        """Return the answers on the rows that are reported, by task."""
        return {task: self.answer(task, data.reported) for task, data in self._data.items()}

    def tuning(self, rows: slice = slice(None)) -> dict[str, Answers]:
        """Return the answers on the tuning rows, or on some of them, by task."""
        return {
            task: self.answer(task, data.tuning.select(list(range(len(data.tuning)))[rows]))
            for task, data in self._data.items()
        }


class Scaled:
    """One merged body at any scale in an arena; what it answers at a scale is computed once.

    Parameters
    ----------
    arena : Arena
        What it is loaded into.
    body : Mapping[str, Tensor]
        An adapter, whose B carries the scaling.
    first : int
        Number of a task's tuning rows on which every scale is tried.
    """

    def __init__(self, arena: Arena, body: Mapping[str, Tensor], first: int) -> None:
        self._arena, self._body, self._first = arena, body, first
        self._known: dict[tuple[float, str], dict[str, Answers]] = {}

    def reported(self, scale: float) -> dict[str, Answers]:
        """Return `Arena.reported` of the body at this scale."""
        return self._once((scale, "reported"), self._arena.reported)

    def first(self, scale: float) -> dict[str, Answers]:
        """Return the answers of the body at this scale on the first tuning rows."""
        return self._once((scale, "first"), lambda: self._arena.tuning(slice(self._first)))

    def tuning(self, scale: float) -> dict[str, Answers]:
        """Return `Arena.tuning` of the body at this scale."""
        rest = self._once((scale, "rest"), lambda: self._arena.tuning(slice(self._first, None)))
        return {task: answers.followed_by(rest[task]) for task, answers in self.first(scale).items()}

    def _once(self, key: tuple[float, str], answers: Callable[[], dict[str, Answers]]) -> dict[str, Answers]:
        if key not in self._known:
            self._arena.load(self._body, key[0])
            self._known[key] = answers()
        return self._known[key]
