"""The local engine: both apps without Ray. Clients run in processes, one a core, or take turns on a GPU."""

import tempfile
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from simulations import client_app, environment, models, training, worker
from simulations.engines import forks
from simulations.engines.grid import LocalGrid, Workers
from simulations.engines.jobs import SERVER
from simulations.engines.workers import InTurn, Pool
from simulations.options import Options


def run(server: ServerApp, experiment: Any, processes: int) -> None:
    """Run the server's app with the simulation's clients.

    The clients' data are read, divided and tokenised once, here: their processes share the tokens.

    Parameters
    ----------
    server : ServerApp
        Its errors are raised here.
    experiment : Experiment
        Names the clients, and has their data.
    processes : int
        Number of client processes. With a GPU there is none: clients take turns in this process.
    """
    options: Options = experiment.options
    environment.prepare(options.needs_hub)
    if training.device().type == "cuda":
        client_app.provide(worker.of(experiment))
        serve(server, InTurn(client_app.app), options.clients, options.seed)
        return
    with tempfile.TemporaryDirectory(prefix="fedfrom-") as folder:
        forks.preload()
        tokens = Path(folder) / "clients.safetensors"
        worker.save(experiment, tokens)
        load = partial(_load, options, experiment.head, tokens)
        serve(server, Pool(load, processes, options.client_timeout), options.clients, options.seed)


def serve(server: ServerApp, workers: Workers, clients: int, seed: int = 0) -> None:
    """Run a ServerApp with clients that workers run, and end the workers."""
    with closing(workers):
        grid = LocalGrid(workers, clients, seed=seed)
        server(grid, Context(1, SERVER, node_config={}, state=RecordDict(), run_config={}))


def _load(options: Options, head: models.Head, tokens: Path) -> ClientApp:
    client_app.provide(worker.restore(options, head, tokens))
    return client_app.app
