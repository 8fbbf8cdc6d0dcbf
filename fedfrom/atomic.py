"""Files and folders that are there as a whole or not at all: written under a hidden name, then renamed.

What is renamed is on the disk before, so that a loss of power leaves the old or the new, as a kill does; a kill may
also leave the hidden name, which nothing reads. Rights are those that the umask leaves, as of any new file. A link in
the place is itself replaced: what it leads to stays as it is.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_STEM, _SUFFIX = 100, 20
"""Bytes of the name, and of its suffix, that the hidden one takes up: a file system allows 255 in all."""


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield the hidden name to write a file under, which takes the file's place where the block ends without error.

    Parameters
    ----------
    path : str | Path
        The file, in a folder that is there; an earlier one is replaced. The hidden name has its suffix, by which some
        libraries choose a format.

    Raises
    ------
    OSError
        It can't be written; the hidden file is gone, as after any error in the block, and the earlier one is as it was.
    """
    path = Path(path)
    _check_place(path, is_folder=False)
    suffix = path.suffix if len(os.fsencode(path.suffix)) <= _SUFFIX else ""
    hidden = _hidden(path.with_name(path.name.removesuffix(suffix)), suffix)
    # not tempfile's, which keeps others out: the kernel takes off the umask, which no process reads without setting it
    os.close(os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        mode = stat.S_IMODE(os.stat(hidden).st_mode)
        yield hidden
        os.chmod(hidden, mode)  # safetensors leaves its files to their owner alone
        flush(hidden)
        os.replace(hidden, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(hidden)
        raise
    flush(path.parent)


def write_whole(path: str | Path, data: str | bytes) -> None:
    """Write a file, text as UTF-8, that is there as a whole or not at all: see `whole_file`."""
    with whole_file(path) as hidden:
        hidden.write_bytes(data.encode() if isinstance(data, str) else data)


def staging_folder(path: Path) -> Path:
    """Make a hidden folder beside a folder's place, which `publish` will move there, and return it.

    Raises
    ------
    OSError
        It can't be made, or the place is a file's.
    """
    _check_place(path, is_folder=True)
    hidden = _hidden(path)
    os.mkdir(hidden)
    return hidden


def publish(staging: Path, path: Path) -> None:
    """Move a folder that is filled into its place, an earlier one replaced; its files get the rights of new ones.

    Raises
    ------
    OSError
        It can't be moved: an earlier folder is where it was, and `staging` is left to the caller.
    """
    mode = stat.S_IMODE(os.stat(staging).st_mode) & 0o666
    for folder, _, files in os.walk(staging):
        for name in files:
            os.chmod(os.path.join(folder, name), mode)
    flush_tree(staging)
    take_place(staging, path)


def take_place(staging: Path, path: Path) -> None:
    """Rename a folder, and flush the new name; what has the name is removed, or put back where the renaming fails."""
    previous = staging.with_name(staging.name + "-previous")
    replaces = os.path.lexists(path)
    if replaces:
        os.rename(path, previous)
    try:
        os.rename(staging, path)
    except BaseException:
        if replaces:
            os.rename(previous, path)
        raise
    flush(path.parent)
    if replaces:
        _remove(previous)


def flush(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Bring all files of a folder, then its names, to the disk."""
    for inside, _, files in os.walk(folder, topdown=False):
        for name in files:
            flush(Path(inside, name))
        flush(Path(inside))


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _check_place(path: Path, is_folder: bool) -> None:
    """Raise OSError, before the work, where a name is none that the file system takes, or another thing has it."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not is_folder and stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if is_folder and not os.path.isdir(path):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def _hidden(path: Path, suffix: str = "") -> Path:
    """Return a new hidden name beside a path: as much of its name as leaves room for the rest."""
    stem = os.fsencode(path.name)[:_STEM].decode(errors="ignore")
    return path.with_name(f".{stem}-{secrets.token_hex(4)}{suffix}")
