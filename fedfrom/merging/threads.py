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
from typing import TypeVar

import torch

_T = TypeVar("_T")
# entries: of what is read, below it handing out costs more than it gains; from the larger on, blocks are handed out
_SMALL, _LARGE = 1 << 15, 1 << 21
# entries that torch shares out to its threads in any case
_SHARED = 1 << 16
_pool: ContextVar[tuple[ThreadPoolExecutor, int] | None] = ContextVar("pool", default=None)


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Run torch's operations on one thread, but those of `each_block` on as many as torch had.

    Small QRs and SVDs are faster so, and their bits do not depend on the machine's cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if threads == 1:
            yield
            return
        pool = ThreadPoolExecutor(threads, initializer=_alone)
        token = _pool.set((pool, threads))
        try:
            yield
        finally:
            _pool.reset(token)
            pool.shutdown(cancel_futures=True)
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
    pool = _pool.get()
    return work if pool is None or not _SMALL <= entries < _LARGE else pool[0].submit(work).result


def each_block(length: int, block: int, work: Callable[[int, int], _T], apart: bool = False) -> list[_T]:
    """Return work(start, stop) of each block of `length` entries, in their order; `apart` has each on one thread."""
    starts = range(0, length, block)
    pool = _pool.get()

    def run(part: range) -> list[_T]:
        return [work(start, min(start + block, length)) for start in part]

    if pool is None or length < (_LARGE if apart else _SHARED):
        return run(starts)
    if not apart:
        before = torch.get_num_threads()  # more than one inside another `each_block`
        torch.set_num_threads(pool[1])
        try:
            return run(starts)
        finally:
            torch.set_num_threads(before)
    # some parts a thread: who is held up by other programs leaves more of them to the others
    size = -(-len(starts) // (4 * pool[1]))
    parts = [starts[i : i + size] for i in range(0, len(starts), size)]
    return [result for results in pool[0].map(run, parts) for result in results]
