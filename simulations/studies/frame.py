"""The tidy frame on disk: a line of JSON for each cell, and the settings that all cells share."""

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd

from fedfrom.atomic import write_whole
from fedfrom.errors import BadInput
from simulations.studies.study import Cell, Done, Row, Study

SETTINGS, CELLS = "settings.json", "cells.jsonl"
COLUMNS = ("study", "part", "kind", "seed", "method", "setting", "task", "split", "n", "score", "seconds")


class Frame:
    """The finished cells of a study, in a folder.

    Parameters
    ----------
    folder : str | Path
        Made where it is missing. Cells of other settings in it are refused.
    study : Study
        The study of the cells.

    Raises
    ------
    BadInput
        The folder can't be used, or holds cells of other settings.
    """

    def __init__(self, folder: str | Path, study: Study) -> None:
        self.folder, self.study = Path(os.path.expanduser(folder)), study
        self._kept: dict[str, dict[str, Any]] = {}
        settings = json.loads(json.dumps(study.settings()))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            known = self.folder / SETTINGS
            if known.is_file():
                self._check_same(json.loads(known.read_text(encoding="utf-8")), settings)
            else:
                write_whole(known, json.dumps(settings, indent=1) + "\n")
            self._read()
        except (OSError, ValueError) as error:
            raise BadInput(f"--out {self.folder}: can't be used: {error}") from None

    def _check_same(self, found: dict[str, Any], asked: dict[str, Any]) -> None:
        for name in sorted(found.keys() | asked.keys()):
            if found.get(name) != asked.get(name):
                raise BadInput(
                    f"--out {self.folder}: holds results of other settings: {name} is {found.get(name)!r} there, "
                    f"{asked.get(name)!r} here; name another folder, or remove that one"
                )

    def _read(self) -> None:
        path = self.folder / CELLS
        whole = path.read_bytes() if path.is_file() else b""
        end = whole.rfind(b"\n") + 1
        if end < len(whole):  # an unfinished line: the run was stopped while it wrote a cell
            os.truncate(path, end)
        for line in whole[:end].decode("utf-8").splitlines():
            found = json.loads(line)
            self._kept[found["cell"]] = found

    def __contains__(self, cell: Cell | str) -> bool:
        return (cell if isinstance(cell, str) else cell.name) in self._kept

    def missing(self) -> list[Cell]:
        """Return the cells that are not finished, in order."""
        return [cell for cell in self.study.cells if cell not in self]

    def add(self, done: Done) -> None:
        """Append a finished cell to the file, with all of its rows."""
        same = {"part": done.cell.part, "kind": done.cell.kind, "seed": done.cell.seed, "method": done.cell.method}
        rows: list[Row] = [{"study": self.study.name, **same, "seconds": done.seconds, **row} for row in done.rows]
        kept = {
            "cell": done.cell.name,
            "seconds": done.seconds,
            "cpu-seconds": done.cpu_seconds,
            "beside": done.beside,
            "rows": rows,
        }
        line = json.dumps(kept, allow_nan=False, ensure_ascii=False) + "\n"
        with (self.folder / CELLS).open("ab") as file:
            file.write(line.encode())
        self._kept[done.cell.name] = json.loads(line)

    def rows(self) -> pd.DataFrame:
        """Return the rows of all finished cells, in the study's order."""
        found = [row for cell in self.study.cells if cell in self for row in self._kept[cell.name]["rows"]]
        more = dict.fromkeys(name for row in found for name in row)
        return pd.DataFrame(found, columns=list(dict.fromkeys([*COLUMNS, *more])))

    def beside(self, cell: Cell | str) -> dict[str, Any]:
        """Return a cell's findings that are no rows: see `Done.beside`."""
        return self._kept[cell if isinstance(cell, str) else cell.name]["beside"]

    def took(self, name: str) -> float:
        """Return the sum over cells of "seconds" or "cpu-seconds"."""
        return sum(self._kept[cell.name][name] for cell in self.study.cells if cell in self)
