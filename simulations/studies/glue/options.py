"""The study's options, and its tasks."""

from dataclasses import dataclass
from typing import Any

from simulations.fields import check_bounds, option
from simulations.options import Options, like, shared

SUITES = {
    "glue": ("sst2", "qnli", "mnli", "qqp", "stsb", "cola", "mrpc"),
    "nli": ("snli", "mnli", "sick", "qnli"),  # all under heads of three classes, as in KnOTS' experiments
}
SMALL = ("mrpc", "sick")  # trained for --small-epochs
TARGETS = ("query", "key", "value", "attention.output.dense")
GATE = 0.10  # a task counts where its own model is this far above a constant answer on the reported rows
DESIGN = 0  # the seed that scales and rows are chosen on; the others confirm
QUICK: dict[str, Any] = {
    "layers": 1,
    "train_examples": 256,
    "epochs": 1,
    "small_epochs": 1,
    "tuning_examples": 60,
    "first_examples": 20,
    "reported_examples": 100,
    "seeds": 2,
    "scales": 4,
}


@dataclass(frozen=True)
class GlueOptions:
    """The study's options. All of them but the folders, `seeds` and `processes` change results."""

    suite: str = option("glue", f"The tasks: {', '.join(SUITES)}.", choices=tuple(SUITES))
    out: str = option("", "Folder of tables, pictures and, in work, finished cells. [default: results/SUITE]")
    cache: str = option("~/.cache/fedfrom/glue", "Folder of the trained models; each is trained once.")
    glue_dir: str = like("glue_dir")
    model: str = like("model")
    layers: int | None = like("layers", 0)
    lora_r: int = like("lora_r", 16)
    lora_alpha: float = like("lora_alpha", 32.0)
    lr: float | None = like("lr", 1e-3)
    batch_size: int = like("batch_size", 32)
    group_by_length: bool = like("group_by_length", True)
    precision: str = like("precision", "bfloat16")
    epochs: int = like("epochs", 2)
    small_epochs: int = option(5, f"Passes over the data of {', '.join(SMALL)}, the smallest tasks.", least=1)
    max_length: int = like("max_length", 64)
    train_examples: int = like("train_examples", 8000)
    tuning_examples: int = option(300, "Training examples of a task, held out, by which scales are chosen.", least=4)
    first_examples: int = option(100, "Of these, the first, on which every scale is tried.", least=2)
    reported_examples: int = option(
        1500, "Examples of a task's dev set, at most, on which results are reported.", least=4
    )
    scales: int = option(
        9, "Scales from 0.25 to 4 that are tried; the better half goes on to all tuning examples.", least=2
    )
    seeds: int = option(6, "Seeds 0, 1, ...: seed 0 is the design's, the others confirm.", least=1)
    processes: int = like("processes", 1)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The suite's tasks."""
        return SUITES[self.suite]

    def simulation(self, task: str, seed: int) -> Options:
        """Return the options of one task's training, checked.

        Raises
        ------
        BadInput
            An option is out of its bounds.
        """
        check_bounds(self)
        own = {
            "task": (task,),
            "partition": "iid",
            "steps": 0,
            "epochs": self.small_epochs if task in SMALL else self.epochs,
            "lora_targets": TARGETS,
            "seed": seed,
        }
        return Options(**{**shared(self), "processes": 0, **own}).validated()

    def settings(self) -> dict[str, Any]:
        """Return the settings that results depend on, beside the study's name, which is the suite, and its seeds."""
        check_bounds(self)
        return {
            name: value
            for name, value in vars(self).items()
            if name not in ("suite", "out", "cache", "glue_dir", "seeds", "processes")
        }
