"""Computes the missing cells of a study: in this process, or several groups of cells at a time in others."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from multiprocessing import get_context

import pandas as pd

from simulations import environment
from simulations.studies.frame import Frame
from simulations.studies.study import Cell, Done, Run

Say = Callable[[str], None]


def run(frame: Frame, processes: int = 1, say: Say = print) -> None:
    """Compute the missing cells, each group of cells as soon as the cells that it needs are finished.

    Parameters
    ----------
    frame : Frame
        The study's frame, to which finished cells are added.
    processes : int
        Number of processes at a time.
    say : Callable[[str], None]
        Called with a line of progress for each cell.
    """
    missing = frame.missing()
    groups = [list(cells) for _, cells in itertools.groupby(missing, key=lambda cell: cell.group or cell.name)]
    progress, compute = _Progress(frame, missing, say), frame.study.run
    if min(processes, len(groups)) <= 1:
        for group in groups:
            for done in _timed(compute, group, frame.rows()):
                progress.add(done)
        return
    # spawn: a fork of a process with torch's threads may hang
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=environment.quiet) as pool:
        running: set[Future[list[Done]]] = set()
        while groups or running:
            for group in ready(groups, frame)[: processes - len(running)]:
                running.add(pool.submit(_work, compute, group, frame.rows()))
                groups.remove(group)
            finished = wait(running, return_when=FIRST_COMPLETED).done
            running -= finished
            for future in finished:
                for done in future.result():
                    progress.add(done)


def ready(groups: Sequence[list[Cell]], frame: Frame) -> list[list[Cell]]:
    """Return the groups whose needed cells are finished."""
    return [group for group in groups if all(need in frame for cell in group for need in cell.needs)]


def _work(compute: Run, cells: Sequence[Cell], rows: pd.DataFrame) -> list[Done]:
    return list(_timed(compute, cells, rows))


def _timed(compute: Run, cells: Sequence[Cell], rows: pd.DataFrame) -> Iterator[Done]:
    start, cpu = time.perf_counter(), time.process_time()
    for done in compute(cells, rows):
        now, cpu_now = time.perf_counter(), time.process_time()
        yield replace(done, seconds=now - start, cpu_seconds=cpu_now - cpu)
        start, cpu = time.perf_counter(), time.process_time()


class _Progress:
    """Adds finished cells to the frame, and estimates the time left from the cells' costs and the speed so far."""

    def __init__(self, frame: Frame, missing: Sequence[Cell], say: Say) -> None:
        self._frame, self._say = frame, say
        self._left = {cell.name: cell.cost for cell in missing}
        self._all, self._start = sum(self._left.values()), time.perf_counter()

    def add(self, done: Done) -> None:
        self._frame.add(done)
        self._left.pop(done.cell.name, None)
        left, count = sum(self._left.values()), len(self._frame.study.cells)
        seconds = (time.perf_counter() - self._start) / max(self._all - left, 1e-9) * left
        finished = count - len(self._left)
        self._say(f"[{finished}/{count}] {done.cell.name} done; about {seconds / 60:.0f} min left")
