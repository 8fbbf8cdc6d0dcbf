"""What all strategies of one run share: data, partition, initial weights, evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy
from torch import Tensor, nn

from simulations import models, partitions, strategies, tasks, training
from simulations.batches import Tokens, tokenise
from simulations.metrics import Scores
from simulations.options import OWN, Options

TARGET_ABOVE_BASELINE = 0.08


@dataclass(frozen=True)
class Experiment:
    """The loaded data and models of a simulation whose options were checked."""

    options: Options
    tasks: list[tasks.Task]
    shares: list[partitions.Share]
    head: models.Head
    tokenizer: Any
    model: nn.Module
    initial: dict[str, Tensor]
    held_out: list[Tokens]
    validation: list[Tokens]
    _start: Scores = field(default_factory=dict)

    @classmethod
    def prepare(cls, options: Options) -> "Experiment":
        """Load the data and the model, and build each strategy once: errors show before anything starts.

        Raises
        ------
        BadInput
            An option, folder or package can't be used.
        """
        # Options that depend on files are settled here; the clients receive the settled ones.
        options = replace(options.validated(), pooling=models.pooling(options), glue_dir=options.glue_folder)
        own = options.partition == OWN  # only the sites know their shares
        loaded = tasks.load(options, (tasks.HELD_OUT,) if own else (tasks.TRAIN, tasks.HELD_OUT))
        shares = [] if own else partitions.split(options, loaded)
        head = models.Head(loaded[0].num_labels, loaded[0].regression)
        tokenizer = models.tokenizer(options)
        model = models.build(options, head)
        held_out = [tokenise(task.held_out, tokenizer, options, head.regression) for task in loaded]
        validation = [
            tokenise(task.validation, tokenizer, options, head.regression) for task in loaded if task.validation
        ]
        initial = {name: tensor.detach().clone() for name, tensor in models.trained_state(model).items()}
        experiment = cls(options, loaded, shares, head, tokenizer, model, initial, held_out, validation)
        for spec in options.strategies:
            experiment.strategy(spec)
        return experiment

    def strategy(self, spec: str) -> Strategy:
        """Return a fresh strategy of that spec: see `strategies.build`."""
        return strategies.build(spec, self.options, self.lora_config, self.validate if self.validation else None)

    @property
    def lora_config(self) -> dict[str, Any] | None:
        """The server's PEFT configuration as JSON types, None for full fine-tuning."""
        if self.options.full:
            return None
        configuration: Any = self.model.peft_config
        values = configuration["default"].to_dict()
        return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}

    @property
    def baseline(self) -> float:
        """Score of a constant answer: the majority class; over several tasks the mean."""
        return sum(task.baseline for task in self.tasks) / len(self.tasks)

    @property
    def target(self) -> float:
        """Score of `--target`: results name the first round that reaches it."""
        asked = self.options.target
        return self.baseline + TARGET_ABOVE_BASELINE if asked is None else asked

    @property
    def metric(self) -> str:
        """Name of the score."""
        names = [task.metric if len(self.tasks) == 1 else f"{task.name} {task.metric}" for task in self.tasks]
        return names[0] if len(names) == 1 else f"mean of {', '.join(names)}"

    def initial_arrays(self) -> ArrayRecord:
        """Return a fresh record of the initial weights."""
        return ArrayRecord({name: tensor.clone() for name, tensor in self.initial.items()})

    def start(self) -> Scores:
        """Return the scores of the initial weights: measured once, as they are the same for every strategy."""
        if not self._start:
            self._start.update(self.evaluate(self.initial))
        return dict(self._start)

    def evaluate(self, state: Mapping[str, Tensor]) -> Scores:
        """Return the scores of a global state on the held-out examples of every task.

        With several tasks, each task's metrics carry its name, and "score" and "loss" are means over tasks.
        """
        models.load_trained_state(self.model, state)
        return self.evaluate_model(self.model)

    def validate(self, state: Mapping[str, Tensor]) -> float:
        """Return the score of a global state on the examples of `--validation-examples`."""
        models.load_trained_state(self.model, state)
        return self._scores(self.model, self.validation)["score"]

    def evaluate_model(self, model: nn.Module) -> Scores:
        """Return the scores of any model with this run's outputs: see `evaluate`."""
        return self._scores(model, self.held_out)

    def client_model(self, client: int) -> nn.Module:
        """Return a model of a client's rank."""
        return models.build(self.options, self.head, self.options.client_rank(client))

    def _scores(self, model: nn.Module, examples: list[Tokens]) -> Scores:
        workers = training.free_workers()  # clients wait during the evaluation
        each = [
            training.evaluate(model, tokens, task.name, workers, self.options.precision)
            for tokens, task in zip(examples, self.tasks, strict=True)
        ]
        if len(each) == 1:
            return each[0]
        named = {
            f"{task.name}-{name}": value
            for task, scores in zip(self.tasks, each, strict=True)
            for name, value in scores.items()
        }
        means = {name: sum(scores[name] for scores in each) / len(each) for name in ("score", "loss")}
        return {**named, **means}
