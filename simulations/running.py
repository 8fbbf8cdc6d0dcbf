"""One simulated federation on this machine: Flower over Ray, started once for all strategies."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedfrom.errors import BadInput
from simulations import environment
from simulations.options import OWN, Options

# Said by Flower in every run; none of it is about the run.
CHATTER = ("deprecated", "DEPRECATED", "fraction_evaluate is set to 0.0")


class _Chatter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return record.levelno >= logging.WARNING and not any(phrase in text for phrase in CHATTER)


@contextlib.contextmanager
def quiet(verbose: bool) -> Iterator[None]:
    """Let Flower's logger through from warnings on only, and without those that every run has."""
    # A filter, not a level: Flower sets its logger's level whenever it is imported first.
    logger, chatter = logging.getLogger("flwr"), _Chatter()
    if not verbose:
        logger.addFilter(chatter)
    try:
        yield
    finally:
        logger.removeFilter(chatter)


def run(options: Options) -> Path:
    """Run a simulation and return the folder with its results.

    Raises
    ------
    BadInput
        An option, folder or package can't be used; nothing was written.
    """
    start = time.perf_counter()
    environment.prepare(options.needs_hub)
    from simulations.narration import Narrator
    from simulations.results import Folder, write_page

    if options.partition == OWN:
        raise BadInput("--partition own: every client of a simulation reads the same folder; deploy (see deployment/)")
    narrator = Narrator()
    with Folder(options.validated().out) as folder, quiet(options.verbose):
        from simulations.experiment import Experiment

        experiment = Experiment.prepare(options)
        narrator.settings(experiment)
        narrator.partition(experiment)
        prepared = time.perf_counter()
        histories = simulate(experiment, narrator)
        # until the first strategy sends its first message: Ray, its client processes, their data and model
        before = {"preparing": prepared - start, "starting-ray": histories[0].started - prepared}
        folder.publish(experiment, histories, before)
    narrator.table(experiment, histories)
    narrator.seconds(histories, before, time.perf_counter() - start)
    narrator.say(
        f"Results in {folder.path} after {time.perf_counter() - start:.0f} s: results.json, comparison.png, "
        f"updates.png, partition.png and the final {'models' if experiment.options.full else 'adapters'}"
        f"{', and each client' + chr(39) + 's' if experiment.options.save_clients else ''}"
    )
    narrator.say(write_page(folder.path))
    return folder.path


def simulate(experiment: Any, narrator: Any, finished: Callable[[Any], None] = lambda history: None) -> list[Any]:
    """Run a prepared experiment in Flower's simulation and return a history of every strategy.

    Each history is handed to `finished` as soon as its strategy has ended.
    """
    from flwr.simulation import run_simulation

    from simulations import client_app, server_app, training
    from simulations.history import History

    options: Options = experiment.options
    processes = options.processes or min(training.cores(), options.clients)
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
