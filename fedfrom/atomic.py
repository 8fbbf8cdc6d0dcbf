"""Files and folders that appear complete or not at all: written under a hidden name, then renamed.

Files are flushed to the disk before they are renamed, so that a kill or a loss of power leaves the old file or the new
one. A kill may also leave the hidden file, which nothing reads. The umask sets the permissions, as for any new file. A
symbolic link at the path is itself replaced; its target stays as it is.
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
"""Most bytes of a name, and of its suffix, that its hidden name repeats: file systems allow 255 in all."""


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a hidden path to write to; the file there is renamed to `path` when the block ends without an error.

    Parameters
    ----------
    path : str | Path
        The file to write, in an existing folder; an earlier file is replaced. The hidden name has the same suffix, by
        which some libraries choose a format.

    Raises
    ------
    OSError
        The file can't be written. Then, as after any error in the block, the hidden file is removed, and an earlier
        file stays as it was.
    """
    path = Path(path)
    _check_place(path, is_folder=False)
    suffix = path.suffix if len(os.fsencode(path.suffix)) <= _SUFFIX else ""
    hidden = _hidden(path.with_name(path.name.removesuffix(suffix)), suffix)
    # tempfile's files can be read by their owner alone. Here the kernel applies the umask, which can't be read without
    # setting it
    os.close(os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        mode = stat.S_IMODE(os.stat(hidden).st_mode)
        yield hidden
        os.chmod(hidden, mode)  # safetensors makes its files readable by their owner alone
        flush(hidden)
        os.replace(hidden, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(hidden)
        raise
    flush(path.parent)


def write_whole(path: str | Path, data: str | bytes) -> None:
    """Write text (as UTF-8) or bytes to a file that is there as a whole or not at all: see `whole_file`."""
    with whole_file(path) as hidden:
        hidden.write_bytes(data.encode() if isinstance(data, str) else data)


def staging_folder(path: Path) -> Path:
    """Make a hidden folder beside `path`, for `publish` to rename to `path`, and return it.

    Raises
    ------
    OSError
        The folder can't be made, or a file is at `path`.
    """
    _check_place(path, is_folder=True)
    hidden = _hidden(path)
    os.mkdir(hidden)
    return hidden


def publish(staging: Path, path: Path) -> None:
    """Rename a filled staging folder to `path`, in place of an earlier folder; its files get new files' permissions.

    Raises
    ------
    OSError
        The folder can't be renamed. An earlier folder stays where it was; the caller removes `staging`.
    """
    mode = stat.S_IMODE(os.stat(staging).st_mode) & 0o666
    for folder, _, files in os.walk(staging):
        for name in files:
            os.chmod(os.path.join(folder, name), mode)
    flush_tree(staging)
    take_place(staging, path)


def take_place(staging: Path, path: Path) -> None:
    """Rename a folder to `path` and flush the name; an earlier one is removed, or put back if the renaming fails."""
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
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Flush all files of a folder, then its list of names, to the disk."""
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
    """Raise OSError, before any work, where a path is invalid, or has a folder in place of a file or the reverse."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not is_folder and stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if is_folder and not os.path.isdir(path):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def _hidden(path: Path, suffix: str = "") -> Path:
    """Return a new hidden path in the same folder: a dot, the name or its start, random digits and the suffix."""
    stem = os.fsencode(path.name)[:_STEM].decode(errors="ignore")
    return path.with_name(f".{stem}-{secrets.token_hex(4)}{suffix}")
