"""Files and folders that appear complete or not at all: written under a hidden name, then renamed.

The content is flushed to the disk before the renaming, so that after a loss of power, as after a kill, the place has
either the old content or the new. A kill may also leave the hidden file or folder, which nothing reads. Permissions
are those of any new file, by the umask. A link in the place is replaced itself; its target does not change.
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
"""Most bytes of a file's name and of its suffix in the hidden name: file systems allow names of 255 bytes."""


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a hidden path to write to; the hidden file replaces the real one when the block ends without an error.

    Parameters
    ----------
    path : str | Path
        The file, in an existing folder; an earlier file is replaced. The hidden path has the same suffix, by which some
        libraries choose a format.

    Raises
    ------
    OSError
        The file can't be written. As after any error in the block, the hidden file is removed and an earlier file is
        unchanged.
    """
    path = Path(path)
    _check_place(path, is_folder=False)
    suffix = path.suffix if len(os.fsencode(path.suffix)) <= _SUFFIX else ""
    hidden = _hidden(path.with_name(path.name.removesuffix(suffix)), suffix)
    # not by tempfile, whose files only their owner may read: the kernel applies the umask, which no process can read
    # without setting it
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
    """Write a file that appears complete or not at all, text as UTF-8: see `whole_file`."""
    with whole_file(path) as hidden:
        hidden.write_bytes(data.encode() if isinstance(data, str) else data)


def staging_folder(path: Path) -> Path:
    """Make and return a hidden folder beside `path`, to be filled and then moved to `path` by `publish`.

    Raises
    ------
    OSError
        It can't be made, or `path` is a file.
    """
    _check_place(path, is_folder=True)
    hidden = _hidden(path)
    os.mkdir(hidden)
    return hidden


def publish(staging: Path, path: Path) -> None:
    """Move a filled folder to `path`, replacing an earlier one; its files get the permissions of new files.

    Raises
    ------
    OSError
        It can't be moved. An earlier folder is back in its place, and `staging` is left for the caller to remove.
    """
    mode = stat.S_IMODE(os.stat(staging).st_mode) & 0o666
    for folder, _, files in os.walk(staging):
        for name in files:
            os.chmod(os.path.join(folder, name), mode)
    flush_tree(staging)
    take_place(staging, path)


def take_place(staging: Path, path: Path) -> None:
    """Rename a folder and flush the new name. An earlier folder is removed, or put back if the renaming fails."""
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
    """Raise OSError before any work, where the name is invalid, or a folder is in a file's place or the reverse."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not is_folder and stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if is_folder and not os.path.isdir(path):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def _hidden(path: Path, suffix: str = "") -> Path:
    """Return a new hidden path beside `path`, with its name cut to fit, a random part and the suffix."""
    stem = os.fsencode(path.name)[:_STEM].decode(errors="ignore")
    return path.with_name(f".{stem}-{secrets.token_hex(4)}{suffix}")
