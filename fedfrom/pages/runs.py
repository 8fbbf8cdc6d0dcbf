"""Reading of the results folders of `python -m simulations`; nothing in their files is trusted."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfrom.errors import BadInput
from fedfrom.pages.look import clean

FORMAT = 1
FILE = "results.json"


@dataclass(frozen=True)
class Run:
    """One results folder.

    Attributes
    ----------
    name : str
        The run's name on the page: the shortest end of its path that no other run shares.
    folder : Path
        The folder.
    found : dict[str, Any]
        Content of results.json, of which only the format and "strategies" were checked.
    """

    name: str
    folder: Path
    found: dict[str, Any]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Return the runs of several results folders, in the order given; results.json itself may be named too.

    Raises
    ------
    BadInput
        No folder, one given twice, or one without readable results.
    """
    if not folders:
        raise BadInput("expected at least one results folder, found none; name what `python -m simulations` wrote")
    paths = [path.parent if path.name == FILE else path for path in map(Path.expanduser, map(Path, folders))]
    found = [_read(path) for path in paths]
    resolved = [path.resolve() for path in paths]
    for position, path in enumerate(resolved):
        if path in resolved[:position]:
            raise BadInput(f"{paths[position]}: expected each run once, found it twice; leave one out")
    return [Run(name, path, results) for name, path, results in zip(_names(resolved), paths, found, strict=True)]


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(
            f"{folder}: expected {FILE}, found none; name a folder that `python -m simulations` wrote"
        ) from None
    except OSError as error:
        raise BadInput(f"{folder / FILE}: can't be read: {error.strerror or error}; check its rights") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{folder / FILE}: expected JSON, found {clean(error)}; run the simulation again") from None
    if not isinstance(found, dict) or not isinstance(found.get("strategies"), dict) or not found["strategies"]:
        raise BadInput(f"{folder / FILE}: expected the results of a simulation with its strategies; run it again")
    if found.get("format") != FORMAT:
        raise BadInput(
            f"{folder / FILE}: expected format {FORMAT}, found {clean(found.get('format'), 40)}; read it with the "
            "fedfrom that wrote it"
        )
    return found


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of distinct paths that all differ."""
    for length in range(1, max(len(path.parts) for path in paths)):
        names = [clean("/".join(path.parts[-length:])) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{position} {path}" for position, path in enumerate(paths, 1)]


def folder_name(label: str) -> str:
    """Return a strategy's label as a folder name: "from:k=1" is in from-k-1."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", label).strip("-")


def adapter_folder(run: Run, label: str) -> Path | None:
    """Return the folder of a strategy's final weights; None for a label that is no folder name, such as ".."."""
    name = folder_name(label)  # a path in the file could lead anywhere
    return run.folder / name if name.strip(".") else None


def mapping(value: Any) -> Mapping[str, Any]:
    """Return the value where it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def entries(value: Any) -> list[Any]:
    """Return the value where it is a JSON array, else an empty one."""
    return value if isinstance(value, list) else []


def number(value: Any) -> float | None:
    """Return the value where it is a finite number, else None; results.json has the text "nan" for NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) <= sys.float_info.max else None  # math.isfinite fails for ints beyond any float
