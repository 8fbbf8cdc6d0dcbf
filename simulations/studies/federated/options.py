"""The study's options."""

from dataclasses import dataclass
from typing import Any

from simulations.fields import check_bounds, option
from simulations.options import Options, like, shared

TASK = "sst2"
QUICK: dict[str, Any] = {
    "rounds": 2,
    "steps": 2,
    "layers": 1,
    "train_examples": 600,
    "eval_examples": 100,
    "validation_examples": 50,
    "grid_seeds": 1,
    "seeds": 2,
}


@dataclass(frozen=True)
class FederatedOptions:
    """The study's options. All of them but the folders, `processes` and `verbose` change results."""

    out: str = option("results/federated", "Folder of the tables, the pictures and, in work, the results kept.")
    glue_dir: str = like("glue_dir")
    rounds: int = like("rounds", 10)
    steps: int = like("steps", 6)
    batch_size: int = like("batch_size", 8)
    clients: int = like("clients", 6)
    model: str = like("model")
    layers: int | None = like("layers")
    train_examples: int = like("train_examples")
    eval_examples: int = like("eval_examples", 400)
    validation_examples: int = like("validation_examples", 200)
    max_length: int = like("max_length", 48)
    grid_seeds: int = option(3, "Seeds of the grid of p and k: 0, 1, ...", least=1)
    seeds: int = option(5, "Seeds of the comparison: those that follow.", least=1)
    target: float = option(0.7, "Accuracy whose first round is reported.")
    processes: int = like("processes")
    verbose: bool = option(False, "Show every round.")

    def simulation(self, **more: Any) -> Options:
        """Return the options of one of its simulations, checked.

        Raises
        ------
        BadInput
            An option is out of its bounds.
        """
        check_bounds(self)
        return Options(**{**shared(self), "task": (TASK,), **more}).validated()

    def settings(self) -> dict[str, Any]:
        """Return the settings that results depend on."""
        values = self.simulation().to_dict()
        for name in ("strategies", "seed", "out", "glue_dir", "partition", "alpha", "processes", "verbose"):
            del values[name]
        return {**values, "grid-seeds": self.grid_seeds}
