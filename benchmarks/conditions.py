"""The conditions of a benchmark: command, machine and versions, as its tables name them."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import torch

from simulations.environment import command, machine


def conditions(program: str, *packages: str) -> list[str]:
    """Return the command, the machine with its load, and the versions of Python and of these packages, a line each."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    load = "{:.1f} {:.1f} {:.1f}".format(*os.getloadavg())
    return [
        f"Command: `{command(program)}`",
        f"Machine: {machine()}; {torch.get_num_threads()} threads; load average before: {load}",
        f"Versions: Python {platform.python_version()}, {versions}",
    ]
