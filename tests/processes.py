"""Processes that Flower starts on this machine: ports for them, and which of them are left."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback device that nobody listens on."""
    held = [socket.socket() for _ in range(count)]
    try:
        for each in held:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in held]
    except OSError as error:
        pytest.skip(f"needs ports on 127.0.0.1: {error}")
    finally:
        for each in held:
            each.close()


def of_home(flwr_home: str | Path) -> list[int]:
    """Return the ids of the processes with this FLWR_HOME, whoever started them, that have not ended."""
    mark = f"FLWR_HOME={flwr_home}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in entry.read_bytes().split(b"\0"):
                found.append(int(entry.parent.name))
        except OSError:  # another's, or just ended
            continue
    return found


def end(flwr_home: str | Path, patience: float = 20.0) -> None:
    """End the processes with this FLWR_HOME: asked first, and killed if they are there after so many seconds."""
    deadline = time.monotonic() + patience
    for how in (signal.SIGTERM, signal.SIGKILL):
        for identifier in of_home(flwr_home):
            try:
                os.kill(identifier, how)
            except ProcessLookupError:
                continue
        while of_home(flwr_home) and time.monotonic() < deadline:
            time.sleep(0.2)
