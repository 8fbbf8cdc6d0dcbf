"""Tokenised examples, and the order in which a client trains on them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from simulations.options import Options

EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Tokens:
    """Token ids of examples without padding, and their labels."""

    rows: list[dict[str, list[int]]]
    labels: Tensor  # (n,) int64 classes or float32 scores
    pad: dict[str, int]

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, chosen: list[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Return inputs padded to the longest of the chosen examples, and their labels."""
        inputs = {
            name: pad_sequence([torch.tensor(self.rows[row][name]) for row in chosen], True, value)
            for name, value in self.pad.items()
        }
        return inputs, self.labels[chosen]

    def select(self, chosen: list[int]) -> "Tokens":
        """Return some of the examples."""
        return Tokens([self.rows[row] for row in chosen], self.labels[chosen], self.pad)

    def by_length(self) -> list[list[int]]:
        """Return evaluation batches of examples sorted by length, which need little padding."""
        order = sorted(range(len(self)), key=lambda row: len(self.rows[row]["input_ids"]))
        return [order[start : start + EVALUATION_BATCH] for start in range(0, len(order), EVALUATION_BATCH)]


def tokenise(examples: datasets.Dataset, tokenizer: Any, options: Options, regression: bool) -> Tokens:
    """Return the examples as token ids, cut to `--max-length`."""
    pairs = list(examples["pair"]) if "pair" in examples.column_names else None
    # The tokenizer cuts a pair's longer half first: a long premise never removes the hypothesis.
    encoded = tokenizer(list(examples["text"]), pairs, truncation=True, max_length=options.max_length)
    pad = dict.fromkeys(encoded, 0)
    pad["input_ids"] = tokenizer.pad_token_id or 0
    rows = [{name: encoded[name][row] for name in pad} for row in range(len(examples))]
    labels = torch.tensor(list(examples["label"]), dtype=torch.float32 if regression else torch.int64)
    return Tokens(rows, labels, pad)


def training_batches(count: int, options: Options, seed: int) -> Iterator[list[int]]:
    """Yield the rows of each optimiser step of one round.

    Parameters
    ----------
    count : int
        Number of the client's examples.
    options : Options
        Batch size, and steps or epochs. Where one pass has too few steps, another pass follows.
    seed : int
        Fixes the order. Each client and round has its own.
    """
    generator = torch.Generator().manual_seed(seed)
    taken, epoch = 0, 0
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count, options.batch_size):
            if options.steps and taken == options.steps:
                return
            yield order[start : start + options.batch_size]
            taken += 1
        epoch += 1
        if not options.steps and epoch == options.epochs:
            return
