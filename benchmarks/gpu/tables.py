"""The tables of a run: rows that are printed when they are there, and written where a folder is given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from simulations.tables import write_table


class Table:
    """A table that grows row by row, and is written after each.

    Parameters
    ----------
    name : str
        Of its files.
    columns : Sequence[str]
        Names of the columns.
    about : str
        Conditions, and what the columns are.
    folder : Path | None
        Where it is written; None prints it alone.
    """

    def __init__(self, name: str, columns: Sequence[str], about: str, folder: Path | None) -> None:
        self.name, self.columns, self.about, self.folder = name, list(columns), about, folder
        self.rows: list[list[object]] = []
        self.skipped: list[str] = []
        print(f"\n{name}\n\n{about}\n", flush=True)
        print(*self.columns, sep="\t", flush=True)

    def add(self, *cells: object) -> None:
        """Add a row, print it, and write the table."""
        self.rows.append(list(cells))
        print(*cells, sep="\t", flush=True)
        self._write()

    def left_out(self, what: str) -> None:
        """Name what there was no time for."""
        self.skipped.append(what)
        print(f"left out, as the part's time was spent: {what}", flush=True)
        self._write()

    def _write(self) -> None:
        if self.folder is None:
            return
        late = f"\n\nLeft out, as the part's time was spent: {', '.join(self.skipped)}." if self.skipped else ""
        frame = pd.DataFrame(self.rows, columns=self.columns, dtype=object)
        write_table(self.folder, self.name, frame, self.about + late)


def number(value: float | None) -> str:
    """Return a number's text of four digits; nothing for None."""
    return "" if value is None else f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def times(longer: float, shorter: float) -> str:
    """Return how many times longer, in three digits."""
    return f"{longer / shorter:.3g}" if shorter else ""
