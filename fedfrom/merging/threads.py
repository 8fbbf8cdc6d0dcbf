"""Blocks of large tensors on several threads, each operation on one: the bits do not depend on how many there are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import TypeVar

import torch

_T = TypeVar("_T")
# entries of a tensor: below, handing it out costs more than it gains; from the larger on, its blocks are handed out
_SMALL, _LARGE = 1 << 15, 1 << 21
_pool: ContextVar[tuple[ThreadPoolExecutor, int] | None] = ContextVar("pool", default=None)


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Run torch's operations on one thread, and inside blocks on as many threads as torch had.

    Small QRs and SVDs are faster so, and no bit depends on the machine's cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if threads == 1:
            yield
            return
        pool = ThreadPoolExecutor(threads)
        token = _pool.set((pool, threads))
        try:
            yield
        finally:
            _pool.reset(token)
            pool.shutdown(cancel_futures=True)
    finally:
        torch.set_num_threads(threads)


def begin(entries: int, work: Callable[[], _T]) -> Callable[[], _T]:
    """Return what waits for work() and returns its result, or raises its error.

    Parameters
    ----------
    entries : int
        Of the tensor in question. Work on one of middling size is begun at once, on another thread; on a small one it
        is done when it is waited for, and so on a large one, where `each_block` makes use of all threads.
    work : Callable[[], Any]
        What it does may depend on no context variable.
    """
    pool = _pool.get()
    if pool is None or not _SMALL <= entries < _LARGE:
        return work

    def run() -> _T:
        with torch.no_grad():  # each thread has a mode of its own
            return work()

    return pool[0].submit(run).result


def each_block(length: int, block: int, work: Callable[[int, int], _T]) -> list[_T]:
    """Return work(start, stop) of each block of `length` entries, in their order, whatever thread did it."""
    starts = range(0, length, block)
    pool = _pool.get()

    def run(part: range) -> list[_T]:
        with torch.no_grad():
            return [work(start, min(start + block, length)) for start in part]

    if pool is None or length < _LARGE:
        return run(starts)
    # some parts a thread: who is held up by other programs leaves more of them to the others
    size = -(-len(starts) // (4 * pool[1]))
    parts = [starts[i : i + size] for i in range(0, len(starts), size)]
    return [result for results in pool[0].map(run, parts) for result in results]
