"""The lock of a run's folder, which keeps a second run out of it."""

from __future__ import annotations

import logging
import os
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import IO

log = logging.getLogger("flwr")  # where Flower's own strategies log


def locked(folder: Path) -> IO[str]:
    """Return the folder's lock file, locked until it is closed or this process ends, however it ends.

    Raises
    ------
    ValueError
        Another process has the lock.
    OSError
        The lock file can't be opened or written.
    """
    import fcntl  # not on Windows, where fedfrom can still be imported

    with ExitStack() as stack:
        lock = stack.enter_context(open(folder / ".lock", "a+", encoding="utf-8"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            raise ValueError(
                f"checkpoint {folder}: expected a folder that no other run uses, found it in use by {owner}"
            ) from None
        except OSError as error:  # some network file systems have no locks
            log.warning("checkpoint %s can't be locked (%s): let no other run use it", folder, error)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        stack.pop_all()
    return lock
