"""What each round did, in TensorBoard: the strategy's on_round hook.

    python examples/tensorboard_rounds.py
    tensorboard --logdir runs/tensorboard

The hook gets each round's report once the round is over. `fedfrom.loggers` has one for Weights & Biases, for MLflow and
for a CSV file too, and `several` calls a few; a function of your own takes the report as its only argument.
"""

import sys
from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from lora_classifier import client_app, evaluate, model
from peft import get_peft_model_state_dict

from fedfrom import FedFroM, loggers

server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Three rounds, told to TensorBoard."""
    folder = str(context.run_config.get("logdir", "runs/tensorboard"))
    strategy = FedFroM(fraction_evaluate=0.0, on_round=loggers.TensorBoard(folder, layers=True))
    initial = ArrayRecord(get_peft_model_state_dict(model()))
    strategy.start(grid=grid, initial_arrays=initial, num_rounds=3, evaluate_fn=evaluate)


if __name__ == "__main__":
    from flwr.simulation import run_simulation

    sys.path.insert(0, str(Path(__file__).parent))  # for Ray's workers
    run_simulation(server_app, client_app, num_supernodes=4, backend_config={"client_resources": {"num_cpus": 1}})
