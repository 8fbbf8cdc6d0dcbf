"""Every option of the study with its default and bounds."""

from dataclasses import dataclass
from typing import Any

from fedfrom.errors import BadInput
from simulations.fields import as_json, check_bounds, option
from simulations.options import Options, like, shared

TASKS = ("qnli", "rte", "wnli")
BASE_TASK = "mnli"
CHECKPOINTS_OF = "qnli"  # the task with most examples: three of its checkpoints are merged
CHECKPOINTS = (0.6, 0.8, 1.0)  # of its steps
KINDS = ("lora", "full")
CANDIDATES = 6


# Minutes instead of an hour: every row, table and picture, but the scores mean nothing.
QUICK: dict[str, Any] = {
    "layers": 1,
    "seeds": 2,
    "base_steps": 20,
    "steps": (15, 10, 5),
    "validation_examples": 40,
    "reported_examples": 60,
    "candidates": 2,
    "statistics_batches": 1,
}


@dataclass(frozen=True)
class PaperOptions:
    """The study's options. All of them but the folders and `processes` change results."""

    out: str = option("results/paper", "Folder of tables and pictures, and in work of all that is kept.")
    glue_dir: str = like("glue_dir")
    model: str = like("model")
    layers: int | None = like("layers")
    pooling: str = like("pooling")
    apart: bool = option(True, "Encode the two sentences apart where the model pools by the mean.")
    kinds: tuple[str, ...] = option(KINDS, "lora (adapters), full (weights), or both.", choices=KINDS)
    seeds: int = option(3, "Seeds of training: 0, 1, ...", least=1)
    base_steps: int = option(160, "Steps of the base model on MNLI.", least=1)
    steps: tuple[int, ...] = option((100, 60, 20), "Steps on QNLI, RTE, WNLI.", least=1)
    batch_size: int = like("batch_size")
    max_length: int = like("max_length", 48)
    lora_r: int = like("lora_r", 16)
    lora_alpha: float = like("lora_alpha", 32.0)
    lora_lr: float = option(2e-3, "Learning rate of adapters.")
    full_lr: float = option(3e-4, "Learning rate of full fine-tuning, and of the base.")
    embeddings: bool = option(False, "Train the word embeddings too, if full.")
    validation_examples: int = option(80, "Of a task's dev, to choose by, at most.", least=1)
    reported_examples: int = option(200, "Of a task's dev, to report, at most.", least=1)
    candidates: int = option(CANDIDATES, "Settings tried for each method.", least=1, most=CANDIDATES)
    statistics_batches: int = like("statistics_batches", 4)
    precision: str = like("precision", "bfloat16")
    processes: int = option(0, "Processes at a time, 0: one a core.")

    def checked(self) -> "PaperOptions":
        """Return these options.

        Raises
        ------
        BadInput
            An option is out of its bounds.
        """
        check_bounds(self)
        if not self.kinds:
            raise BadInput(f"--kinds: expected some of {', '.join(KINDS)}, found none")
        if len(self.steps) != len(TASKS):
            raise BadInput(f"--steps: expected {len(TASKS)} numbers, one for each of {', '.join(TASKS)}")
        self.simulation("lora", 0).validated()
        return self

    def simulation(self, kind: str, seed: int, steps: int | None = None) -> Options:
        """Return the simulation's options for one training: of the base model ("base") or of a task ("lora", "full").

        Parameters
        ----------
        kind : str
            Kind of the training.
        seed : int
            Seed of initial weights, batches and dropout.
        steps : int | None (default: None)
            Optimiser steps; None is the base model's.
        """
        adapter = kind == "lora"
        own = {
            "task": TASKS,
            "partition": "tasks",
            "eval_examples": 0,
            "validation_examples": 0,
            "full": not adapter,
            "steps": steps or self.base_steps,
            "lr": self.lora_lr if adapter else self.full_lr,
            "seed": seed,
        }
        return Options(**{**shared(self), **own})

    def task_steps(self, task: str) -> int:
        """Return the optimiser steps of a task, or of all of them pooled."""
        return sum(self.steps) if task == "pooled" else self.steps[TASKS.index(task)]

    def settings(self) -> dict[str, Any]:
        """Return the settings that results depend on, as plain JSON types."""
        return {name: v for name, v in as_json(self).items() if name not in ("out", "glue_dir", "processes")}
