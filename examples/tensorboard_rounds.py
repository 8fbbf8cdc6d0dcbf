"""What each round did, in TensorBoard: the strategy's on_round hook.

    python examples/tensorboard_rounds.py
    tensorboard --logdir runs/tensorboard

The hook gets each round's report once the round is over. Weights & Biases and MLflow take the same numbers:
`wandb.log(numbers, step=report.server_round)` and `mlflow.log_metrics(numbers, step=report.server_round)`.
"""

import sys
from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from lora_classifier import client_app, evaluate, model
from peft import get_peft_model_state_dict
from torch.utils.tensorboard import SummaryWriter

from fedfrom import FedFroM

server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Three rounds, told to TensorBoard."""
    with SummaryWriter(str(context.run_config.get("logdir", "runs/tensorboard"))) as writer:

        def on_round(report):
            for name, number in report.numbers().items():
                writer.add_scalar(name, number, report.server_round)
            for layer in report.merge.layers if report.merge else []:
                for node, weight in zip(report.nodes, layer.weights, strict=False):
                    writer.add_scalar(f"weights/{layer.name}/{node}", weight, report.server_round)

        strategy = FedFroM(fraction_evaluate=0.0, on_round=on_round)
        initial = ArrayRecord(get_peft_model_state_dict(model()))
        strategy.start(grid=grid, initial_arrays=initial, num_rounds=3, evaluate_fn=evaluate)


if __name__ == "__main__":
    from flwr.simulation import run_simulation

    sys.path.insert(0, str(Path(__file__).parent))  # for Ray's workers
    run_simulation(server_app, client_app, num_supernodes=4, backend_config={"client_resources": {"num_cpus": 1}})
