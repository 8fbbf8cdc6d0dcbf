"""Who runs the clients of the local engine: this process, one client after the other, or a pool of processes."""

from __future__ import annotations

import contextlib
import signal
import time
from collections import deque
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection, wait

from flwr.common.constant import ErrorCode

from simulations.engines.forks import start_method
from simulations.engines.jobs import Client, Job, Outcome, failed, set_task_identity, work

GRACE = 5.0
"""Seconds for a process that closed its connection to end by itself, with an exit code of its own."""


class InTurn:
    """Runs clients in this process, one after the other, each when its reply is first asked for.

    For a GPU, which one process uses best. A client that hangs, or that ends its process, ends the run.

    Parameters
    ----------
    client : Client
        The ClientApp.

    Attributes
    ----------
    errors : list[Exception]
        What clients raised.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self.errors: list[Exception] = []
        self._waiting: dict[str, Job] = {}

    def submit(self, job: Job) -> None:
        """Take a job for later."""
        self._waiting[job.message_id] = job

    def finished(self, message_ids: Collection[str]) -> list[Outcome]:
        """Do these jobs, in the order in which they came, and return what came of them."""
        jobs = [job for message_id, job in self._waiting.items() if message_id in message_ids]
        for job in jobs:
            del self._waiting[job.message_id]
        return [self._outcome(job) for job in jobs]

    def _outcome(self, job: Job) -> Outcome:
        try:
            return work(self.client, job)
        except Exception as error:
            self.errors.append(error)
            return failed(job, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, error)

    def wait(self, seconds: float) -> None:
        """Let time pass: no client works in the meantime."""
        time.sleep(seconds)

    def close(self) -> None:
        """Forget what was not done."""
        self._waiting.clear()


class Pool:
    """Runs clients in worker processes that stay for the whole run.

    A process that dies, or takes longer than `timeout` for one message, is replaced; its client gives an error reply.
    The bound does not hold for a process that stops in the middle of a reply's bytes. Jobs are given out, and outcomes
    taken, while the server sends messages or waits for replies, not while it works on a reply. A script that makes a
    pool starts with `if __name__ == "__main__":`, since processes import it.

    Parameters
    ----------
    load : Callable[[], Client]
        Returns the ClientApp. It is pickled, and called once in each process.
    processes : int
        Number of processes.
    timeout : float
        Seconds for one message.
    """

    def __init__(self, load: Callable[[], Client], processes: int, timeout: float) -> None:
        self._load, self._timeout = load, timeout
        self._queue: deque[Job] = deque()
        self._done: dict[str, Outcome] = {}
        self._processes = [_Process(load) for _ in range(processes)]

    def submit(self, job: Job) -> None:
        """Give a job to a process that is free, or keep it until one is."""
        self._queue.append(job)
        self._assign()

    def finished(self, message_ids: Collection[str]) -> list[Outcome]:
        """Return the outcomes of these messages that are there."""
        for place, process in enumerate(self._processes):
            outcome = process.outcome(self._timeout)
            if outcome is not None:
                self._done[outcome.message_id] = outcome
            if process.is_gone:
                self._processes[place] = _Process(self._load)
        self._assign()
        return [self._done.pop(message_id) for message_id in list(self._done) if message_id in message_ids]

    def _assign(self) -> None:
        for place, process in enumerate(self._processes):
            if not self._queue or process.job is not None:
                continue
            if not process.is_alive:  # it died while it was free: no client's fault
                process.end()
                process = self._processes[place] = _Process(self._load)
            process.give(self._queue.popleft())

    def wait(self, seconds: float) -> None:
        """Wait until a process that works has replied or died, at most so long."""
        working = [process.connection for process in self._processes if process.job is not None]
        if working:
            wait(working, seconds)
        else:
            time.sleep(seconds)

    def close(self) -> None:
        """End all processes, whatever they do."""
        for process in self._processes:
            process.end()


class _Process:
    """One process of the pool, the connection to it, and the job that it does."""

    def __init__(self, load: Callable[[], Client]) -> None:
        start = start_method()
        self.connection, theirs = start.Pipe()
        # daemon: it does not outlive this process
        self._process = start.Process(target=_serve, args=(theirs, load), daemon=True)
        self._process.start()
        theirs.close()
        self.job: Job | None = None
        self.is_gone = self._is_ready = False
        self._since = 0.0

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.is_alive()

    def give(self, job: Job) -> None:
        """Give it a job, which is sent once it has loaded its client; it must be free."""
        self.job, self._since = job, time.monotonic()
        self._send()

    def _send(self) -> None:
        if self._is_ready:  # before that nobody reads, and a large message would block the server
            self._since = time.monotonic()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died: `outcome` finds that
                self.connection.send(self.job)

    def outcome(self, timeout: float) -> Outcome | None:
        """Return what came of its job, None while it works, or where it has none."""
        if self.job is None:
            return None
        job, seconds = self.job, time.monotonic() - self._since
        try:
            if self.connection.poll():
                outcome: Outcome | None = self.connection.recv()
                if outcome is not None:
                    self.job = None
                    return outcome
                self._is_ready = True
                self._send()
                return None
        except (EOFError, ConnectionResetError):
            self._process.join(GRACE)
            self.end()
            reason = f"the client's process ended with exit code {self._process.exitcode}"
            return failed(job, ErrorCode.CLIENT_APP_CRASHED, reason)
        if seconds > timeout:
            self.end()
            reason = f"the client did not reply within {timeout:g} s"
            return failed(job, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, reason)
        return None

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.join()
        self.connection.close()
        self.job, self.is_gone = None, True


def _serve(connection: Connection, load: Callable[[], Client]) -> None:
    """Do jobs until the other end of the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    set_task_identity()
    client, error = None, None
    try:
        client = load()
    except Exception as raised:
        error = raised
    # what a client raises is caught where it works: these errors are of the connection to the server, which is gone
    with contextlib.suppress(EOFError, OSError):
        connection.send(None)  # ready
        while True:
            connection.send(_outcome(client, error, connection.recv()))


def _outcome(client: Client | None, error: Exception | None, job: Job) -> Outcome:
    if client is None:
        return failed(job, ErrorCode.LOAD_CLIENT_APP_EXCEPTION, error or "no client")
    try:
        return work(client, job)
    except Exception as raised:
        return failed(job, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, raised)
