"""The work, piece by piece: what each needs, costs and computes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from simulations.paper import training
from simulations.paper.arena import Arena
from simulations.paper.data import REPORTED, constant
from simulations.paper.files import Shelf
from simulations.paper.grids import ALPHAS, KS_FIGURE, KS_PAIRS, KS_TABLE, rows
from simulations.paper.merging import Clients, geometry
from simulations.paper.options import CHECKPOINTS_OF, TASKS, PaperOptions
from simulations.paper.search import search

Result = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """One piece of work.

    Attributes
    ----------
    name : str
        Of its file.
    compute : Callable[[Bench], Result]
        What it does; called in whatever process.
    needs : tuple[str, ...]
        Pieces that have to be there before.
    cost : float
        About so many seconds of the default size.
    """

    name: str
    compute: Callable[["Bench"], Result]
    needs: tuple[str, ...] = ()
    cost: float = 1.0


@dataclass
class Bench:
    """What pieces of work share within a process: options, the shelf, and the arena that was used last."""

    options: PaperOptions
    folder: Path
    _arenas: dict[tuple[str, int], Arena] = field(default_factory=dict)

    @property
    def shelf(self) -> Shelf:
        """Where states lie."""
        return Shelf(self.folder / "states")

    def arena(self, kind: str, seed: int) -> Arena:
        """Return the arena of a kind and seed; one is held at a time."""
        if (kind, seed) not in self._arenas:
            self._arenas.clear()
            self._arenas[kind, seed] = Arena(self.options, kind, seed, self.shelf.get(f"base-s{seed}"))
        return self._arenas[kind, seed]

    def clients(self, kind: str, seed: int, names: list[str]) -> Clients:
        """Return the states of these names."""
        arena = self.arena(kind, seed)
        return Clients.read(names, arena.start, arena.config, seed, self.shelf)


def pieces(options: PaperOptions) -> list[Piece]:
    """Return all the work, kind by kind and seed by seed."""
    found: dict[str, Piece] = {}
    for kind in options.kinds:
        for seed in range(options.seeds):

            def train_base(bench: Bench, seed: int = seed) -> Result:
                return training.train_base(options, seed, bench.shelf)

            base = Piece(f"base-s{seed}", train_base, cost=0.4 * options.base_steps)
            for piece in (base, *_of_kind(options, kind, seed, base.name)):
                found.setdefault(piece.name, piece)
    return list(found.values())


def _of_kind(options: PaperOptions, kind: str, seed: int, base: str) -> list[Piece]:
    start, found = f"{kind}-s{seed}", []
    for task in (*TASKS, "pooled"):

        def train(bench: Bench, task: str = task) -> Result:
            return training.train_task(options, kind, seed, task, bench.shelf)

        found.append(Piece(f"{start}-train-{task}", train, (base,), 0.4 * options.task_steps(task) + 5))
    trained = tuple(piece.name for piece in found)
    for row in rows(kind):

        def look(bench: Bench, row: Any = row) -> Result:
            clients = bench.clients(kind, seed, training.names(kind, seed, TASKS))
            return search(row, options.candidates, clients, bench.arena(kind, seed))

        name = f"{start}-search-{row.name.replace(', ', '-')}"
        found.append(Piece(name, look, trained, 1.2 * options.candidates + 2))
    others: dict[str, tuple[Callable[[Bench, str, int], Result], float]] = {
        "bounds": (_bounds, 8),
        "alpha": (_alpha, 10),
        "k": (_k, 19),
        "pairs": (_pairs, 10),
        "checkpoints": (_checkpoints, 14),
        "geometry": (_geometry, 1),
    }
    for name, (function, cost) in others.items():

        def other(bench: Bench, function: Callable[[Bench, str, int], Result] = function) -> Result:
            return function(bench, kind, seed)

        found.append(Piece(f"{start}-{name}", other, trained, cost))
    return found


def _bounds(bench: Bench, kind: str, seed: int) -> Result:
    """Score the base model, each task's own state, and the pooled one, on all tasks' reported halves."""
    arena = bench.arena(kind, seed)
    found = {"constant": {task: constant(arena.data[task].half(REPORTED)) for task in TASKS}}
    found["base"] = arena.score(None, TASKS, REPORTED, None)
    for task, name in zip((*TASKS, "pooled"), training.names(kind, seed, (*TASKS, "pooled")), strict=True):
        found[task] = arena.score(bench.shelf.get(name), TASKS, REPORTED, None)
    return found


def _sweep(bench: Bench, kind: str, seed: int, method: str, name: str, values: tuple[float, ...]) -> Result:
    clients, arena = bench.clients(kind, seed, training.names(kind, seed, TASKS)), bench.arena(kind, seed)
    found = []
    for value in values:
        state, report = clients.merge(method, {name: value})
        scores = arena.score(state, TASKS, REPORTED, report.config)
        found.append({name: value, "reported": scores, "interference": report.interference})
    return {"points": found}


def _alpha(bench: Bench, kind: str, seed: int) -> Result:
    return _sweep(bench, kind, seed, "task-arithmetic", "coefficient", ALPHAS)


def _k(bench: Bench, kind: str, seed: int) -> Result:
    return _sweep(bench, kind, seed, "from", "k", tuple(sorted({*KS_TABLE, *KS_FIGURE})))


def _pairs(bench: Bench, kind: str, seed: int) -> Result:
    """Merge every two tasks by FroM, and score them on those two."""
    arena, found = bench.arena(kind, seed), []
    for pair in combinations(TASKS, 2):
        clients = bench.clients(kind, seed, training.names(kind, seed, pair))
        for k in KS_PAIRS:
            state, report = clients.merge("from", {"k": k})
            scores = arena.score(state, pair, REPORTED, report.config)
            found.append({"k": k, "tasks": list(pair), "reported": scores, "interference": report.interference})
    return {"points": found}


def _checkpoints(bench: Bench, kind: str, seed: int) -> Result:
    """Merge three checkpoints of one task by every method, each at the first setting of its grid; no search."""
    names, arena = training.checkpoint_names(kind, seed), bench.arena(kind, seed)
    clients = bench.clients(kind, seed, names)
    tasks = (CHECKPOINTS_OF,)
    alone = [arena.score(state, tasks, REPORTED, None) for state in clients.states]
    merged = {}
    for row in rows(kind):
        if row.method != "greedy-soup":  # it needs a search
            state, report = clients.merge(row.method, row.grid[0])
            merged[row.name] = arena.score(state, tasks, REPORTED, report.config)
    return {"alone": alone, "merged": merged}


def _geometry(bench: Bench, kind: str, seed: int) -> Result:
    """Return the norms, weights and cosines of all layers under FroM with k = 1."""
    clients = bench.clients(kind, seed, training.names(kind, seed, TASKS))
    return geometry(clients.merge("from", {"k": 1.0})[1])
