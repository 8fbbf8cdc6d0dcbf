"""Every option of a simulation, its default, its bounds, and the ways it travels.

One frozen object holds them all. It goes to the clients as JSON inside the train and evaluate configuration
(`run_simulation` has an empty run configuration), and `flwr run` fills it from `[tool.flwr.app.config]`.
"""

import dataclasses
import json
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fedfrom.errors import BadInput

if TYPE_CHECKING:
    from flwr.app import ConfigRecord

GLUE_TASKS = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")
TASKS = ("reviews", *GLUE_TASKS)
DEFAULT_MODEL = "minilm"
GLUE_VARIABLE = "FEDFROM_GLUE_DIR"
RECORD_KEY = "options"
T = TypeVar("T")
OWN = "own"  # the partition that nobody makes: each site's folder holds its share


def option(default: Any, help: str) -> Any:
    """Declare one option: its default and the sentence that `--help` shows."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Options:
    """What a simulation is asked to do. `validated()` checks every bound that needs no file or library."""

    strategies: tuple[str, ...] = option(
        ("from", "fedavg"),
        "Strategies, run one after the other: fedavg, from, or any of fedfrom's methods by name; "
        "settings of one strategy follow a colon (from:k=1:examples_power=0).",
    )
    task: tuple[str, ...] = option(("reviews",), f"One of {', '.join(TASKS)}; several for --partition tasks.")
    glue_dir: str = option("", f"Folder with GLUE's TSV files (or set {GLUE_VARIABLE}); empty: the Hub.")
    train_examples: int = option(0, "Use at most this many training examples of a task, 0: all.")
    eval_examples: int = option(1000, "Use at most this many held-out examples of a task, 0: all.")
    validation_examples: int = option(0, "Held-out examples that k=auto and greedy-soup choose by, in no score.")

    partition: str = option(
        "dirichlet",
        "iid, dirichlet (over labels), natural (by a column), tasks (one a client) or, in a deployment alone, own "
        "(each site's data folder is its share).",
    )
    alpha: float = option(2.0, "Concentration of the Dirichlet partition; smaller is more uneven.")
    partition_by: str = option("", "Column of the natural partition; empty: the task's own (reviews: movie).")
    clients: int = option(4, "Number of clients.")

    model: str = option(DEFAULT_MODEL, "minilm (all-MiniLM-L6-v2 from its package), a folder, or a Hub name.")
    layers: int | None = option(None, "Keep this many transformer layers, 0: all. [default: 3 for minilm, else all]")
    pooling: str = option("auto", "mean (of the token vectors), head (the model's own) or auto (by the model).")
    full: bool = option(False, "Fine-tune the full model instead of a LoRA adapter.")
    lora_r: int = option(8, "Rank of the LoRA adapter.")
    lora_alpha: float = option(16.0, "LoRA's alpha; the scaling is alpha / r, or alpha / sqrt(r) with rsLoRA.")
    lora_dropout: float = option(0.0, "Dropout before LoRA's A.")
    lora_targets: tuple[str, ...] = option((), "Modules that LoRA adapts; empty: PEFT's choice for the model.")
    rslora: bool = option(False, "Scale by alpha / sqrt(r).")
    dora: bool = option(False, "Weight-decomposed LoRA.")
    ranks: tuple[int, ...] = option((), "A rank for each client, repeated as needed; the server holds the largest.")

    rounds: int = option(4, "Federated rounds.")
    steps: int = option(16, "Optimiser steps of a client in a round, 0: --epochs passes over its data.")
    epochs: int = option(1, "Passes over the client's data in a round where --steps is 0.")
    batch_size: int = option(16, "Examples in a training step.")
    lr: float | None = option(None, "Learning rate of AdamW. [default: 2e-3 for LoRA, 1e-4 for --full]")
    weight_decay: float = option(0.01, "Weight decay of AdamW.")
    max_length: int = option(64, "Longest input, in tokens; the rest is cut off.")
    statistics_batches: int = option(8, "Batches that a client's statistics are of (regmean, lorm, fisher).")

    k: float = option(0.5, "FroM: power of the Frobenius norm in the weights (inf: the largest alone).")
    examples_power: float = option(0.5, "FroM: power of a client's number of examples in the weights.")
    solver: str = option("svd", "FroM: svd (exact) or alternating (the paper's Algorithm 1).")
    scope: str = option("layer", "FroM: one weight a client for each layer, or for the whole model.")
    rank: int | None = option(None, "FroM: largest rank of the merged product. [default: what the clients hold]")
    server_lr: float = option(1.0, "Share of the merged update that the server applies (all but fedavg).")

    seed: int = option(0, "Fixes partition, initial weights, batches and dropout.")
    federated_evaluation: bool = option(False, "Also evaluate on a tenth of each client's data, kept out of training.")
    target: float | None = option(None, "Score whose first round is reported. [default: 0.08 above a constant answer]")
    save_clients: bool = option(False, "Also save each client's adapter of the last round, in STRATEGY-clients.")
    out: str = option("results/simulation", "Results folder; an earlier result in it is replaced at the end.")
    processes: int = option(0, "Client processes at a time, 0: one a core.")
    gpus_per_client: float = option(0.5, "Share of a GPU for a client process, where there is a GPU.")
    verbose: bool = option(False, "Show what Flower and Ray log.")

    @property
    def learning_rate(self) -> float:
        """AdamW's learning rate: the one asked for, or a usual one for what is trained."""
        if self.lr is not None:
            return self.lr
        return 1e-4 if self.full else 2e-3

    @property
    def kept_layers(self) -> int:
        """Number of transformer layers to keep, 0 for all."""
        if self.layers is not None:
            return self.layers
        return 3 if self.model == DEFAULT_MODEL else 0

    @property
    def server_rank(self) -> int:
        """LoRA rank of the global adapter: the largest of the clients'."""
        return max(self.ranks) if self.ranks else self.lora_r

    @property
    def glue_folder(self) -> str:
        """The folder of GLUE's TSV files, from the option or the environment; empty: read from the Hub."""
        return self.glue_dir or os.environ.get(GLUE_VARIABLE, "")

    @property
    def needs_hub(self) -> bool:
        """Whether anything asked for has to come from the Hugging Face Hub (or its cache)."""
        remote_model = self.model != DEFAULT_MODEL and not os.path.exists(os.path.expanduser(self.model))
        return remote_model or (not self.glue_folder and any(task in GLUE_TASKS for task in self.task))

    def client_rank(self, partition_id: int) -> int:
        """Return the LoRA rank of a client."""
        return self.ranks[partition_id % len(self.ranks)] if self.ranks else self.lora_r

    def validated(self) -> "Options":
        """Return these options with the client count of `--partition tasks` filled in.

        Raises
        ------
        BadInput
            An option is out of its bounds or contradicts another.
        """
        for message, wrong in self._problems():
            if wrong:
                raise BadInput(message)
        return dataclasses.replace(self, clients=len(self.task)) if self.partition == "tasks" else self

    def _problems(self) -> list[tuple[str, bool]]:
        unknown = [task for task in self.task if task not in TASKS]
        names = [spec.split(":")[0] for spec in self.strategies]
        return [
            (f"--task: unknown task {', '.join(unknown)!r}; choose from {', '.join(TASKS)}", bool(unknown)),
            ("--task: no task given", not self.task),
            ("--task: a task is named twice", len(set(self.task)) < len(self.task)),
            ("--task: several tasks need --partition tasks", len(self.task) > 1 and self.partition != "tasks"),
            ("--partition tasks: needs at least two tasks", self.partition == "tasks" and len(self.task) < 2),
            *_one_of("--partition", self.partition, ("iid", "dirichlet", "natural", "tasks", OWN)),
            (
                "--partition own: the reviews are the same on every machine; choose a --task of GLUE",
                self.partition == OWN and "reviews" in self.task,
            ),
            *_one_of("--pooling", self.pooling, ("auto", "mean", "head")),
            *_one_of("--solver", self.solver, ("svd", "alternating")),
            *_one_of("--scope", self.scope, ("layer", "model")),
            *_at_least("--clients", self.clients, 2),
            *_at_least("--rounds", self.rounds, 1),
            *_at_least("--steps", self.steps, 0),
            *_at_least("--epochs", self.epochs, 1),
            *_at_least("--batch-size", self.batch_size, 1),
            *_at_least("--statistics-batches", self.statistics_batches, 1),
            *_at_least("--max-length", self.max_length, 4),
            *_at_least("--train-examples", self.train_examples, 0),
            *_at_least("--eval-examples", self.eval_examples, 0),
            *_at_least("--validation-examples", self.validation_examples, 0),
            *_at_least("--layers", self.kept_layers, 0),
            *_at_least("--lora-r", self.lora_r, 1),
            *_at_least("--ranks", min(self.ranks, default=1), 1),
            *_at_least("--rank", 1 if self.rank is None else self.rank, 1),
            *_at_least("--processes", self.processes, 0),
            *_at_least("--k", self.k, 0),
            *_at_least("--examples-power", self.examples_power, 0),
            *_at_least("--weight-decay", self.weight_decay, 0),
            *_above_zero("--alpha", self.alpha),
            *_above_zero("--lr", self.learning_rate),
            *_above_zero("--lora-alpha", self.lora_alpha),
            *_above_zero("--server-lr", self.server_lr),
            *_above_zero("--gpus-per-client", self.gpus_per_client),
            (f"--lora-dropout: expected 0 <= dropout < 1, found {self.lora_dropout}", not 0 <= self.lora_dropout < 1),
            (f"--seed: expected 0 to {2**32 - 1}, found {self.seed}", not 0 <= self.seed < 2**32),
            ("--strategies: none given", not self.strategies),
            ("--strategies: one is named twice", len(set(self.strategies)) < len(self.strategies)),
            (
                "--ranks, --rslora and --dora are LoRA's: they don't go with --full",
                self.full and (bool(self.ranks) or self.rslora or self.dora),
            ),
            (
                f"--rank {self.rank}: above the adapter's own rank {self.server_rank}",
                not self.full and self.rank is not None and self.rank > self.server_rank,
            ),
            (
                "--strategies fedavg: Flower's FedAvg can't average adapters of different ranks (--ranks); "
                "use --strategies from,average",
                "fedavg" in names and len(set(self.ranks)) > 1,
            ),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain JSON types."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}

    def to_record(self) -> "ConfigRecord":
        """Return the Flower configuration that carries these options to a client."""
        from flwr.app import ConfigRecord

        return ConfigRecord({RECORD_KEY: json.dumps(self.to_dict(), sort_keys=True)})

    @classmethod
    def from_record(cls, record: "ConfigRecord") -> "Options":
        """Return the options that `to_record` wrote."""
        return cls.from_mapping(json.loads(str(record[RECORD_KEY])))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "Options":
        """Return options from names and values, as typed on a command line or in `[tool.flwr.app.config]`.

        Parameters
        ----------
        values : Mapping[str, Any]
            Names with dashes or underscores; lists as lists or comma-separated text; None keeps the default.

        Raises
        ------
        BadInput
            A name is unknown, or a value is not of the option's type.
        """
        return read(cls, values)


def read(kind: type[T], values: Mapping[str, Any]) -> T:
    """Return a dataclass of options from names and values, as `Options.from_mapping` does."""
    hints = typing.get_type_hints(kind)
    given = {name.replace("-", "_"): value for name, value in values.items() if value is not None}
    for name in given:
        if name not in hints:
            raise BadInput(f"unknown option {name!r}")
    return kind(**{name: _converted(name, value, hints[name]) for name, value in given.items()})


def like(name: str, default: Any = None) -> Any:
    """Declare the option of that name that a simulation has, for a study: its help, and its default or another."""
    found = Options.__dataclass_fields__[name]
    return option(found.default if default is None else default, found.metadata["help"])


def _converted(name: str, value: Any, kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
        if value == "":
            return None
    try:
        if typing.get_origin(kind) is tuple:
            items = value.split(",") if isinstance(value, str) else value
            return tuple(typing.get_args(kind)[0](item) for item in items if item != "")
        if kind is bool and isinstance(value, str):
            return {"true": True, "false": False}[value.lower()]
        if kind is int and isinstance(value, float) and value != int(value):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError, KeyError, OverflowError):
        raise BadInput(f"--{name.replace('_', '-')}: can't read {value!r}") from None


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> list[tuple[str, bool]]:
    return [(f"{name}: expected one of {', '.join(choices)}, found {value!r}", value not in choices)]


def _at_least(name: str, value: float, bound: float) -> list[tuple[str, bool]]:
    # Written so that a NaN is refused too.
    return [(f"{name}: expected {bound} or more, found {value}", not value >= bound)]


def _above_zero(name: str, value: float) -> list[tuple[str, bool]]:
    return [(f"{name}: expected a positive number, found {value}", not 0 < value < float("inf"))]
