"""Every option of the experiment, its default and its bounds."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from simulations.errors import BadInput
from simulations.options import Options

TASKS = ("qnli", "rte", "wnli")
BASE_TASK = "mnli"
CHECKPOINTS_OF = "qnli"  # the task with most examples: three of its checkpoints are merged
CHECKPOINTS = (0.6, 0.8, 1.0)  # of its steps
KINDS = ("lora", "full")
PRECISIONS = ("auto", "float32", "bfloat16")
CANDIDATES = 6


@dataclass(frozen=True)
class PaperOptions:
    """What is trained, merged and evaluated; all of it but the folder and `processes` changes results."""

    model: str = "minilm"
    layers: int | None = None
    pooling: str = "auto"
    apart: bool = True
    glue_dir: str = ""
    kinds: tuple[str, ...] = KINDS
    seeds: int = 3
    base_steps: int = 160
    steps: tuple[int, ...] = (100, 60, 20)
    batch_size: int = 16
    max_length: int = 48
    lora_r: int = 16
    lora_alpha: float = 32.0
    lora_lr: float = 2e-3
    full_lr: float = 3e-4
    embeddings: bool = False
    validation_examples: int = 80
    reported_examples: int = 200
    candidates: int = CANDIDATES
    statistics_batches: int = 4
    precision: str = "auto"
    processes: int = 0

    def checked(self) -> "PaperOptions":
        """Return these options.

        Raises
        ------
        BadInput
            An option is out of its bounds.
        """
        problems = [
            (f"--kinds: expected some of {', '.join(KINDS)}", not self.kinds or bool(set(self.kinds) - set(KINDS))),
            (f"--steps: expected {len(TASKS)} numbers, one for each of {', '.join(TASKS)}", self._steps_wrong()),
            (f"--candidates: expected 1 to {CANDIDATES}, found {self.candidates}", not 1 <= self.candidates <= 6),
            (f"--precision: expected one of {', '.join(PRECISIONS)}", self.precision not in PRECISIONS),
        ]
        for name in ("seeds", "base_steps", "lora_r", "validation_examples", "reported_examples"):
            value = getattr(self, name)
            problems.append((f"--{name.replace('_', '-')}: expected 1 or more, found {value}", value < 1))
        for message, wrong in problems:
            if wrong:
                raise BadInput(message)
        self.simulation("lora", 0).validated()
        return self

    def _steps_wrong(self) -> bool:
        return len(self.steps) != len(TASKS) or min(self.steps) < 1

    def simulation(self, kind: str, seed: int, steps: int | None = None) -> Options:
        """Return the simulation's options for one training: of the base model ("base") or of a task ("lora", "full").

        Parameters
        ----------
        kind : str
            What is trained.
        seed : int
            Of initial weights, batches and dropout.
        steps : int | None (default: None)
            Optimiser steps; None is the base model's.
        """
        return Options(
            task=TASKS,
            partition="tasks",
            glue_dir=self.glue_dir,
            eval_examples=0,
            model=self.model,
            layers=self.layers,
            pooling=self.pooling,
            full=kind != "lora",
            lora_r=self.lora_r,
            lora_alpha=self.lora_alpha,
            steps=steps or self.base_steps,
            batch_size=self.batch_size,
            lr=self.lora_lr if kind == "lora" else self.full_lr,
            max_length=self.max_length,
            statistics_batches=self.statistics_batches,
            seed=seed,
        )

    def task_steps(self, task: str) -> int:
        """Return the optimiser steps of a task, or of all of them pooled."""
        return sum(self.steps) if task == "pooled" else self.steps[TASKS.index(task)]

    def settings(self) -> dict[str, Any]:
        """Return what results depend on, as plain JSON types."""
        values = dataclasses.asdict(self)
        for name in ("glue_dir", "processes"):
            del values[name]
        return {**values, "kinds": list(self.kinds), "steps": list(self.steps)}
