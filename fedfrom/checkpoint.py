"""The server's state on disk after each whole round, and reading it back: arrays, metrics, reports, random states.

A run's folder holds one folder a round:

    round-0003/arrays.safetensors   the global arrays
    round-0003/state.json           everything else
    round-0003/SHA256SUMS           digests of the two, which `sha256sum -c` checks

A checkpoint is written under a hidden name, flushed to the disk and then renamed, so that every round-* folder is whole
at any instant. Names with a leading dot are temporary: the next run deletes those that a killed run left behind.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any, Self

import flwr
import numpy as np
import torch
from flwr.app import MetricRecord
from flwr.serverapp.strategy import Result
from safetensors import SafetensorError
from safetensors.torch import save_file

from fedfrom import __version__
from fedfrom.atomic import flush_tree, take_place
from fedfrom.fingerprint import as_json, differences, fingerprint
from fedfrom.folder_lock import locked
from fedfrom.saved_arrays import read_arrays, to_tensors, words
from fedfrom.wire.digests import differing

log = logging.getLogger("flwr")  # where Flower's own strategies log

FORMAT = 3
"""Format of a checkpoint's files; a checkpoint of another format is refused."""

ARRAYS, STATE, SUMS = "arrays.safetensors", "state.json", "SHA256SUMS"
_VERSIONS = {"fedfrom": __version__, "flwr": flwr.__version__, "numpy": np.__version__, "torch": str(torch.__version__)}
_SHOWN = 3  # differences that an error spells out


class _Damaged(ValueError):
    """A file of a checkpoint is damaged; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a whole round.

    Attributes
    ----------
    server_round : int
        The round; 0 before the first.
    result : Result
        The global arrays, and the metrics of all rounds so far.
    state : dict[str, Any]
        The state that the strategy carries from round to round: plain data with str keys.
    random : dict[str, Any]
        `random_states()` after the round.
    """

    server_round: int
    result: Result
    state: dict[str, Any]
    random: dict[str, Any]


class Checkpoints:
    """The folder of one run's checkpoints, locked for as long as it is open.

    Parameters
    ----------
    path : str | Path
        The folder; made where it is missing.
    kept : int
        How many of the newest checkpoints stay, >= 1.
    settings : Mapping[str, Any]
        The settings that a resumed run must share with the run before: see `fingerprint`.
    initial : Mapping[str, str] | None (default: None)
        `digests` of the arrays that the run starts from, by key. A resumed run keeps those of the run before; a warning
        says where its own differ, since its own arrays are not used.

    Raises
    ------
    ValueError
        On entering: another run uses the folder, or it holds other files than checkpoints.
    OSError
        On entering: the folder can't be made or written to.
    """

    def __init__(
        self, path: str | Path, kept: int, settings: Mapping[str, Any], initial: Mapping[str, str] | None = None
    ) -> None:
        self.path = Path(path).absolute()
        self.kept = kept
        self.settings = fingerprint(settings)
        self.initial = dict(initial or {})
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        with self._clear_errors():
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_contents()  # before the lock file, which must not be left among somebody's files
            self._lock = locked(self.path)
        try:
            with self._clear_errors():
                for leftover in self.path.glob(".round-*"):
                    shutil.rmtree(leftover)
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        assert self._lock is not None
        self._lock.close()

    # --- Reading -----------------------------------------------------------------------------------------------------

    def newest(self) -> Checkpoint | None:
        """Return the newest checkpoint; None where there is none.

        Raises
        ------
        ValueError
            The checkpoint is damaged (the error names the file, the damage and the newest whole checkpoint), has
            another format, or belongs to a run with other settings (the error names them).
        """
        rounds = self._rounds()
        if not rounds:
            return None
        folder = self._folder(rounds[-1])
        try:
            state = _read_state(folder)
        except _Damaged as error:
            whole = next((number for number in reversed(rounds[:-1]) if self._is_whole(number)), None)
            way_on = (
                "no older checkpoint is whole: start anew in another folder"
                if whole is None
                else f"{_name(whole)} is whole: to go on from it, delete "
                f"{', '.join(_name(number) for number in rounds if number > whole)}"
            )
            raise ValueError(f"checkpoint {folder}, {error}; {way_on}") from error
        if state["format"] != FORMAT:
            raise ValueError(
                f"checkpoint {folder}: expected format {FORMAT}, found {state['format']}: finish that run with the "
                "version of fedfrom that wrote it, or start a new one in another folder"
            )
        if found := differences(state["settings"], self.settings):
            more = len(found) - _SHOWN
            raise ValueError(
                f"checkpoint {folder}: expected a run with its settings, found {'; '.join(found[:_SHOWN])}"
                f"{f'; and {more} more' if more > 0 else ''}; give this run those settings, or another folder"
            )
        if others := [f"{name} {old}" for name, old in state["versions"].items() if old != _VERSIONS.get(name)]:
            log.warning(
                "checkpoint %s was written by %s: the last bits may differ from there on", folder, ", ".join(others)
            )
        if others := differing(state["initial"], self.initial):
            log.warning(
                "checkpoint %s: expected the initial arrays that its run started from, found other numbers in %d of %d "
                "keys, such as %s: they are not used, the checkpoint's arrays are; to start from them, give another "
                "folder",
                folder,
                len(others),
                len(self.initial),
                ", ".join(map(repr, others[:2])),
            )
        self.initial = state["initial"]
        metrics = {
            field: {int(number): MetricRecord(record) for number, record in rounds.items()}
            for field, rounds in state["metrics"].items()
        }
        arrays = read_arrays(folder / ARRAYS, state["arrays"])
        return Checkpoint(state["round"], Result(arrays=arrays, **metrics), state["strategy"], state["random"])

    def _rounds(self) -> list[int]:
        return sorted(int(entry.name.removeprefix("round-")) for entry in self.path.iterdir() if _is_round(entry))

    def _folder(self, server_round: int) -> Path:
        return self.path / _name(server_round)

    def _is_whole(self, server_round: int) -> bool:
        try:
            _read_state(self._folder(server_round))
        except _Damaged:
            return False
        return True

    def _check_contents(self) -> None:
        """Raise ValueError where the folder holds other files: old checkpoints would be deleted beside them."""
        strange = sorted(
            entry.name for entry in self.path.iterdir() if not entry.name.startswith(".") and not _is_round(entry)
        )
        if strange:
            raise ValueError(
                f"checkpoint {self.path}: expected an empty folder, or one with a run's checkpoints alone, found "
                f"{', '.join(strange[:_SHOWN])}{' and more' if strange[_SHOWN:] else ''}"
            )

    # --- Writing -----------------------------------------------------------------------------------------------------

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, then remove all but the newest `kept`.

        Raises
        ------
        OSError
            The checkpoint could not be written. Earlier ones are unchanged.
        ValueError
            safetensors can't hold an array. The error names the key.
        """
        with self._clear_errors():
            hidden = self._write(checkpoint)
            take_place(hidden, self._folder(checkpoint.server_round))
            for number in self._rounds()[: -self.kept]:
                removed = self.path / f".{_name(number)}.removed"
                os.rename(self._folder(number), removed)  # a kill amid the removal leaves no half checkpoint
                shutil.rmtree(removed)

    def rehearse(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint and remove it again, or raise OSError: a test of whether the next one has room."""
        with self._clear_errors():
            shutil.rmtree(self._write(checkpoint))

    def _write(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint to a hidden folder, flush it to the disk, and return the folder, still to be renamed."""
        hidden = self.path / f".{_name(checkpoint.server_round)}.partial"
        arrays, layout = to_tensors(checkpoint.result.arrays)
        state = {
            "format": FORMAT,
            "round": checkpoint.server_round,
            "versions": _VERSIONS,
            "settings": self.settings,
            "initial": self.initial,
            "arrays": layout,
            "metrics": {
                field.name: {number: dict(record) for number, record in getattr(checkpoint.result, field.name).items()}
                for field in fields(Result)
                if field.name != "arrays"
            },
            "strategy": checkpoint.state,
            "random": checkpoint.random,
        }
        text = json.dumps(state, default=as_json)
        try:
            hidden.mkdir()
            save_file(arrays, hidden / ARRAYS)
            (hidden / STATE).write_text(text, encoding="utf-8")
            sums = "".join(f"{_digest(hidden / name)}  {name}\n" for name in (ARRAYS, STATE))
            (hidden / SUMS).write_text(sums, encoding="utf-8")
            flush_tree(hidden)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)  # gives a full disk its room back
            raise
        return hidden

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        """Raise errors of the file system as an OSError that says that the checkpoint's folder is meant."""
        expected = "checkpoint: expected a folder with room, and the right to write to it, found"
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, f"{expected} {error.strerror or error}", str(self.path)) from error
        except SafetensorError as error:  # not an OSError, and without an errno
            raise OSError(f"{expected} {error}: {str(self.path)!r}") from error


# --- The files -------------------------------------------------------------------------------------------------------


def _name(server_round: int) -> str:
    return f"round-{server_round:04d}"


def _is_round(path: Path) -> bool:
    number = path.name.removeprefix("round-")
    return number.isdecimal() and path.name == _name(int(number)) and path.is_dir()


def _read_state(folder: Path) -> dict[str, Any]:
    """Return the state.json of a checkpoint whose files match their digests, or raise _Damaged."""
    try:
        lines = [line.split("  ", 1) for line in (folder / SUMS).read_text("utf-8").splitlines()]
        sums = {name: digest for digest, name in lines}
    except (OSError, ValueError) as error:
        raise _Damaged(f"{SUMS}: expected digests of the other files, found {words(error)}") from error
    if sums.keys() != {ARRAYS, STATE}:
        raise _Damaged(f"{SUMS}: expected digests of {ARRAYS} and {STATE}, found those of {sorted(sums)}")
    for name in (ARRAYS, STATE):
        try:
            found = _digest(folder / name)
        except OSError as error:
            raise _Damaged(f"{name}: expected a file that can be read, found {words(error)}") from error
        if found != sums[name]:
            raise _Damaged(f"{name}: expected the sha256 {sums[name]} that {SUMS} has, found {found}")
    try:
        state = json.loads((folder / STATE).read_text("utf-8"))
    except ValueError as error:
        raise _Damaged(f"{STATE}: expected JSON, found {words(error)}") from error
    if folder.name != _name(state["round"]):
        raise _Damaged(f"{STATE}: expected the round of the folder's name, found {state['round']}")
    return state


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
