"""The task: a model with a LoRA adapter, the data, training and scoring. Put your own here."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

WORDS, LENGTH = 32, 8


def model():
    """The base model, the same everywhere, with an adapter and a head to train: here tiny, and random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = BertForSequenceClassification(BertConfig(vocab_size=WORDS, initializer_range=0.1, **sizes))
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS"))


def batches(seed: int, count: int):
    """Made-up texts with labels: three words of four are of the label's half of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        labels = torch.randint(0, 2, (32, 1), generator=generator)
        words = torch.randint(0, WORDS // 2, (32, LENGTH), generator=generator)
        others = torch.rand(32, LENGTH, generator=generator) < 0.25
        yield words + WORDS // 2 * (labels ^ others), labels[:, 0]


def train(net, data, lr: float) -> float:
    """Train the adapter and the head; return the mean loss."""
    optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=lr)
    losses = []
    for texts, labels in data:
        loss = net.train()(input_ids=texts, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def accuracy(net, data) -> float:
    """Share of texts that get their label."""
    right = [(net.eval()(input_ids=texts).logits.argmax(1) == labels).float().mean() for texts, labels in data]
    return float(sum(right) / len(right))
