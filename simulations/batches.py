"""Tokenised examples, and the order in which a client trains on them."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from simulations.options import Options

EVALUATION_BATCH = 64
GROUP = 50  # batches that are sorted by length together: their mean lengths differ, their order stays random
_BESIDE = ("starts", "lengths", "labels")  # the tensors of `Tokens` beside its values


class Table(Protocol):
    """Examples by column, as a `datasets.Dataset` has them."""

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""

    def __getitem__(self, column: str, /) -> Any:
        """Return a column's values."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Tokens:
    """Tokenised examples without padding, and their labels; in few tensors, so that processes can share them.

    Attributes
    ----------
    values : dict[str, Tensor]
        What the model takes, by name ("input_ids"): int32, the tokens of all examples one after the other.
    starts, lengths : Tensor
        (n,) int64: where in them an example begins, and how many tokens it has.
    labels : Tensor
        (n,) int64 classes or float32 scores.
    pad : dict[str, int]
        The value that padding has, by name.
    """

    values: dict[str, Tensor]
    starts: Tensor
    lengths: Tensor
    labels: Tensor
    pad: dict[str, int]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, list[int]]], labels: Tensor, pad: dict[str, int]) -> "Tokens":
        """Return examples of which each is a list of tokens by name."""
        values = {
            name: torch.from_numpy(np.fromiter(itertools.chain.from_iterable(row[name] for row in rows), np.int32))
            for name in pad
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in rows], dtype=torch.int64)
        return cls(values, lengths.cumsum(0) - lengths, lengths, labels, pad)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], pad: dict[str, int], prefix: str = "") -> "Tokens":
        """Return the examples whose `tensors` are those under these names with the prefix."""
        values = {name: tensors[prefix + name] for name in pad}
        return cls(values, **{field: tensors[prefix + field] for field in _BESIDE}, pad=pad)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name."""
        return {**self.values, **{field: getattr(self, field) for field in _BESIDE}}

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def rows(self) -> list[dict[str, list[int]]]:
        """The tokens of each example, by name."""
        return [{name: self._row(name, row).tolist() for name in self.values} for row in range(len(self))]

    def batch(self, chosen: list[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Return int64 inputs padded to the longest of the chosen examples, and their labels."""
        inputs = {
            name: pad_sequence([self._row(name, row) for row in chosen], True, value).long()
            for name, value in self.pad.items()
        }
        return inputs, self.labels[chosen]

    def select(self, chosen: list[int]) -> "Tokens":
        """Return some of the examples; their tokens are not copied."""
        return Tokens(self.values, self.starts[chosen], self.lengths[chosen], self.labels[chosen], self.pad)

    def _row(self, name: str, row: int) -> Tensor:
        start = int(self.starts[row])
        return self.values[name][start : start + int(self.lengths[row])]

    def by_length(self) -> list[list[int]]:
        """Return evaluation batches of examples sorted by length, which need little padding."""
        lengths = self.lengths.tolist()
        order = sorted(range(len(self)), key=lambda row: lengths[row])
        return _cut(order, EVALUATION_BATCH)


def tokenise(examples: Table, tokenizer: Any, options: Options, regression: bool) -> Tokens:
    """Return the examples as token ids, cut to `--max-length`."""
    pairs = list(examples["pair"]) if "pair" in examples.column_names else None
    # The tokenizer cuts a pair's longer half first: a long premise never removes the hypothesis.
    encoded = tokenizer(list(examples["text"]), pairs, truncation=True, max_length=options.max_length)
    pad = dict.fromkeys(encoded, 0)
    pad["input_ids"] = tokenizer.pad_token_id or 0
    rows = [{name: encoded[name][row] for name in pad} for row in range(len(examples))]
    labels = torch.tensor(list(examples["label"]), dtype=torch.float32 if regression else torch.int64)
    return Tokens.of(rows, labels, pad)


def training_batches(tokens: Tokens, options: Options, seed: int) -> Iterator[list[int]]:
    """Yield the rows of each optimiser step of one round.

    Parameters
    ----------
    tokens : Tokens
        The client's examples.
    options : Options
        Batch size, and steps or epochs. Where one pass has too few steps, another pass follows. With
        `group_by_length` every fifty batches of a random order are sorted by length, cut anew, and shuffled.
    seed : int
        Fixes the order. Each client and round has its own.
    """
    generator = torch.Generator().manual_seed(seed)
    taken, epoch = 0, 0
    while True:
        order = torch.randperm(len(tokens), generator=generator).tolist()
        if options.group_by_length:
            batches = _alike(order, tokens.lengths.tolist(), options.batch_size, generator)
        else:
            batches = _cut(order, options.batch_size)
        for batch in batches:
            if options.steps and taken == options.steps:
                return
            yield batch
            taken += 1
        epoch += 1
        if not options.steps and epoch == options.epochs:
            return


def _cut(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _alike(order: list[int], lengths: list[int], size: int, generator: torch.Generator) -> list[list[int]]:
    """Return batches of rows of like length, in random order within every fifty batches."""
    batches: list[list[int]] = []
    for group in _cut(order, GROUP * size):
        cut = _cut(sorted(group, key=lambda row: lengths[row]), size)
        batches += [cut[place] for place in torch.randperm(len(cut), generator=generator).tolist()]
    return batches
