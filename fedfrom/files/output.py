"""A folder that appears as a whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from fedfrom.files.errors import BadInput

# what says of a folder that it holds a model or an adapter, and nothing that --force should not remove
_MARKS = ("adapter_config.json", "config.json")


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
            held = os.listdir(path)
            weights = any(name.endswith(".safetensors") for name in held) and any(mark in held for mark in _MARKS)
            if held and (not weights or any(os.path.isdir(path / name) for name in held)):
                raise BadInput(f"{path}: expected a model or an adapter to replace, found other files: remove them")

    def __enter__(self) -> Path:
        """Return the folder to fill."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._staging = Path(tempfile.mkdtemp(prefix=f".{self.path.name[:100]}-", dir=self.path.parent))
            umask = os.umask(0)
            os.umask(umask)
            self._staging.chmod(0o777 & ~umask)  # mkdtemp keeps others out
        except (OSError, ValueError) as error:
            raise self._unwritable(error) from None
        return self._staging

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._publish()
        except OSError as failed:
            raise self._unwritable(failed) from None
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
        if isinstance(error, OSError):
            raise self._unwritable(error) from None

    def _publish(self) -> None:
        for entry in (*self._staging.iterdir(), self._staging):
            _sync(entry)
        previous = self._staging.with_name(self._staging.name + "-previous")
        replaces = os.path.lexists(self.path)
        if replaces:
            self.path.rename(previous)
        try:
            self._staging.rename(self.path)
        except OSError:
            if replaces:
                previous.rename(self.path)
            raise
        _sync(self.path.parent)
        shutil.rmtree(previous, ignore_errors=True)

    def _unwritable(self, error: OSError | ValueError) -> BadInput:
        reason = getattr(error, "strerror", None) or error
        return BadInput(f"{str(self.path)!r}: can't be written: {reason}; nothing was left behind")


def _real(path: Path) -> Path:
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise BadInput(f"{str(path)!r}: expected a path, found {error}") from None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
