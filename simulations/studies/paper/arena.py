"""The model into which merged states are loaded to be scored."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedfrom.merging.peft.configs import rank_and_scaling
from simulations import models, training
from simulations.studies.paper.data import load
from simulations.studies.paper.options import PaperOptions
from simulations.studies.paper.pairs import PairClassifier

Scores = dict[str, dict[str, float]]


def new_model(options: PaperOptions, kind: str, seed: int, base: Mapping[str, Tensor] | None) -> nn.Module:
    """Return the pretrained model, with the base model's weights, ready to train.

    Parameters
    ----------
    options : PaperOptions
        Names the pretrained model.
    kind : str
        "base": all weights train; "full": all but the head; "lora": an adapter alone.
    seed : int
        Seed of the weights that the pretrained model lacks.
    base : Mapping[str, Tensor] | None
        The weights that the base model's training changed; None before it.
    """
    simulation = options.simulation(kind, seed)
    model = models.base_model(simulation, models.Head(2, False))
    if options.apart and isinstance(model, models.MeanPoolingClassifier):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = PairClassifier(model.encoder, 2)
    if base is not None:
        model.load_state_dict(dict(base), strict=False)
    embeddings: Any = getattr(model, "encoder", model)
    for parameter in () if options.embeddings else embeddings.get_input_embeddings().parameters():
        parameter.requires_grad_(False)
    if kind == "base":
        return model
    for name in models.HEADS:
        for parameter in getattr(model, name).parameters() if hasattr(model, name) else ():
            parameter.requires_grad_(False)
    return model if kind == "full" else models.adapt(model, simulation, options.lora_r, own_head=False)


def trained_state(model: nn.Module, kind: str) -> dict[str, Tensor]:
    """Return a copy of the trained tensors: the adapter's, or the weights that are not frozen."""
    if kind == "lora":
        state = models.trained_state(model)
    else:
        state = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


class Arena:
    """Scores states of one kind and seed on the tasks' halves.

    Parameters
    ----------
    options : PaperOptions
        The study's options.
    kind, seed : str, int
        Kind and seed of the states.
    base : Mapping[str, Tensor]
        The base model's weights.
    """

    def __init__(self, options: PaperOptions, kind: str, seed: int, base: Mapping[str, Tensor]) -> None:
        self.kind = kind
        self.data = load(options)
        self._precision = options.precision
        self._model = new_model(options, kind, seed, base)
        self.start = trained_state(self._model, kind)

    @property
    def config(self) -> dict[str, Any] | None:
        """The adapter's configuration, None for full weights."""
        if self.kind != "lora":
            return None
        configuration: Any = self._model.peft_config
        return {name: list(v) if isinstance(v, set) else v for name, v in configuration["default"].to_dict().items()}

    def score(
        self, state: Mapping[str, Tensor] | None, tasks: Sequence[str], half: str, config: Mapping[str, Any] | None
    ) -> Scores:
        """Return a state's number of right answers on a half of each task, and its mean loss.

        Parameters
        ----------
        state : Mapping[str, Tensor] | None
            A merged state, or a task's own; None is the base model.
        tasks : Sequence[str]
            Names of the tasks.
        half : str
            "validation" or "reported".
        config : Mapping | None
            The adapter configuration of the state; None is the arena's own.
        """
        with self._holding(state, config):
            return {task: self._score(task, half) for task in tasks}

    def _score(self, task: str, half: str) -> dict[str, float]:
        tokens = self.data[task].half(half)
        found = training.evaluate(self._model, tokens, task, precision=self._precision)
        total = len(tokens)
        return {"correct": round(found["accuracy"] * total), "total": total, "loss": found["loss"]}

    @contextlib.contextmanager
    def _holding(self, state: Mapping[str, Tensor] | None, config: Mapping[str, Any] | None) -> Iterator[None]:
        """Load a state into the model, and the start again at the end."""
        if state is not None:
            fitted = dict(state) if self.config is None or config is None else _rescaled(state, config, self.config)
            self._load(fitted)
        try:
            yield
        finally:
            self._load(self.start)

    def _load(self, state: Mapping[str, Tensor]) -> None:
        if self.kind == "lora":
            models.load_trained_state(self._model, state)
        else:
            self._model.load_state_dict(dict(state), strict=False)


def _rescaled(state: Mapping[str, Tensor], config: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the adapter with the same products s·BA under the configuration `own`: B takes the ratio of scalings."""
    result = dict(state)
    for key, tensor in state.items():
        module, found, _ = key.partition(".lora_B")
        if found:
            result[key] = tensor * (rank_and_scaling(config, module)[1] / rank_and_scaling(own, module)[1])
    return result


def accuracy(scores: Scores, task: str) -> float:
    """Return the share of right answers of a task."""
    return scores[task]["correct"] / scores[task]["total"]


def mean_accuracy(scores: Scores) -> float:
    """Return the mean of the tasks' accuracies."""
    return sum(accuracy(scores, task) for task in scores) / len(scores)
