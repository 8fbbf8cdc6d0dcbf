"""Federated fine-tuning of a causal language model, as in Flower's FlowerTune, with FedFroM and unequal ranks.

    python examples/causal_lm.py

The model is a tiny Llama with random weights and the texts are made up; in your own app `model()` loads a pretrained
one.
Clients choose the rank that their machine bears: `fedfrom.client` loads the global adapter at that rank, and the
strategy's lora_config tells the server what the adapter's own is.
"""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from fedfrom import FedFroM, client

WORDS, LENGTH, RANK = 48, 16, 8
RANKS = (2, 4, 8)  # of the clients


def model(rank: int = RANK):
    """The base model, the same for all, with an adapter of this rank."""
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64}
    config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.2)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules, task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), lora)


def texts(seed: int, count: int):
    """Made-up texts in which each word follows from the one before it."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        first = torch.randint(0, WORDS, (16, 1), generator=generator)
        yield (first + 5 * torch.arange(LENGTH)) % WORDS


client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train the global adapter, cut to this client's rank, on its texts."""
    number = int(context.node_config["partition-id"])
    net = model(RANKS[number % len(RANKS)])
    client.load(net, message)
    optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=2e-2)
    losses = []
    for words in texts(100 * int(message.content["config"]["server-round"]) + number, 15):
        loss = net(input_ids=words, labels=words).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return client.reply(net, message, metrics={"num-examples": 240, "loss": sum(losses) / len(losses)})


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Loss of the global model on texts that no client has."""
    from peft import set_peft_model_state_dict

    net = model().eval()
    set_peft_model_state_dict(net, arrays.to_torch_state_dict())
    with torch.no_grad():
        losses = [float(net(input_ids=words, labels=words).loss) for words in texts(9, 4)]
    return MetricRecord({"loss": sum(losses) / len(losses)})


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Five rounds."""
    net = model()
    strategy = FedFroM(lora_config=net.peft_config["default"], fraction_evaluate=0.0)
    initial = ArrayRecord(client.adapter_state(net))
    result = strategy.start(grid=grid, initial_arrays=initial, num_rounds=5, evaluate_fn=evaluate)
    for server_round, metrics in result.evaluate_metrics_serverapp.items():
        print(f"round {server_round}: loss {metrics['loss']:.3f}")


if __name__ == "__main__":
    from flwr.simulation import run_simulation

    run_simulation(server_app, client_app, num_supernodes=3, backend_config={"client_resources": {"num_cpus": 1}})
