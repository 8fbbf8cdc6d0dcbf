"""The study's cells: needs, cost and computation of each."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from fedfrom.pages.look import percent
from simulations.studies.paper import training
from simulations.studies.paper.arena import Arena, Scores
from simulations.studies.paper.data import REPORTED, VALIDATION, constant
from simulations.studies.paper.grids import ALPHAS, KS_FIGURE, KS_PAIRS, KS_TABLE, rows, setting_text
from simulations.studies.paper.merging import Clients, geometry
from simulations.studies.paper.options import BASE_TASK, CHECKPOINTS, CHECKPOINTS_OF, TASKS, PaperOptions
from simulations.studies.paper.search import search
from simulations.studies.shelf import Shelf
from simulations.studies.study import Cell, Done, Row, Study

CONSTANT, BASE, POOLED = "constant answer", "base head", "all data pooled"
SWEPT = {
    "alpha": ("task-arithmetic", "coefficient", ALPHAS),
    "k": ("from", "k", tuple(sorted({*KS_TABLE, *KS_FIGURE}))),
}


def alone(task: str) -> str:
    """Return the tables' name of a task's own state."""
    return f"{task.upper()} alone"


def checkpoint(number: int) -> str:
    """Return the tables' name of a checkpoint."""
    return f"checkpoint at {percent(CHECKPOINTS[number])} of the steps"


def study(options: PaperOptions, folder: Path) -> Study:
    """Return the paper's study.

    Parameters
    ----------
    options : PaperOptions
        The options.
    folder : Path
        Folder of the trained states.
    """
    found: dict[str, Cell] = {}
    for kind in options.kinds:
        for seed in range(options.seeds):
            base = Cell("train", "base", seed, BASE_TASK, cost=0.4 * options.base_steps)
            for cell in (base, *_of_kind(options, kind, seed, base.name)):
                found.setdefault(cell.name, cell)
    return Study(
        "paper",
        tuple(range(options.seeds)),
        options.kinds,
        tuple(dict.fromkeys(row.label for kind in options.kinds for row in rows(kind))),
        TASKS,
        options.settings(),
        tuple(found.values()),
        partial(_run, options, str(folder)),
    )


def _of_kind(options: PaperOptions, kind: str, seed: int, base: str) -> Iterator[Cell]:
    trained = []
    for task in (*TASKS, "pooled"):
        trained.append(Cell("train", kind, seed, task, (base,), 0.4 * options.task_steps(task) + 5))
    yield from trained
    needs = tuple(cell.name for cell in trained)
    for row in rows(kind):
        yield Cell("search", kind, seed, row.label, needs, 1.2 * options.candidates + 2)
    for part, (method, cost) in {
        "bounds": ("bounds", 8),
        "alpha": ("task-arithmetic", 10),
        "k": ("from", 19),
        "pairs": ("from", 10),
        "checkpoints": ("every", 14),
        "geometry": ("from", 1),
    }.items():
        yield Cell(part, kind, seed, method, needs, cost)


@dataclass
class Bench:
    """What the cells of a process share: options, shelf, and the last arena."""

    options: PaperOptions
    folder: Path
    _arenas: dict[tuple[str, int], Arena] = field(default_factory=dict)

    @property
    def shelf(self) -> Shelf:
        """The shelf of the trained states."""
        return Shelf(self.folder / "states")

    def arena(self, kind: str, seed: int) -> Arena:
        """Return the arena of a kind and seed. Only the last arena stays in memory."""
        if (kind, seed) not in self._arenas:
            self._arenas.clear()
            self._arenas[kind, seed] = Arena(self.options, kind, seed, self.shelf.get(f"base-s{seed}"))
        return self._arenas[kind, seed]

    def clients(self, kind: str, seed: int, names: list[str]) -> Clients:
        """Return the states of these names as clients."""
        arena = self.arena(kind, seed)
        return Clients.read(names, arena.start, arena.config, seed, self.shelf)


@lru_cache(maxsize=1)
def _bench(options: PaperOptions, folder: str) -> Bench:
    torch.set_num_threads(1)
    return Bench(options, Path(folder))


def _run(options: PaperOptions, folder: str, cells: Sequence[Cell], known: Any) -> Iterator[Done]:
    for cell in cells:
        found = PARTS[cell.part](_bench(options, folder), cell)
        yield found if isinstance(found, Done) else Done(cell, found)


def _rows(scores: Scores, setting: str = "", split: str = REPORTED, **more: Any) -> list[Row]:
    return [
        {
            "setting": setting,
            "task": task,
            "split": split,
            "n": found["total"],
            "score": found["correct"] / found["total"],
            "loss": found.get("loss"),
            **more,
        }
        for task, found in scores.items()
    ]


def _train(bench: Bench, cell: Cell) -> list[Row]:
    if cell.kind == "base":
        return training.train_base(bench.options, cell.seed, bench.shelf)
    return training.train_task(bench.options, cell.kind, cell.seed, cell.method, bench.shelf)


def _search(bench: Bench, cell: Cell) -> list[Row]:
    """Try a row's settings on the validation half, and score the best on the reported half."""
    (row,) = (row for row in rows(cell.kind) if row.label == cell.method)
    clients = bench.clients(cell.kind, cell.seed, training.names(cell.kind, cell.seed, TASKS))
    found = search(row, bench.options.candidates, clients, bench.arena(cell.kind, cell.seed))
    tried = [_rows(one["scores"], setting_text(one["setting"]), VALIDATION) for one in found["candidates"]]
    best = _rows(
        found["reported"],
        setting_text(found["chosen"]),
        interference=found["interference"],
        clients=" ".join(name.rpartition("-")[2] for name in found["clients"]),
    )
    return [row for rows in (*tried, best) for row in rows]


def _bounds(bench: Bench, cell: Cell) -> list[Row]:
    """Score the base model, each task's own state, and the pooled one, on all tasks' reported halves."""
    arena = bench.arena(cell.kind, cell.seed)
    named: dict[str, Scores] = {CONSTANT: {task: constant(arena.data[task].half(REPORTED)) for task in TASKS}}
    named[BASE] = arena.score(None, TASKS, REPORTED, None)
    states = training.names(cell.kind, cell.seed, (*TASKS, "pooled"))
    for name, state in zip((*map(alone, TASKS), POOLED), states, strict=True):
        named[name] = arena.score(bench.shelf.get(state), TASKS, REPORTED, None)
    return [row for name, scores in named.items() for row in _rows(scores, method=name)]


def _merged(bench: Bench, cell: Cell, tasks: Sequence[str], method: str, setting: dict[str, float]) -> list[Row]:
    arena = bench.arena(cell.kind, cell.seed)
    clients = bench.clients(cell.kind, cell.seed, training.names(cell.kind, cell.seed, tuple(tasks)))
    state, report = clients.merge(method, setting)
    scores = arena.score(state, tasks, REPORTED, report.config)
    (value,) = setting.values()
    more: dict[str, Any] = {"value": value, "interference": report.interference, "clients": " ".join(tasks)}
    return _rows(scores, setting_text(setting), **more)


def _sweep(bench: Bench, cell: Cell) -> list[Row]:
    method, name, values = SWEPT[cell.part]
    return [row for value in values for row in _merged(bench, cell, TASKS, method, {name: value})]


def _pairs(bench: Bench, cell: Cell) -> list[Row]:
    """Merge each pair of tasks by FroM, and score the merge on both tasks."""
    pairs = [(pair, k) for pair in combinations(TASKS, 2) for k in KS_PAIRS]
    return [row for pair, k in pairs for row in _merged(bench, cell, pair, "from", {"k": k})]


def _checkpoints(bench: Bench, cell: Cell) -> list[Row]:
    """Merge three checkpoints of one task by every method at the first setting of its grid, without a search."""
    arena = bench.arena(cell.kind, cell.seed)
    clients = bench.clients(cell.kind, cell.seed, training.checkpoint_names(cell.kind, cell.seed))
    tasks, found = (CHECKPOINTS_OF,), []
    for number, state in enumerate(clients.states):
        found += _rows(arena.score(state, tasks, REPORTED, None), method=checkpoint(number))
    for row in rows(cell.kind):
        if row.method != "greedy-soup":  # it needs a search
            state, report = clients.merge(row.method, row.grid[0])
            scores = arena.score(state, tasks, REPORTED, report.config)
            found += _rows(scores, setting_text(row.grid[0]), method=row.label)
    return found


def _geometry(bench: Bench, cell: Cell) -> Done:
    """Compute the norms, weights and cosines of all layers under FroM with k = 1."""
    clients = bench.clients(cell.kind, cell.seed, training.names(cell.kind, cell.seed, TASKS))
    return Done(cell, [], geometry(clients.merge("from", {"k": 1.0})[1]))


PARTS: dict[str, Callable[[Bench, Cell], list[Row] | Done]] = {
    "train": _train,
    "search": _search,
    "bounds": _bounds,
    "alpha": _sweep,
    "k": _sweep,
    "pairs": _pairs,
    "checkpoints": _checkpoints,
    "geometry": _geometry,
}
