"""Three clients train one model federatedly, each with an adapter of the rank that its machine can afford.

A small network with random weights stands in for a pretrained model. Each client sees inputs of a kind of its own, and
all labels come from one rule. Run it with `python examples/unequal_ranks.py`; it needs `fedfrom[simulation]`.
"""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from fedfrom import FedFroM, client

WIDTH, RANKS = 48, (2, 4, 8)
client_app, server_app = ClientApp(), ServerApp()


def adapted(rank: int) -> PeftModel:
    """Return the pretrained model, the same every time, with a fresh adapter of a rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2))
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0", "2"]))


def batch(partition: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return inputs and labels of a client: a third of the inputs is loud there, the others are faint."""
    third = WIDTH // len(RANKS)
    x = torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(1000 * partition + seed))
    loud = torch.full((WIDTH,), 0.1)
    loud[third * partition : third * (partition + 1)] = 1.0
    x *= loud
    rule = torch.randn(WIDTH, generator=torch.Generator().manual_seed(7))
    return x, (x @ rule > 0).long()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train the global adapter's leading rows and columns: the best approximation at this client's rank."""
    partition = int(context.node_config["partition-id"])
    model = adapted(RANKS[partition])
    client.load(model, message)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for step in range(30):
        x, y = batch(partition, 32, seed=100 * int(message.content["config"]["server-round"]) + step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return client.reply(model, message, metrics={"num-examples": 960})


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Return the global model's share of right answers on inputs of each client's kind."""
    model = adapted(max(RANKS))
    set_peft_model_state_dict(model, arrays.to_torch_state_dict())
    model.eval()
    found = {}
    with torch.no_grad():
        for partition, rank in enumerate(RANKS):
            x, y = batch(partition, 2000, seed=999)
            found[f"rank-{rank}"] = float((model(x).argmax(dim=1) == y).float().mean())
    return MetricRecord(found)


def run(grid: Grid, rounds: int = 4) -> Result:
    """Run the rounds from a fresh global adapter, which has the largest rank."""
    model = adapted(max(RANKS))
    strategy = FedFroM(lora_config=model.peft_config["default"], fraction_evaluate=0.0, min_available_nodes=len(RANKS))
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    return strategy.start(grid, arrays, num_rounds=rounds, evaluate_fn=evaluate)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run, and say how well the global model does."""
    for server_round, metrics in run(grid).evaluate_metrics_serverapp.items():
        print(f"round {server_round}:", ", ".join(f"{name} {value:.2f}" for name, value in metrics.items()))


if __name__ == "__main__":
    from flwr.simulation import run_simulation

    run_simulation(server_app, client_app, num_supernodes=len(RANKS))
