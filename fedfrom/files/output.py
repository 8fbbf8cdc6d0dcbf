"""The folder that a merge leaves: refused where something is in its place, there as a whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from fedfrom.atomic import publish, staging_folder
from fedfrom.errors import BadInput

_CARD = "README.md"
_LIST = re.compile(r"<!-- files that fedfrom wrote: (.*) -->")


class Output:
    """A new folder, filled under a hidden name beside its own and renamed when complete.

    Parameters
    ----------
    path : Path
        OUT.
    inputs : Sequence[Path]
        Folders that it may neither be nor hold nor lie in.
    force : bool
        Replace an earlier result.

    Raises
    ------
    BadInput
        There is something already, or the folder can't be written; nothing is left behind.
    """

    def __init__(self, path: Path, inputs: Sequence[Path], force: bool) -> None:
        self.path = path
        real = _real(path)
        for other in inputs:
            there = _real(other)
            if real == there or real in there.parents or there in real.parents:
                raise BadInput(f"{path}: expected a new folder apart from the inputs, found {other}: name another OUT")
        if os.path.islink(path) or (os.path.lexists(path) and not os.path.isdir(path)):
            raise BadInput(f"{path}: expected a new folder, found a file or a link: name another OUT")
        if os.path.isdir(path):
            if not force:
                raise BadInput(f"{path}: already there: name another OUT, or pass --force to replace it")
            if strange := sorted(set(_entries(path)) - _written(path)):
                raise BadInput(
                    f"{path}: expected a folder that fedfrom merge wrote, and nothing else in it, found other files "
                    f"({strange[0]}): remove them, or name another OUT"
                )

    def __enter__(self) -> Path:
        """Return the folder to fill."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._staging = staging_folder(self.path)
        except (OSError, ValueError) as error:
            raise self._unwritable(error) from None
        return self._staging

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                publish(self._staging, self.path)
        except OSError as failed:
            raise self._unwritable(failed) from None
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
        if isinstance(error, OSError):
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError | ValueError) -> BadInput:
        reason = getattr(error, "strerror", None) or error
        return BadInput(f"{str(self.path)!r}: can't be written: {reason}; nothing was left behind")


def write_card(folder: Path, card: str) -> None:
    """Write a folder's model card, its last file, with the names of all: --force removes no others."""
    names = json.dumps(sorted([_CARD, *_entries(folder)])).replace(">", "\\u003e")
    (folder / _CARD).write_text(f"{card}\n<!-- files that fedfrom wrote: {names} -->\n", encoding="utf-8")


def _written(folder: Path) -> set[str]:
    """Return the names of the files that the folder's card says were written with it."""
    try:
        lists = _LIST.findall((folder / _CARD).read_text(encoding="utf-8", errors="replace"))
        return {name for name in json.loads(lists[-1]) if os.path.isfile(folder / name)}
    except (OSError, IndexError, ValueError, TypeError):
        return set()


def _entries(folder: Path) -> list[str]:
    """Return the paths, in the folder, of all files in it, and of links and folders that hold none."""
    found = []
    for place, folders, files in os.walk(folder):
        inner = Path(place).relative_to(folder)
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found += [(inner / name).as_posix() for name in (*files, *links)]
        if not folders and not files and inner.parts:
            found.append(inner.as_posix())
    return found


def _real(path: Path) -> Path:
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise BadInput(f"{str(path)!r}: expected a path, found {error}") from None
