"""What is run: two kinds of clients, the grid of p and k on some seeds, and a comparison on others."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedfrom.pages.runs import folder_name
from simulations.options import Options

# p changes nothing where all clients hold equally much, so that the grid is k alone there.
SETTINGS: Mapping[str, dict[str, Any]] = {
    "dirichlet": {"partition": "dirichlet", "alpha": 0.5},
    "equal": {"partition": "iid"},
}
POWERS = (0, 0.5, 1)
TASK = "sst2"
LAST = 3  # the accuracy that strategies are compared by is the mean of so many last rounds', to be less of chance


def from_spec(k: float | str, examples_power: float) -> str:
    """Return FedFroM with these powers alone, no update clipped and no count capped, as `--strategies` takes it."""
    power = k if isinstance(k, str) else f"{k:g}"
    return f"from:k={power}:examples_power={examples_power:g}:clip=none:examples_cap=none"


GRID = {setting: [(k, p) for p in (POWERS if setting == "dirichlet" else (0,)) for k in POWERS] for setting in SETTINGS}
BEST = "best of the grid"
DEFAULT = "FedFroM's defaults"
ROWS: Mapping[str, str] = {
    "FedAvg on factors": "fedavg",
    "average of products": from_spec(0, 1),
    "√n average of products": from_spec(0, 0.5),
    "the paper's FroM": from_spec(1, 0),
    "p = k = ½": from_spec(0.5, 0.5),
    DEFAULT: "from",  # p = k = ½ with clip and examples_cap
    BEST: "",  # known when the grid is done
    "k=auto": from_spec("auto", 0.5),
}
BASELINE = "FedAvg on factors"
SAME = "√n average of products"  # the average where all clients hold equally much


def rows(setting: str) -> list[str]:
    """Return the comparison's rows on one kind of clients."""
    return [row for row in ROWS if not (setting == "equal" and row == SAME)]


@dataclass(frozen=True)
class Piece:
    """One strategy on one kind of clients and one seed."""

    part: str  # "grid" or "comparison"
    setting: str
    seed: int
    label: str  # a spec in the grid, a row of the comparison

    @property
    def name(self) -> str:
        """Its file name."""
        return f"{self.part}-{self.setting}-{self.seed}-{folder_name(self.label)}"


@dataclass(frozen=True)
class Plan:
    """All that is run, and with which options.

    Parameters
    ----------
    options : Options
        What is common to all runs.
    grid_seeds, seeds : tuple[int, ...]
        Of the grid, and of the comparison; no seed in both, so that the comparison is not what was chosen on.
    """

    options: Options
    grid_seeds: tuple[int, ...]
    seeds: tuple[int, ...]

    def pieces(self) -> list[Piece]:
        """Return all pieces, the grid's first."""
        grid = [
            Piece("grid", setting, seed, from_spec(k, p))
            for setting in SETTINGS
            for seed in self.grid_seeds
            for k, p in GRID[setting]
        ]
        return grid + [
            Piece("comparison", setting, seed, row)
            for setting in SETTINGS
            for seed in self.seeds
            for row in rows(setting)
        ]

    def settings(self) -> dict[str, Any]:
        """Return whatever the results depend on."""
        values = self.options.to_dict()
        for name in ("strategies", "seed", "out", "glue_dir", "partition", "alpha", "processes", "verbose"):
            del values[name]
        return {"options": values, "grid-seeds": list(self.grid_seeds), "seeds": list(self.seeds)}


def accuracy(result: Mapping[str, Any]) -> float:
    """Return the accuracy that a finished piece is compared by."""
    curve: list[float] = result["accuracy"][1:][-LAST:]
    return sum(curve) / len(curve)
