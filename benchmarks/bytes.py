"""Bytes of arrays sent down and up in a round: adapters of unequal ranks, and a full model with a frozen embedding.

    python -m benchmarks.bytes

The model has MiniLM-L6's shapes (22.7 million parameters) and random weights. Clients use `fedfrom.client`, and add
noise in place of training: bytes don't depend on the values.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from flwr.app import ConfigRecord
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel

from benchmarks.messages import Nodes
from fedfrom import FedFroM, client, to_record
from simulations.engines.jobs import set_task_identity

RANKS = (4, 8, 16)
WORDS = "embeddings.word_embeddings.weight"
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}


def adapter(rank: int, sizes: dict[str, int]) -> nn.Module:
    """Return the model with LoRA on queries and values."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "value"])
    return get_peft_model(BertModel(BertConfig(**sizes)), config)


def rounds(clients: Sequence[nn.Module], server: nn.Module, count: int, **options: Any) -> Iterator[tuple[int, int]]:
    """Yield the bytes down and up of each round."""
    as_delta = options.pop("as_delta", False)
    set_task_identity()
    strategy, grid = FedFroM(**options), Nodes(len(clients))
    is_adapter = hasattr(server, "peft_config")
    arrays = to_record(client.adapter_state(server) if is_adapter else server.state_dict())
    for server_round in range(1, count + 1):
        replies = []
        for model, message in zip(
            clients, strategy.configure_train(server_round, arrays, ConfigRecord(), grid), strict=True
        ):
            client.load(model, message)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.requires_grad and name not in options.get("frozen", ()):
                        parameter += 1e-3 * torch.randn_like(parameter)
            replies.append(client.reply(model, message, {"num-examples": 1}, as_delta=as_delta))
        merged, _ = strategy.aggregate_train(server_round, replies)
        assert merged is not None, strategy.reports[server_round].rejected
        arrays, report = merged, strategy.reports[server_round]
        yield report.bytes_down, report.bytes_up


def table(sizes: dict[str, int] = MINILM) -> list[tuple[str, list[tuple[int, int]]]]:
    """Return each case with the bytes of its rounds."""
    torch.manual_seed(0)
    server = adapter(max(RANKS), sizes)
    found = []
    for ranks in ((max(RANKS),) * 3, RANKS):
        clients = [adapter(rank, sizes) for rank in ranks]
        config = server.peft_config["default"]  # type: ignore[union-attr, index]
        name = f"adapter of rank {max(RANKS)}, three clients of rank {', '.join(map(str, ranks))}"
        found.append((name, list(rounds(clients, server, 3, lora_config=config))))
    full = BertModel(BertConfig(**sizes))
    for name, options in {
        "full model, three clients": {},
        "the same, word embedding frozen": {"frozen": {WORDS}},
        "the same, deltas in bfloat16": {"frozen": {WORDS}, "as_delta": True},
    }.items():
        clients = [BertModel(BertConfig(**sizes)) for _ in range(3)]
        found.append((name, list(rounds(clients, full, 2, **options))))
    return found


def main() -> None:
    """Print the table."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    print("| | down, round 1 | down, from round 2 | up, each round |\n|---|---|---|---|")
    for name, each in table():
        (first, up), (later, _) = each[:2]
        assert all(found == (later, up) for found in each[1:])
        print(f"| {name} | {first / 1e6:.2f} MB | {later / 1e6:.2f} MB | {up / 1e6:.2f} MB |")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
