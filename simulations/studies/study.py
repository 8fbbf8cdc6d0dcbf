"""What a study is: a declaration of its cells, and the function that computes them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One piece of work, whose columns its rows share.

    Attributes
    ----------
    part : str
        Of the study, such as "search" or "comparison".
    kind : str
        What is merged ("lora", "full"), or which clients are ("dirichlet", "equal").
    seed : int
        Of training, partition and batches.
    method : str
        Row of the tables.
    needs : tuple[str, ...]
        Names of cells that have to be there before.
    cost : float
        How long it takes, relative to the study's other cells.
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
        """What the frame and the progress call it."""
        return f"{self.part}/{self.kind}/{self.seed}/{self.method}"


@dataclass(frozen=True)
class Done:
    """A cell's rows, what lies beside them (plain JSON that is no score, such as layers' norms), and what it took."""

    cell: Cell
    rows: list[Row]
    beside: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0


# Takes cells of one group, and the frame's rows so far.
Run = Callable[[Sequence[Cell], Any], Iterable[Done]]


@dataclass(frozen=True)
class Study:
    """All that is measured.

    Attributes
    ----------
    name : str
        In the frame's first column.
    seeds, kinds, methods, tasks : tuple
        What is measured, in the tables' order.
    budget : dict[str, Any]
        Whatever else the results depend on, as plain JSON types: steps, sizes, numbers of examples.
    cells : tuple[Cell, ...]
        The work, in order.
    run : Run
        Computes cells. It can be pickled where cells are computed in several processes.
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
        """Return what results in one folder have in common."""
        return {"study": self.name, "kinds": list(self.kinds), "seeds": list(self.seeds), **self.budget}
