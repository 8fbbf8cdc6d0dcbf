"""A run of all strategies with its results, and the simulation on this machine: Flower over Ray, started once."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fedfrom.errors import BadInput
from simulations import environment
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
    with quiet(options.verbose):
        return compare(options.validated(), simulate, start)


def compare(
    options: Options, strategies: Callable[[Any, Any], Iterable[Any]], ray_started: float | None = None
) -> Path:
    """Run all strategies of the options, write and print their results, and return the results folder.

    Parameters
    ----------
    options : Options
        Of the run.
    strategies : Callable[[Experiment, Narrator], Iterable[History]]
        Runs the strategies of a prepared experiment, and returns a history of each.
    ray_started : float | None (default: None)
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
        if ray_started is not None:
            # until the first strategy starts: Ray, its client processes, their data and model
            before = {"preparing": prepared - ray_started, "starting-ray": histories[0].started - prepared}
        folder.publish(experiment, histories, before)
    narrator.table(experiment, histories)
    if ray_started is not None:
        narrator.seconds(histories, before, time.perf_counter() - ray_started)
    narrator.results(experiment, folder.path, write_page(folder.path))
    return folder.path


def simulate(experiment: Any, narrator: Any, finished: Callable[[Any], None] = lambda history: None) -> list[Any]:
    """Run a prepared experiment in Flower's simulation and return a history of every strategy.

    `finished` is called with each history when its strategy ends.
    """
    from flwr.simulation import run_simulation

    from simulations import client_app, server_app, training
    from simulations.history import History

    options: Options = experiment.options
    processes = options.processes or min(environment.cores(), options.clients)
    gpus = options.gpus_per_client if training.device().type == "cuda" else 0.0
    narrator.say(f"\nStarting Ray with {processes} client process{'es' if processes > 1 else ''} …")
    histories: list[History] = []

    def keep(history: History) -> None:
        histories.append(history)
        finished(history)

    run_simulation(
        server_app=server_app.app_for(experiment, narrator, keep),
        client_app=client_app.app,
        num_supernodes=options.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": gpus},
            "init_args": {
                "num_cpus": processes,
                "include_dashboard": False,
                "_node_ip_address": "127.0.0.1",
                "logging_level": logging.INFO if options.verbose else logging.ERROR,
                "log_to_driver": options.verbose,
            },
        },
        verbose_logging=options.verbose,
    )
    if len(histories) != len(options.strategies):
        raise RuntimeError("the simulation ended early; --verbose shows what Flower and Ray say")
    return histories
