"""Flower's own engine: `run_simulation`, whose clients run in Ray's actors."""

import logging

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from simulations import training
from simulations.options import Options


def run(server: ServerApp, client: ClientApp, options: Options, processes: int) -> None:
    """Run both apps with so many client processes; what the server raises is no error here, but ends the run early."""
    from flwr.simulation import run_simulation

    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=options.clients,
        backend_config={
            "client_resources": {
                "num_cpus": 1,
                "num_gpus": options.gpus_per_client if training.device().type == "cuda" else 0.0,
            },
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
