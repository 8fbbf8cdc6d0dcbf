"""Flower's PEFT pattern with FedFroM: LoRA on a text classifier, three lines of the server app changed.

    python examples/lora_classifier.py

The model is a tiny BERT with random weights and the data are made up, so that it runs anywhere in a minute, most of
which Flower's simulation takes to start. In your own app `model()` loads a pretrained model and `batches()` your data.
"""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import BertConfig, BertForSequenceClassification

from fedfrom import FedFroM  # changed: FedAvg

WORDS, LENGTH = 32, 8


def model():
    """The base model, the same for all, with an adapter and a head to train."""
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64}
    config = BertConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.1, hidden_dropout_prob=0.0
    )
    base = BertForSequenceClassification(config)
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS"))


def batches(seed: int, count: int):
    """Made-up texts: three words of four are of the label's half of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        labels = torch.randint(0, 2, (32, 1), generator=generator)
        words = torch.randint(0, WORDS // 2, (32, LENGTH), generator=generator)
        others = torch.rand(32, LENGTH, generator=generator) < 0.25
        yield words + WORDS // 2 * (labels ^ others), labels[:, 0]


client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train the global adapter on this client's data."""
    net = model()
    set_peft_model_state_dict(net, message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=1e-2)
    client, losses = int(context.node_config["partition-id"]), []
    for texts, labels in batches(100 * int(message.content["config"]["server-round"]) + client, 10):
        loss = net(input_ids=texts, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    metrics = MetricRecord({"num-examples": 320, "loss": sum(losses) / len(losses)})
    content = {"arrays": ArrayRecord(get_peft_model_state_dict(net)), "metrics": metrics}
    return Message(RecordDict(content), reply_to=message)


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Accuracy of the global model on texts that no client has."""
    net = model().eval()
    set_peft_model_state_dict(net, arrays.to_torch_state_dict())
    with torch.no_grad():
        right = [(net(input_ids=texts).logits.argmax(1) == labels).float().mean() for texts, labels in batches(9, 8)]
    return MetricRecord({"accuracy": float(sum(right) / len(right))})


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Five rounds."""
    strategy = FedFroM(fraction_evaluate=0.0, rank=4)  # changed: FedAvg
    initial = ArrayRecord(get_peft_model_state_dict(model()))
    result = strategy.start(grid=grid, initial_arrays=initial, num_rounds=5, evaluate_fn=evaluate)
    for server_round, metrics in result.evaluate_metrics_serverapp.items():
        print(f"round {server_round}: accuracy {metrics['accuracy']:.3f}")
    last = strategy.reports[5].merge.layers[0]  # new: who contributed what
    print(f"{last.name}: weights {[round(w, 3) for w in last.weights]}")


if __name__ == "__main__":
    from flwr.simulation import run_simulation

    run_simulation(server_app, client_app, num_supernodes=4, backend_config={"client_resources": {"num_cpus": 1}})
