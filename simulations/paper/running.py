"""The work done: in this process, or several pieces at a time in others."""

import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from simulations import training
from simulations.paper.options import PaperOptions
from simulations.paper.pieces import Bench, Piece, pieces
from simulations.study import Study


def run(options: PaperOptions, study: Study) -> None:
    """Do what is missing, each piece as soon as what it needs is there.

    Parameters
    ----------
    options : PaperOptions
        `processes` of them at a time (0: one a core, and one alone where there is a GPU), one thread each.
    study : Study
        Keeps the results.
    """
    left = {piece.name: piece for piece in pieces(options) if study.get(piece.name) is None}
    alone = 1 if training.device().type == "cuda" else training.cores()
    processes = min(options.processes or alone, max(len(left), 1))
    if processes == 1:
        for name in left:
            study.put(name, _work(options, str(study.folder), name))
        return
    # a fork of a process whose torch has threads may hang
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_quiet) as pool:
        running: dict[Future[dict[str, Any]], str] = {}
        while left or running:
            for piece in _ready(left, study)[: processes - len(running)]:
                running[pool.submit(_work, options, str(study.folder), piece.name)] = piece.name
                del left[piece.name]
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                study.put(running.pop(future), future.result())


def _ready(left: dict[str, Piece], study: Study) -> list[Piece]:
    return [piece for piece in left.values() if all(study.get(need) is not None for need in piece.needs)]


def _quiet() -> None:
    from simulations import environment

    environment.quiet()


@lru_cache(maxsize=1)
def _bench(options: PaperOptions, folder: str) -> tuple[Bench, dict[str, Piece]]:
    import torch

    torch.set_num_threads(1)
    return Bench(options, Path(folder)), {piece.name: piece for piece in pieces(options)}


def _work(options: PaperOptions, folder: str, name: str) -> dict[str, Any]:
    """Return one piece's result, with what it took."""
    bench, known = _bench(options, folder)
    start, cpu = time.perf_counter(), time.process_time()
    result = known[name].compute(bench)
    took = {"seconds": time.perf_counter() - start, "cpu-seconds": time.process_time() - cpu}
    return {**result, "took": took}
