"""The study's cells: each task's own model of each seed, and each method's merges of the seed's bodies."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import pandas as pd
from torch import Tensor

import fedfrom
from fedfrom.merging.methods.registry import method_options
from simulations.studies.glue import bodies
from simulations.studies.glue.arena import Answers, Arena, Scaled
from simulations.studies.glue.data import load
from simulations.studies.glue.options import GATE, TASKS, GlueOptions
from simulations.studies.glue.rows import ROWS, MethodRow, by_name, scales
from simulations.studies.glue.search import halved
from simulations.studies.study import Cell, Done, Row, Study

OWN, MERGE, KIND, REPORTED = "own", "merge", "lora", "reported"
PUBLISHED, CONSTANT, TUNED = "published", "constant", "tuned"


def study(options: GlueOptions) -> Study:
    """Return the study: for each seed the tasks' own models, then every method."""
    cells: list[Cell] = []
    for seed in range(options.seeds):
        own = [Cell(OWN, KIND, seed, task, cost=4.0) for task in TASKS]
        needs = tuple(cell.name for cell in own)
        cells += [*own, *(Cell(MERGE, KIND, seed, row.name, needs, cost=6.0) for row in ROWS)]
    names = tuple(row.name for row in ROWS)
    seeds = tuple(range(options.seeds))
    return Study("glue", seeds, (KIND,), names, TASKS, options.settings(), tuple(cells), partial(_run, options))


def gated(known: pd.DataFrame, seed: int) -> list[str]:
    """Return the tasks that count: those whose own model is well above a constant answer on the reported rows."""
    own = known[(known["part"] == OWN) & (known["seed"] == seed)]
    return [row.task for row in own.itertuples() if row.score >= row.constant + GATE]


def _run(options: GlueOptions, cells: Sequence[Cell], known: pd.DataFrame) -> Iterator[Done]:
    for cell in cells:
        if cell.part == OWN:
            yield Done(cell, [_own(options, cell.seed, cell.method)])
        else:
            yield _merged(options, cell, known)


def _own(options: GlueOptions, seed: int, task: str) -> Row:
    """Train a task's model, unless it is there, and return its score under its own head."""
    data = load(options)[task]
    if not bodies.is_trained(options, seed, task):
        bodies.train(options, seed, data)
    arena = Arena(options, seed, {task: data})
    arena.load(bodies.body(options, seed, task), options.lora_alpha / options.lora_r)
    (row,) = _scored(arena.reported(), arena.tuning(), setting=OWN)
    return {**row, "constant": data.constant}


def _merged(options: GlueOptions, cell: Cell, known: pd.DataFrame) -> Done:
    """Merge the seed's bodies by one method at both ranks, choose a scale, and score what the tables show."""
    row, arena = by_name(cell.method), Arena(options, cell.seed, load(options))
    own = known[(known["part"] == OWN) & (known["seed"] == cell.seed)].set_index("task")
    tasks = gated(known, cell.seed)
    found: list[Row] = []
    tried: dict[str, Any] = {}
    for rank, columns in {"full": options.lora_r * len(TASKS), str(options.lora_r): options.lora_r}.items():
        body = Scaled(arena, _merge(options, row, cell.seed, columns))

        def merit(scale: float, all_rows: bool, body: Scaled = body) -> float:
            answers = body.tuning(scale) if all_rows else body.tuning(scale, options.first_examples)
            return fmean(_share(answers[task].score(), own.loc[task]) for task in tasks) if tasks else 0.0

        tuned, tried[rank] = halved(scales(options.scales), merit)
        for setting, scale in {PUBLISHED: row.published, CONSTANT: row.constant, TUNED: tuned}.items():
            if scale is not None:
                for scored in _scored(body.reported(scale), body.tuning(scale), setting=setting):
                    of_task = own.loc[scored["task"]]
                    compared = {"constant": float(of_task["constant"]), "own": float(of_task["score"])}
                    found.append({**scored, "rank": rank, "scale": scale, **compared})
    return Done(cell, found, {"tried": tried})


def _scored(reported: Mapping[str, Answers], tuning: Mapping[str, Answers], setting: str) -> Iterator[Row]:
    """Yield a row for each task: its score with the head as it is, and with its bias fitted anew."""
    for task, answers in reported.items():
        yield {
            "setting": setting,
            "task": task,
            "split": REPORTED,
            "n": len(answers.labels),
            "score": answers.score(),
            "refit": answers.score(tuning[task].bias()),
        }


def _share(score: float, own: pd.Series) -> float:
    """Return how much of its own model's lead over a constant answer a task keeps: 1 all, 0 none."""
    return float((score - own["constant"]) / (own["score"] - own["constant"]))


def _merge(options: GlueOptions, row: MethodRow, seed: int, rank: int) -> Mapping[str, Tensor]:
    """Return the merged body, whose B carries the scaling."""
    states = [bodies.body(options, seed, task) for task in TASKS]
    chosen = {**row.options, "rank": rank} | ({"seed": seed} if "seed" in method_options(row.method) else {})
    configs = [bodies.config(options)] * len(states)
    return fedfrom.merge(states, method=row.method, configs=configs, names=list(TASKS), **chosen)[0]
