"""What runs on several threads: work on large tensors, a block at a time. No bit depends on how many.

Blocks in memory are taken one after the other, each operation on all of torch's threads. Blocks that are read from
elsewhere are shared out to threads of our own, so that some are read while others are reckoned with; and blocks of
matrices that are multiplied, since what threads a product is shared out to may decide its bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import cached_property
from typing import TypeVar

import torch

_T = TypeVar("_T")
# entries: of what is read, below it handing out costs more than it gains; from the larger on, blocks are handed out
_SMALL, _LARGE = 1 << 15, 1 << 21
# entries that torch shares out to its threads in any case
_SHARED = 1 << 16
_threads: ContextVar[_Threads | None] = ContextVar("threads", default=None)


class _Threads:
    """So many threads, which are there when they are first needed: most layers do without."""

    def __init__(self, count: int) -> None:
        self.count = count

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.count, initializer=_alone)

    def close(self) -> None:
        if "pool" in vars(self):
            self.pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Run torch's operations on one thread and without gradients, but those of `each_block` on as many as torch had.

    Small QRs and SVDs are faster so, and their bits do not depend on the machine's cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # other threads may not write to what is made in inference mode; leaving that turns gradients on
        with torch.inference_mode(False), torch.no_grad():
            if threads == 1:
                yield
                return
            own = _Threads(threads)
            token = _threads.set(own)
            try:
                yield
            finally:
                _threads.reset(token)
                own.close()
    finally:
        torch.set_num_threads(threads)


def _alone() -> None:
    """Give a thread its own modes: torch's are each thread's, and a new one has not those of the thread before."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


def begin(entries: int, work: Callable[[], _T]) -> Callable[[], _T]:
    """Return what waits for work() and returns its result, or raises its error.

    Parameters
    ----------
    entries : int
        Of what is to be read. Work on something of middling size is begun at once, on another thread; on a small one
        it is done when it is waited for, and so on a large one, whose blocks `each_block` shares out.
    work : Callable[[], Any]
        What it does may depend on no context variable.
    """
    threads = _threads.get()
    return work if threads is None or not _SMALL <= entries < _LARGE else threads.pool.submit(work).result


def each_block(length: int, block: int, work: Callable[[int, int], _T], apart: bool = False) -> list[_T]:
    """Return work(start, stop) of each block of `length` entries, in their order; `apart` has each on one thread."""
    starts = range(0, length, block)
    threads = _threads.get()

    def run(part: range) -> list[_T]:
        return [work(start, min(start + block, length)) for start in part]

    if threads is None or length < (_LARGE if apart else _SHARED):
        return run(starts)
    if not apart:
        before = torch.get_num_threads()  # more than one inside another `each_block`
        torch.set_num_threads(threads.count)
        try:
            return run(starts)
        finally:
            torch.set_num_threads(before)
    # some parts a thread: who is held up by other programs leaves more of them to the others
    size = -(-len(starts) // (4 * threads.count))
    parts = [starts[i : i + size] for i in range(0, len(starts), size)]
    return [result for results in threads.pool.map(run, parts) for result in results]
