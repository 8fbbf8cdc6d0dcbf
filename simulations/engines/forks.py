"""How the local engine's processes start: forked from a process that has the libraries loaded, where the system can.

Never forked from the server's process: a fork of a process with torch's threads may hang.
"""

import multiprocessing
from multiprocessing.context import ForkServerContext, SpawnContext

PRELOADED = (
    "torch",
    "peft",
    "transformers.modeling_utils",
    "simulations.training",
    "simulations.worker",
    "simulations.client_app",
    "simulations.client_statistics",
    "fedfrom.client",
)
"""Modules that are imported once for all processes."""


def context() -> ForkServerContext | SpawnContext:
    """Return the way to start a process: from the one that `preload` started, or afresh on systems without it."""
    if _has_forkserver():
        return multiprocessing.get_context("forkserver")
    return multiprocessing.get_context("spawn")


def preload() -> None:
    """Start the process that the others are forked from: it imports its modules while this process goes on."""
    if _has_forkserver():
        from multiprocessing import forkserver

        context().set_forkserver_preload([*PRELOADED])
        forkserver.ensure_running()


def _has_forkserver() -> bool:
    return "forkserver" in multiprocessing.get_all_start_methods()
