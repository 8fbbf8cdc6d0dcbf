"""The study's cells: each task's own model of each seed, and each method's merges of the seed's bodies."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import fedfrom
from fedfrom.merging.methods.registry import method_options, needed_statistics
from fedfrom.tuning.halving import halved, highest, scales
from simulations import training
from simulations.studies.glue import bodies
from simulations.studies.glue.arena import Answers, Arena, Scaled
from simulations.studies.glue.data import TaskData, load
from simulations.studies.glue.kept import packed
from simulations.studies.glue.options import GATE, GlueOptions
from simulations.studies.glue.rows import NAMED, OTHERS, PRIMARY, ROWS, MethodRow, by_name
from simulations.studies.glue.scales import around, data_free
from simulations.studies.study import Cell, Done, Row, Study

OWN, MERGE, KIND, REPORTED = "own", "merge", "lora", "reported"
PUBLISHED, CONSTANT, TUNED = "published", "constant", "tuned"
FULL = "full"  # the rank of the sum of all bodies


def study(options: GlueOptions) -> Study:
    """Return the study: for each seed its own models and the rows of the named contrasts, then the other rows."""
    seeds = tuple(range(options.seeds))
    cells: list[Cell] = []
    for seed in seeds:
        cells += [*_own_cells(options, seed), *_merge_cells(options, seed, NAMED)]
    for seed in seeds:
        cells += _merge_cells(options, seed, OTHERS)
    names = tuple(row.name for row in ROWS)
    return Study(
        options.suite, seeds, (KIND,), names, options.tasks, options.settings(), tuple(cells), partial(_run, options)
    )


def _own_cells(options: GlueOptions, seed: int) -> list[Cell]:
    return [Cell(OWN, KIND, seed, task, cost=3.0) for task in options.tasks]


def _merge_cells(options: GlueOptions, seed: int, rows: Sequence[MethodRow]) -> list[Cell]:
    needs = tuple(cell.name for cell in _own_cells(options, seed))
    return [Cell(MERGE, KIND, seed, row.name, needs, cost=5.0) for row in rows]


def gated(known: pd.DataFrame, seed: int) -> list[str]:
    """Return the tasks that count: those whose own model is well above a constant answer on the reported rows."""
    own = known[(known["part"] == OWN) & (known["seed"] == seed)]
    return own[counts(own["score"], own["constant"])]["task"].tolist()


def counts(own: Any, constant: Any) -> Any:
    """Return whether an own model's score is so far above the constant answer's that its task counts."""
    return own >= constant + GATE


def share(score: Any, constant: Any, own: Any) -> Any:
    """Return how much of an own model's lead over a constant answer a score keeps: 1 all, 0 none."""
    return (score - constant) / (own - constant)


def _run(options: GlueOptions, cells: Sequence[Cell], known: pd.DataFrame) -> Iterator[Done]:
    if options.processes > 1:
        torch.set_num_threads(max(1, training.free_workers() // options.processes))
    for cell in cells:
        yield _own(options, cell) if cell.part == OWN else _merged(options, cell, known)


def _own(options: GlueOptions, cell: Cell) -> Done:
    """Score a task's own model under its own head; it is trained unless it is there."""
    data = load(options)[cell.method]
    bodies.ensure(options, cell.seed, data)
    arena = Arena(options, cell.seed, {data.task: data})
    arena.load(bodies.body(options, cell.seed, data.task), options.lora_alpha / options.lora_r)
    reported = arena.reported()
    (row,) = _scored(reported, arena.tuning(), setting=OWN)
    labels = packed(data.reported.labels.numpy())
    return Done(cell, [{**row, "constant": data.constant}], {"labels": labels, "answers": {OWN: _packed(reported)}})


def _merged(options: GlueOptions, cell: Cell, known: pd.DataFrame) -> Done:
    """Merge the seed's bodies by one method at both ranks, choose a scale, and score what the tables show.

    At the lower rank the scales next to the one that was chosen at full rank are tried, and not the published one nor
    those that need no rows.
    """
    data = load(options)
    for of_task in data.values():  # the folder of models may have been removed since the own models were scored
        bodies.ensure(options, cell.seed, of_task)
    row, arena = by_name(cell.method), Arena(options, cell.seed, data)
    own = known[(known["part"] == OWN) & (known["seed"] == cell.seed)].set_index("task")
    tasks = gated(known, cell.seed)

    def merit(answers: Mapping[str, Answers]) -> float:
        kept = [share(answers[task].score(), own.at[task, "constant"], own.at[task, "score"]) for task in tasks]
        return fmean(kept) if tasks else 0.0

    found: list[Row] = []
    tried: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    tuned, grid = 0.0, scales(options.scales)
    for rank, columns in {FULL: options.lora_r * len(options.tasks), str(options.lora_r): options.lora_r}.items():
        merged = _merge(options, row, cell.seed, columns, data)
        body = Scaled(arena, merged, options.first_examples)
        every = partial(_of, merit, body.tuning)
        if rank == FULL:
            tuned, tried[rank] = halved(grid, partial(_of, merit, body.first), every)
        else:
            tuned, tried[rank] = highest(around(grid, tuned), every)
        settings = {CONSTANT: row.constant, TUNED: tuned}
        if rank == FULL:
            settings |= {
                PUBLISHED: row.published,
                **(_data_free(options, cell.seed, merged) if row.name in PRIMARY else {}),
            }
        for setting, scale in settings.items():
            if scale is not None:
                for scored in _scored(body.reported(scale), body.tuning(scale), setting=setting):
                    task = own.loc[scored["task"]]
                    compared = {"constant": float(task["constant"]), "own": float(task["score"])}
                    found.append({**scored, "rank": rank, "scale": scale, **compared})
        kept[rank] = _packed(body.reported(tuned))
    return Done(cell, found, {"tried": tried, "answers": kept})


def _data_free(options: GlueOptions, seed: int, merged: Mapping[str, Tensor]) -> dict[str, float]:
    states = [bodies.body(options, seed, task) for task in options.tasks]
    return data_free(merged, states, options.lora_alpha / options.lora_r)


def _of(merit: Callable[[Mapping[str, Answers]], float], answers: Callable[[float], Any], scale: float) -> float:
    return merit(answers(scale))


def _packed(answers: Mapping[str, Answers]) -> dict[str, str]:
    """Return what a body answered on the reported rows, as text, by task."""
    return {task: packed(of_task.answers) for task, of_task in answers.items()}


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


def _merge(
    options: GlueOptions, row: MethodRow, seed: int, rank: int, data: Mapping[str, TaskData]
) -> Mapping[str, Tensor]:
    """Return the merged body, whose B carries the scaling."""
    states = bodies.with_norms([bodies.body(options, seed, task) for task in options.tasks], row.k)
    chosen = {**row.options, "rank": rank} | ({"seed": seed} if "seed" in method_options(row.method) else {})
    chosen["configs"] = [bodies.config(options)] * len(states)
    if needed_statistics(row.method):
        chosen["statistics"] = [bodies.gram(options, seed, data[task]) for task in options.tasks]
    return fedfrom.merge(states, method=row.method, names=list(options.tasks), **chosen)[0]
