"""A study: the declaration of its cells, and the function that computes them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One piece of work. Its rows have its part, kind, seed and method in common.

    Attributes
    ----------
    part : str
        Part of the study, such as "search" or "comparison".
    kind : str
        Kind of the merged states ("lora", "full"), or of the clients ("dirichlet", "equal").
    seed : int
        Seed of training, partition and batches.
    method : str
        Row of the tables.
    needs : tuple[str, ...]
        Names of cells that must be finished before.
    cost : float
        Computing time relative to the study's other cells.
    group : str
        Cells of one group are computed by one call; empty: the cell alone.
    """

    part: str
    kind: str
    seed: int
    method: str
    needs: tuple[str, ...] = field(default=(), compare=False)
    cost: float = field(default=1.0, compare=False)
    group: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """The cell's name in the frame and in the progress."""
        return f"{self.part}/{self.kind}/{self.seed}/{self.method}"


@dataclass(frozen=True)
class Done:
    """A finished cell.

    Attributes
    ----------
    cell : Cell
        The cell.
    rows : list[Row]
        Its scores.
    beside : dict[str, Any]
        Findings that are no scores, such as the layers' norms, as plain JSON types.
    seconds, cpu_seconds : float
        Computing time.
    """

    cell: Cell
    rows: list[Row]
    beside: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0


# Computes the cells of one group, given them and the frame's rows so far.
Run = Callable[[Sequence[Cell], Any], Iterable[Done]]


@dataclass(frozen=True)
class Study:
    """The declaration of a study.

    Attributes
    ----------
    name : str
        Name in the frame's first column.
    seeds, kinds, methods, tasks : tuple
        The measured seeds, kinds, methods and tasks, in the tables' order.
    budget : dict[str, Any]
        All further settings that results depend on, as plain JSON types: steps, sizes, numbers of examples.
    cells : tuple[Cell, ...]
        The work, in order.
    run : Run
        Computes cells. It must be picklable where several processes compute.
    """

    name: str
    seeds: tuple[int, ...]
    kinds: tuple[str, ...]
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    budget: dict[str, Any]
    cells: tuple[Cell, ...]
    run: Run

    def settings(self) -> dict[str, Any]:
        """Return the settings that all cells in one folder share."""
        return {"study": self.name, "kinds": list(self.kinds), "seeds": list(self.seeds), **self.budget}
