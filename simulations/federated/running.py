"""Runs the pieces of the plan that are not on disk yet: one Flower simulation for all strategies of one seed."""

import dataclasses
import itertools
import os
import re
from typing import Any

from rich.console import Console

from simulations.federated.plan import BEST, GRID, POWERS, ROWS, SETTINGS, Piece, Plan, accuracy, from_spec
from simulations.study import Study


def run(plan: Plan, study: Study) -> None:
    """Run all that is missing, the grid before the comparison that needs its best."""
    pieces = {piece.name: piece for piece in plan.pieces()}
    for part in ("grid", "comparison"):
        missing = [pieces[name] for name in study.missing() if pieces[name].part == part]
        specs = {piece.name: without_idle_powers(piece.setting, spec_of(piece, plan, study)) for piece in missing}
        for (setting, seed), group in itertools.groupby(missing, key=lambda piece: (piece.setting, piece.seed)):
            _run_group(plan, study, setting, seed, [(piece, specs[piece.name]) for piece in group])


def spec_of(piece: Piece, plan: Plan, study: Study) -> str:
    """Return the strategy of a piece, as `--strategies` takes it."""
    if piece.part == "grid":
        return piece.label
    return best(plan, study) if piece.label == BEST else ROWS[piece.label]


def without_idle_powers(setting: str, spec: str) -> str:
    """Return the spec with p = 0 where all clients hold equally much: rows that differ in p alone are run once."""
    return re.sub(r":examples_power=[0-9.]+", ":examples_power=0", spec) if setting == "equal" else spec


def best(plan: Plan, study: Study) -> str:
    """Return the strategy of the grid with the best accuracy, the mean over seeds and over both kinds of clients."""

    def score(k: float, p: float) -> float:
        found = []
        for setting in SETTINGS:
            # p is none of the grid's where it changes nothing
            label = from_spec(k, p if (k, p) in GRID[setting] else 0)
            results = [study.get(Piece("grid", setting, seed, label).name) for seed in plan.grid_seeds]
            found.append(sum(accuracy(result) for result in results if result) / len(results))
        return sum(found) / len(found)

    return from_spec(*max(itertools.product(POWERS, POWERS), key=lambda powers: score(*powers)))


def _run_group(plan: Plan, study: Study, setting: str, seed: int, pieces: list[tuple[Piece, str]]) -> None:
    from simulations.experiment import Experiment
    from simulations.narration import Narrator
    from simulations.running import quiet, simulate

    specs = list(dict.fromkeys(spec for _, spec in pieces))
    options = dataclasses.replace(plan.options, **SETTINGS[setting], seed=seed, strategies=tuple(specs))
    study.say(f"{setting} clients, seed {seed}: {', '.join(specs)}")
    with open(os.devnull, "w", encoding="utf-8") as nowhere, quiet(options.verbose):
        narrator = Narrator(None if options.verbose else Console(file=nowhere))

        def finished(history: Any) -> None:
            for piece, spec in pieces:
                if spec == history.label:
                    study.put(piece.name, {"spec": spec, **result_of(history)})

        simulate(Experiment.prepare(options), narrator, finished)


def result_of(history: Any) -> dict[str, Any]:
    """Return what is kept of a strategy's history, by round, the initial model's first."""
    rounds = history.rounds
    trained = rounds[1:]
    return {
        "accuracy": history.curve,
        "loss": [entry.scores["loss"] for entry in rounds],
        "bytes-up": history.total("bytes_up"),
        "bytes-down": history.total("bytes_down"),
        "seconds": history.total("seconds"),
        "server-seconds": history.total("server_seconds"),
        "distance-from-mean": [entry.distance_from_mean for entry in trained],
        **{
            name: [entry.train_metrics.get(name) for entry in trained]
            for name in ("lambda-max", "interference", "weight-max", "k")
        },
    }
