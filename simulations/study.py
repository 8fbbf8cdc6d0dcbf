"""A study: many pieces of work whose results are kept one by one, so that it goes on where it was stopped."""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from simulations.errors import BadInput

SETTINGS = "settings.json"


class Study:
    """A folder with one JSON file a finished piece of work, and the settings that all of them share.

    Parameters
    ----------
    folder : str | Path
        Made where it is missing. Results of other settings in it are refused.
    settings : dict
        Whatever the results depend on, as plain JSON types.
    pieces : Iterable[str]
        Names of all the work there is, in order, as file names without suffix.
    say : Callable[[str], None]
        Takes a line on progress.
    costs : Mapping[str, float] | None (default: None)
        How long the pieces take relative to each other, for the estimate of the time left; None: all alike.

    Raises
    ------
    BadInput
        The folder can't be written, or holds results of other settings.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: dict[str, Any],
        pieces: Iterable[str],
        say: Callable[[str], None] = print,
        costs: Mapping[str, float] | None = None,
    ) -> None:
        self.folder = Path(os.path.expanduser(folder))
        self.pieces = list(pieces)
        self.say = say
        self._costs = dict(costs or {})
        settings = json.loads(json.dumps(settings))
        try:
            (self.folder / "pieces").mkdir(parents=True, exist_ok=True)
            known = self.folder / SETTINGS
            if known.is_file():
                self._check_same(json.loads(known.read_text(encoding="utf-8")), settings)
            else:
                write_whole(known, settings)
        except (OSError, ValueError) as error:
            raise BadInput(f"--out {self.folder}: can't be used: {error}") from None
        self._start = time.perf_counter()
        self._left_before = self._cost_left()

    def _check_same(self, found: dict[str, Any], asked: dict[str, Any]) -> None:
        for name in sorted(found.keys() | asked.keys()):
            if found.get(name) != asked.get(name):
                raise BadInput(
                    f"--out {self.folder}: holds results of other settings: {name} is {found.get(name)!r} there, "
                    f"{asked.get(name)!r} here; name another folder, or remove that one"
                )

    def _path(self, piece: str) -> Path:
        return self.folder / "pieces" / f"{piece}.json"

    def missing(self) -> list[str]:
        """Return the work that is left, in order."""
        return [piece for piece in self.pieces if not self._path(piece).is_file()]

    def get(self, piece: str) -> dict[str, Any] | None:
        """Return the result of a finished piece, None where it is not there yet."""
        path = self._path(piece)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def put(self, piece: str, result: dict[str, Any]) -> None:
        """Keep the result of a piece, and say how much is left."""
        write_whole(self._path(piece), result)
        left = self._cost_left()
        done = self._left_before - left
        seconds = (time.perf_counter() - self._start) / done * left if done > 0 else 0.0
        finished = len(self.pieces) - len(self.missing())
        self.say(f"[{finished}/{len(self.pieces)}] {piece} done; about {seconds / 60:.0f} min left")

    def _cost_left(self) -> float:
        return sum(self._costs.get(piece, 1.0) for piece in self.missing())


def write_whole(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that the file is there as a whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
