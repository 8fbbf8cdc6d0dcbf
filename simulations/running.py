"""A run of all strategies with its results, and the simulation on this machine, whose engine is started once."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fedfrom.errors import BadInput
from simulations import environment
from simulations.engines import forks
from simulations.options import OWN, Options

# Phrases of warnings that Flower logs in every run.
CHATTER = ("deprecated", "DEPRECATED", "fraction_evaluate is set to 0.0")


class _Chatter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return record.levelno >= logging.WARNING and not any(phrase in text for phrase in CHATTER)


@contextlib.contextmanager
def quiet(verbose: bool) -> Iterator[None]:
    """Silence Flower's logger below warnings, and the warnings of every run, unless `verbose`."""
    # A filter, not a level: Flower's first import sets the logger's level.
    logger, chatter = logging.getLogger("flwr"), _Chatter()
    if not verbose:
        logger.addFilter(chatter)
    try:
        yield
    finally:
        logger.removeFilter(chatter)


def run(options: Options) -> Path:
    """Run a simulation on this machine and return the folder with its results.

    Raises
    ------
    BadInput
        An option, folder or package can't be used; nothing was written.
    """
    start = time.perf_counter()
    environment.prepare(options.needs_hub)
    if options.partition == OWN:
        raise BadInput("--partition own: every client of a simulation reads the same folder; deploy (see deployment/)")
    if options.engine == "local":
        forks.preload()
    with quiet(options.verbose):
        return compare(options.validated(), simulate, start)


def compare(options: Options, strategies: Callable[[Any, Any], Iterable[Any]], started: float | None = None) -> Path:
    """Run all strategies of the options, write and print their results, and return the results folder.

    Parameters
    ----------
    options : Options
        Of the run.
    strategies : Callable[[Experiment, Narrator], Iterable[History]]
        Runs the strategies of a prepared experiment, and returns a history of each.
    started : float | None (default: None)
        The start of a simulation, by `time.perf_counter`. None: a deployment, whose clients run already.

    Raises
    ------
    BadInput
        An option, folder or package can't be used; nothing was written.
    """
    from simulations.narration import Narrator
    from simulations.results import Folder, write_page

    narrator, before = Narrator(), {}
    with Folder(options.out) as folder:
        from simulations.experiment import Experiment

        experiment = Experiment.prepare(options)
        narrator.settings(experiment)
        narrator.partition(experiment)
        prepared = time.perf_counter()
        histories = list(strategies(experiment, narrator))
        if started is not None:
            # until the first strategy starts: the client processes, and what they load
            before = {"preparing": prepared - started, "starting-clients": histories[0].started - prepared}
        folder.publish(experiment, histories, before)
    narrator.table(experiment, histories)
    if started is not None:
        narrator.seconds(histories, before, time.perf_counter() - started)
    narrator.results(experiment, folder.path, write_page(folder.path))
    return folder.path


def simulate(experiment: Any, narrator: Any, finished: Callable[[Any], None] = lambda history: None) -> list[Any]:
    """Run a prepared experiment on this machine, by the engine of its options, and return each strategy's history.

    `finished` is called with each history when its strategy ends.

    Raises
    ------
    RuntimeError
        A client can't start, or every client failed in a round.
    """
    from simulations import client_app, server_app, training
    from simulations.engines import local, ray
    from simulations.history import History

    options: Options = experiment.options
    processes = options.processes or min(environment.cores(), options.clients)
    histories: list[History] = []

    def keep(history: History) -> None:
        histories.append(history)
        finished(history)

    server = server_app.app_for(experiment, narrator, keep)
    if options.engine == "ray":
        narrator.say(f"\nStarting Ray with {_processes(processes)} …")
        ray.run(server, client_app.app, options, processes)
        if len(histories) != len(options.strategies):
            raise RuntimeError("the simulation ended early; --verbose shows what Flower and Ray say")
        return histories
    on_gpu = training.device().type == "cuda"
    narrator.say("\nClients take turns on the GPU …" if on_gpu else f"\nStarting {_processes(processes)} …")
    local.run(server, experiment, processes)
    return histories


def _processes(number: int) -> str:
    return f"{number} client process{'es' if number > 1 else ''}"
