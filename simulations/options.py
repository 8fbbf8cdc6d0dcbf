"""Every option of a simulation with its default and bounds, and how the options are sent.

One frozen object holds all options. The server sends it to the clients as JSON inside the train and evaluate
configuration (`run_simulation` has an empty run configuration). `flwr run` fills it from `[tool.flwr.app.config]`.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedfrom.errors import BadInput
from simulations.fields import as_json, check_bounds, option, read

if TYPE_CHECKING:
    from flwr.app import ConfigRecord

GLUE_TASKS = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")
NLI_TASKS = ("snli", "sick")  # read from files named as GLUE's are
TASKS = ("reviews", *GLUE_TASKS, *NLI_TASKS)
DEFAULT_MODEL = "minilm"
GLUE_VARIABLE = "FEDFROM_GLUE_DIR"
RECORD_KEY = "options"
ABOUT = "simulation"  # a reply's record of which client trained, and how fast; no strategy aggregates it
OWN = "own"  # the partition of a deployment: each site's folder holds that site's share
PARTITIONS = ("iid", "dirichlet", "natural", "tasks", OWN)


@dataclass(frozen=True)
class Options:
    """The options of a simulation. `validated()` checks all bounds that need no file or library."""

    strategies: tuple[str, ...] = option(
        ("from", "fedavg"),
        "Strategies, run one after the other: fedavg, from, or any of fedfrom's methods by name; "
        "settings of one strategy follow a colon (from:k=1:examples_power=0).",
    )
    task: tuple[str, ...] = option(
        ("reviews",), f"One of {', '.join(TASKS)}; several for --partition tasks.", choices=TASKS
    )
    glue_dir: str = option(
        "", f"Folder with GLUE's TSV files, SNLI and SICK beside them (or set {GLUE_VARIABLE}); empty: the Hub."
    )
    train_examples: int = option(0, "Use at most this many training examples of a task, 0: all.", least=0)
    eval_examples: int = option(1000, "Use at most this many held-out examples of a task, 0: all.", least=0)
    validation_examples: int = option(
        0, "Held-out examples that k=auto, coefficient=auto and greedy-soup choose by, in no score.", least=0
    )

    partition: str = option(
        "dirichlet",
        "iid, dirichlet (over labels), natural (by a column), tasks (one a client) or, in a deployment alone, own "
        "(each site's data folder is its share).",
        choices=PARTITIONS,
    )
    alpha: float = option(2.0, "Concentration of the Dirichlet partition; smaller is more uneven.", above=0)
    partition_by: str = option("", "Column of the natural partition; empty: the task's own (reviews: movie).")
    clients: int = option(4, "Number of clients.", least=2)

    model: str = option(DEFAULT_MODEL, "minilm (all-MiniLM-L6-v2 from its package), a folder, or a Hub name.")
    layers: int | None = option(
        None, "Keep this many transformer layers, 0: all. [default: 3 for minilm, else all]", least=0
    )
    pooling: str = option(
        "auto",
        "mean (of the token vectors), head (the model's own) or auto (by the model).",
        choices=("auto", "mean", "head"),
    )
    full: bool = option(False, "Fine-tune the full model instead of a LoRA adapter.")
    lora_r: int = option(8, "Rank of the LoRA adapter.", least=1)
    lora_alpha: float = option(16.0, "LoRA's alpha; the scaling is alpha / r, or alpha / sqrt(r) with rsLoRA.", above=0)
    lora_dropout: float = option(0.0, "Dropout before LoRA's A.")
    lora_targets: tuple[str, ...] = option((), "Modules that LoRA adapts; empty: PEFT's choice for the model.")
    rslora: bool = option(False, "Scale by alpha / sqrt(r).")
    dora: bool = option(False, "Weight-decomposed LoRA.")
    ranks: tuple[int, ...] = option(
        (), "A rank for each client, repeated as needed; the server holds the largest.", least=1
    )

    rounds: int = option(4, "Federated rounds.", least=1)
    steps: int = option(16, "Optimiser steps of a client in a round, 0: --epochs passes over its data.", least=0)
    epochs: int = option(1, "Passes over the client's data in a round where --steps is 0.", least=1)
    batch_size: int = option(16, "Examples in a training step.", least=1)
    lr: float | None = option(None, "Learning rate of AdamW. [default: 2e-3 for LoRA, 1e-4 for --full]", above=0)
    weight_decay: float = option(0.01, "Weight decay of AdamW.", least=0)
    group_by_length: bool = option(False, "Make training batches of examples of like length: less padding, faster.")
    precision: str = option(
        "auto",
        "Of the model's arithmetic; weights stay float32. bfloat16 is faster where the CPU has AVX512-BF16; "
        "auto is float32 on a CPU, bfloat16 on a GPU.",
        choices=("auto", "float32", "bfloat16"),
    )
    max_length: int = option(64, "Longest input, in tokens; the rest is cut off.", least=4)
    statistics_batches: int = option(8, "Batches that a client's statistics are of (regmean, lorm, fisher).", least=1)

    k: float = option(0.5, "FroM: power of the Frobenius norm in the weights (inf: the largest alone).")
    examples_power: float = option(0.5, "FroM: power of a client's number of examples in the weights.", least=0)
    solver: str = option(
        "svd", "FroM: svd (exact) or alternating (the paper's Algorithm 1).", choices=("svd", "alternating")
    )
    scope: str = option(
        "layer", "FroM: one weight a client for each layer, or for the whole model.", choices=("layer", "model")
    )
    rank: int | None = option(
        None, "FroM: largest rank of the merged product. [default: what the clients hold]", least=1
    )
    server_lr: float = option(1.0, "Share of the merged update that the server applies (all but fedavg).", above=0)

    seed: int = option(0, "Fixes partition, initial weights, batches and dropout.", least=0, most=2**32 - 1)
    eval_every: int = option(1, "Score the global model after every so many rounds, and after the last.", least=1)
    federated_evaluation: bool = option(False, "Also evaluate on a tenth of each client's data, kept out of training.")
    target: float | None = option(None, "Score whose first round is reported. [default: 0.08 above a constant answer]")
    save_clients: bool = option(False, "Also save each client's adapter of the last round, in STRATEGY-clients.")
    out: str = option("results/simulation", "Results folder; an earlier result in it is replaced at the end.")
    engine: str = option(
        "local",
        "local (processes of this machine, or its GPU) or ray (Flower's own simulation engine): the same results.",
        choices=("local", "ray"),
    )
    processes: int = option(0, "Client processes at a time, 0: one a core.", least=0)
    client_timeout: float = option(
        3600.0, "Seconds after which the local engine ends a client's process (none on a GPU).", above=0
    )
    gpus_per_client: float = option(0.5, "Share of a GPU for a client process of Ray's, where there is a GPU.", above=0)
    verbose: bool = option(False, "Show what Flower and Ray log.")

    @property
    def learning_rate(self) -> float:
        """AdamW's learning rate: `--lr`, or the default for LoRA or full fine-tuning."""
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
        """Whether the model or a task comes from the Hugging Face Hub (or its cache)."""
        remote_model = self.model != DEFAULT_MODEL and not os.path.exists(os.path.expanduser(self.model))
        return remote_model or (not self.glue_folder and any(task != "reviews" for task in self.task))

    def client_rank(self, partition_id: int) -> int:
        """Return the LoRA rank of a client."""
        return self.ranks[partition_id % len(self.ranks)] if self.ranks else self.lora_r

    def validated(self) -> "Options":
        """Return these options with the client count of `--partition tasks` filled in.

        Raises
        ------
        BadInput
            An option is out of its bounds, or two options contradict each other.
        """
        check_bounds(self)
        for message, wrong in self._contradictions():
            if wrong:
                raise BadInput(message)
        return dataclasses.replace(self, clients=len(self.task)) if self.partition == "tasks" else self

    def _contradictions(self) -> list[tuple[str, bool]]:
        names = [spec.split(":")[0] for spec in self.strategies]
        return [
            ("--k: expected a number (inf included, -inf not)", not self.k > -math.inf),  # NaN is refused too
            ("--task: no task given", not self.task),
            ("--task: a task is named twice", len(set(self.task)) < len(self.task)),
            ("--task: several tasks need --partition tasks", len(self.task) > 1 and self.partition != "tasks"),
            ("--partition tasks: needs at least two tasks", self.partition == "tasks" and len(self.task) < 2),
            (
                "--partition own: the reviews are the same on every machine; choose a --task of GLUE",
                self.partition == OWN and "reviews" in self.task,
            ),
            (f"--lora-dropout: expected 0 <= dropout < 1, found {self.lora_dropout}", not 0 <= self.lora_dropout < 1),
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
        return as_json(self)

    def to_record(self) -> "ConfigRecord":
        """Return the Flower configuration that carries these options to a client."""
        from flwr.app import ConfigRecord

        return ConfigRecord({RECORD_KEY: json.dumps(self.to_dict(), sort_keys=True)})

    @classmethod
    def from_record(cls, record: "ConfigRecord") -> "Options":
        """Return the options of a record from `to_record`."""
        return cls.from_mapping(json.loads(str(record[RECORD_KEY])))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "Options":
        """Return options from names and values, as a command line or `[tool.flwr.app.config]` has them.

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


def like(name: str, default: Any = None) -> Any:
    """Declare a study's option like the simulation's of that name: its help, its bounds, and its default or another."""
    found = Options.__dataclass_fields__[name]
    return dataclasses.field(default=found.default if default is None else default, metadata=found.metadata)


def shared(study: Any) -> dict[str, Any]:
    """Return the options of a study that a simulation has as well, by name, except for the results folder."""
    return {
        name: value for name, value in vars(study).items() if name in Options.__dataclass_fields__ and name != "out"
    }
