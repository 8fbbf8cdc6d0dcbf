"""What the server does: rounds of training, and a score of the merged adapter after each."""

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

import task
from fedfrom import FedFroM  # in place of Flower's FedAvg

app = ServerApp()


def score(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    net = task.model()
    set_peft_model_state_dict(net, arrays.to_torch_state_dict())
    return MetricRecord({"accuracy": task.accuracy(net, task.batches(seed=9, count=8))})


@app.main()
def main(grid: Grid, context: Context) -> None:
    net, config = task.model(), context.run_config
    strategy = FedFroM(fraction_evaluate=0.0)
    initial = ArrayRecord(get_peft_model_state_dict(net))
    result = strategy.start(grid=grid, initial_arrays=initial, num_rounds=int(config["rounds"]), evaluate_fn=score)
    set_peft_model_state_dict(net, result.arrays.to_torch_state_dict())
    net.save_pretrained(str(config["out"]))  # PeftModel.from_pretrained loads it
    for server_round, metrics in result.evaluate_metrics_serverapp.items():
        print(f"round {server_round}: accuracy {metrics['accuracy']:.3f}")
