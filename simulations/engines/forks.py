"""How the local engine's processes start: forked from a process that has the libraries loaded, where the system can.

Never forked from the server's process: a fork of a process with torch's threads may hang.
"""

import multiprocessing
import signal
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


def start_method() -> ForkServerContext | SpawnContext:
    """Return the way to start a process: a fork of the process that `preload` started, or afresh where none can be."""
    if _has_forkserver():
        return multiprocessing.get_context("forkserver")
    return multiprocessing.get_context("spawn")


def preload() -> None:
    """Start the process that the others are forked from: it imports its modules while this process goes on.

    It keeps the environment of the first call. Ctrl-C does not reach it, nor its forks: ending them is the server's.
    """
    if _has_forkserver():
        from multiprocessing import forkserver, resource_tracker

        start_method().set_forkserver_preload([*PRELOADED])
        resource_tracker.ensure_running()  # it would let Ctrl-C through again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which a new process inherits
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _has_forkserver() -> bool:
    return "forkserver" in multiprocessing.get_all_start_methods()
