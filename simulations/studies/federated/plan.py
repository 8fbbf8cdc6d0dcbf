"""The study's cells: the grid of p and k on some seeds, and a comparison on others, for two kinds of clients."""

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
from rich.console import Console

from simulations.studies.federated.options import TASK, FederatedOptions
from simulations.studies.study import Cell, Done, Row, Study

# p has no effect on clients of equal size: there the grid is k alone.
SETTINGS: Mapping[str, dict[str, Any]] = {
    "dirichlet": {"partition": "dirichlet", "alpha": 0.5},
    "equal": {"partition": "iid"},
}
POWERS = (0, 0.5, 1)
MEASURED = ("lambda-max", "interference", "weight-max", "k")  # in each merge
LAST = 3  # final accuracy is the mean of the last three rounds', which varies less than one round's


def from_spec(k: float | str, examples_power: float) -> str:
    """Return the `--strategies` spec of FedFroM with these powers, without clip and examples_cap."""
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
    BEST: "",  # known after the grid
    "k=auto": from_spec("auto", 0.5),
}
BASELINE = "FedAvg on factors"
SAME = "√n average of products"  # equals the average of products on clients of equal size


def rows(setting: str) -> list[str]:
    """Return the comparison's rows for one kind of clients."""
    return [row for row in ROWS if not (setting == "equal" and row == SAME)]


def study(options: FederatedOptions) -> Study:
    """Return the study: the grid on the first seeds, the comparison on the seeds that follow."""
    grid_seeds = tuple(range(options.grid_seeds))
    seeds = tuple(range(options.grid_seeds, options.grid_seeds + options.seeds))
    grid = [
        Cell("grid", setting, seed, from_spec(k, p), group=f"grid {setting} {seed}")
        for setting in SETTINGS
        for seed in grid_seeds
        for k, p in GRID[setting]
    ]
    needs = tuple(cell.name for cell in grid)
    comparison = [
        Cell("comparison", setting, seed, row, needs, group=f"comparison {setting} {seed}")
        for setting in SETTINGS
        for seed in seeds
        for row in rows(setting)
    ]
    return Study(
        "federated",
        (*grid_seeds, *seeds),
        tuple(SETTINGS),
        tuple(ROWS),
        (TASK,),
        options.settings(),
        (*grid, *comparison),
        partial(_run, options),
    )


def final(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the final accuracy, the mean of the last rounds', with a row for each part, kind, method and seed.

    Parameters
    ----------
    rows : pd.DataFrame
        The study's frame, with a row for each round. Round 0 is the untrained model.
    """
    trained = rows[(rows["round"] > 0) & (rows["round"] > rows["round"].max() - LAST)]
    return trained.groupby(["part", "kind", "method", "seed"], sort=False)["score"].mean().reset_index()


def best(rows: pd.DataFrame) -> str:
    """Return the grid's strategy with the best final accuracy, mean over seeds and over both kinds of clients."""
    found = final(rows[rows["part"] == "grid"]).groupby(["kind", "method"])["score"].mean()

    def score(k: float, p: float) -> float:
        # the grid of clients of equal size has p = 0 alone
        labels = {setting: from_spec(k, p if (k, p) in GRID[setting] else 0) for setting in SETTINGS}
        return sum(found[setting, label] for setting, label in labels.items())

    return from_spec(*max(itertools.product(POWERS, POWERS), key=lambda powers: score(*powers)))


def without_idle_powers(setting: str, spec: str) -> str:
    """Return the spec with p = 0 for clients of equal size: there, rows that differ in p alone are run once."""
    return re.sub(r":examples_power=[0-9.]+", ":examples_power=0", spec) if setting == "equal" else spec


def spec_of(cell: Cell, known: pd.DataFrame) -> str:
    """Return the `--strategies` spec of a cell; `known` has the grid's rows, from which the best follows."""
    spec = cell.method if cell.part == "grid" else best(known) if cell.method == BEST else ROWS[cell.method]
    return without_idle_powers(cell.kind, spec)


def _run(options: FederatedOptions, cells: Sequence[Cell], known: pd.DataFrame) -> Iterator[Done]:
    """Run one Flower simulation of all strategies for one kind of clients and one seed; equal specs run once."""
    from simulations.experiment import Experiment
    from simulations.narration import Narrator
    from simulations.running import quiet, simulate

    specs = {cell: spec_of(cell, known) for cell in cells}
    setting, seed = cells[0].kind, cells[0].seed
    simulation = options.simulation(**SETTINGS[setting], seed=seed, strategies=tuple(dict.fromkeys(specs.values())))
    found: list[Done] = []
    with open(os.devnull, "w", encoding="utf-8") as nowhere, quiet(options.verbose):
        narrator = Narrator(None if options.verbose else Console(file=nowhere))

        def finished(history: Any) -> None:
            rows = rows_of(history, simulation.eval_examples)
            found.extend(Done(cell, rows) for cell, spec in specs.items() if spec == history.label)

        simulate(Experiment.prepare(simulation), narrator, finished)
    yield from found


def rows_of(history: Any, examples: int) -> list[Row]:
    """Return a row for each scored round of a strategy's history, from the initial model's on."""
    return [
        {
            "setting": history.label,
            "task": TASK,
            "split": "held-out",
            "round": entry.number,
            "n": examples,
            "score": entry.scores["score"],
            "loss": entry.scores["loss"],
            "seconds": entry.seconds,
            "server_seconds": entry.server_seconds,
            "bytes_up": entry.bytes_up,
            "bytes_down": entry.bytes_down,
            "distance_from_mean": entry.distance_from_mean,
            **{name.replace("-", "_"): entry.train_metrics.get(name) for name in MEASURED},
        }
        for entry in history.scored
    ]
