"""A watch over what code does meanwhile."""

import contextlib
import os
import signal
import sys
import sysconfig
from collections.abc import Iterator
from typing import Any

from tests.conftest import ROOT

_HARMFUL = ("pickle.find_class", "os.system", "os.exec", "subprocess.Popen", "socket.connect", "os.remove", "os.rename")


_READABLE = tuple(
    os.path.realpath(path)
    for path in {sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), str(ROOT), "/proc", "/sys", "/dev"}
)


_watching: list[list[str]] = []


_hooked: list[bool] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event in _HARMFUL:
        _watching[-1].append(f"{event} {args!r:.200}")
    elif event == "open" and isinstance(args[0], str | bytes):
        path, mode, flags = os.path.realpath(os.fsdecode(args[0])), args[1], args[2]
        writes = bool(set(mode or "") & set("wax+")) or bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        # what Python caches of its own modules is no file of ours
        if not path.endswith(".pyc") and "__pycache__" not in path and (writes or not path.startswith(_READABLE)):
            _watching[-1].append(f"open {path} {mode}")


@contextlib.contextmanager
def harmless(*allowed: str) -> Iterator[None]:
    """Assert that nothing is unpickled, run or connected to, and no file written, or read but those `allowed`."""
    if not _hooked:
        sys.addaudithook(_audit)  # can't be taken off: it stays, idle
        _hooked.append(True)
    _watching.append([])
    try:
        yield
    finally:
        seen = _watching.pop()
    paths = [os.path.realpath(path) for path in allowed]
    assert not (harm := [event for event in seen if not any(path in event for path in paths)]), harm


@contextlib.contextmanager
def soon(seconds: float) -> Iterator[None]:
    """Assert that something takes less CPU time than this; regular expressions can be interrupted too."""

    def late(number: int, frame: Any) -> None:
        raise AssertionError(f"took more than {seconds} s of CPU time")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
