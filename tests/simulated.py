"""A run with checkpoints in a real Ray simulation, to be killed: `python -m tests.simulated FOLDER OUT ROUNDS RAY`."""

import json
import sys
import time
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedfrom import FedFroM
from tests.killed import outcome, score
from tests.models import mixed_state, noisy, record_of

NODES = 2
NAP = 1.0
"""Seconds that a client takes to train: rounds must last long enough to be killed in."""

client_app = ClientApp()
server_app = ServerApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    time.sleep(NAP)
    return noisy(message, context)


@client_app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return noisy(message, context)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    folder, out, rounds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    strategy = FedFroM(checkpoint=folder, min_available_nodes=NODES)
    arrays = record_of(mixed_state())
    result = strategy.start(grid, arrays, num_rounds=rounds, evaluate_fn=score)
    out.write_text(json.dumps(outcome(strategy, result)))


if __name__ == "__main__":
    from flwr.simulation import run_simulation

    run_simulation(
        server_app,
        client_app,
        num_supernodes=NODES,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {
                "num_cpus": 1,
                "include_dashboard": False,
                "_node_ip_address": "127.0.0.1",
                "_temp_dir": sys.argv[4],  # what a killed Ray leaves there goes with it
            },
        },
    )
