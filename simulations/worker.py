"""What a process needs to be any of the clients: their data as tokens, and the model.

A worker reads and tokenises the data itself, or takes the tokens that another process made once for all (`save`,
`restore`). The model's weights are mapped from its own file, whose memory all processes share.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simulations import environment, models, partitions, tasks
from simulations.batches import Tokens, tokenise
from simulations.options import OWN, Options


@dataclass(frozen=True)
class Data:
    """One client's examples.

    Attributes
    ----------
    task : str
        Their task.
    train : Tokens
        What the client trains on.
    own : Tokens
        What it evaluates the global model on; empty without `--federated-evaluation`.
    """

    task: str
    train: Tokens
    own: Tokens


class Worker:
    """Tokens and models of a process, kept between rounds: a round then takes the time of its training.

    Parameters
    ----------
    options : Options
        Of the run.
    data : Callable[[int], Data]
        Returns the data of a client; called once for each.
    base : Callable[[], nn.Module]
        Returns a fresh base model, without an adapter; called once for each rank.
    """

    def __init__(self, options: Options, data: Callable[[int], Data], base: Callable[[], nn.Module]) -> None:
        self.options = options
        self._load, self._base = data, base
        self._data: dict[int, Data] = {}
        self._models: dict[int, nn.Module] = {}

    def data(self, client: int) -> Data:
        """Return a client's examples. With `--partition own` a process has one client's alone."""
        if client not in self._data:
            self._data[client] = self._load(client)
        return self._data[client]

    def model(self, client: int) -> nn.Module:
        """Return the model of a client's rank. Its weights are those of the last training: load new ones first."""
        rank = self.options.client_rank(client)
        if rank not in self._models:
            base = self._base()
            self._models[rank] = base if self.options.full else models.adapt(base, self.options, rank)
        return self._models[rank]


def load(options: Options) -> Worker:
    """Return a worker that reads data and model in this process.

    Raises
    ------
    BadInput
        An option, folder or package can't be used.
    """
    environment.prepare(options.needs_hub)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # there is one process a core already
    own = options.partition == OWN
    loaded = tasks.load(options, (tasks.TRAIN,) if own else (tasks.TRAIN, tasks.HELD_OUT))
    shares = partitions.split(options, loaded)
    head = models.Head(loaded[0].num_labels, loaded[0].regression)
    tokenizer = models.tokenizer(options)

    def data(client: int) -> Data:
        return _data(shares[0 if own else client], tokenizer, options)

    return Worker(options, data, lambda: models.base_model(options, head))


def of(experiment: Any) -> Worker:
    """Return a worker with what this process prepared already."""
    options, head = experiment.options, experiment.head
    data = [_data(share, experiment.tokenizer, options) for share in experiment.shares]
    return Worker(options, data.__getitem__, lambda: models.base_model(options, head))


def save(experiment: Any, path: Path) -> None:
    """Write all clients' tokens to a file, for `restore`."""
    tensors, clients = dict[str, Tensor](), []
    for client, share in enumerate(experiment.shares):
        tokens = _tokens(share, experiment.tokenizer, experiment.options)
        clients.append({"task": share.task.name, "pad": tokens.pad})
        tensors |= {f"{client}.{name}": tensor for name, tensor in tokens.tensors().items()}
    save_file(tensors, path, {"clients": json.dumps(clients)})


def restore(options: Options, head: models.Head, path: Path) -> Worker:
    """Return a worker with the tokens that `save` wrote: the file is mapped, so processes share its memory."""
    torch.set_num_threads(1)  # there is one process a core already
    with safe_open(path, "pt") as file:
        clients = json.loads(file.metadata()["clients"])
    tensors = load_file(path)

    def data(client: int) -> Data:
        found = clients[client]
        return _divided(found["task"], Tokens.from_tensors(tensors, found["pad"], f"{client}."), options)

    return Worker(options, data, lambda: models.base_model(options, head))


def _tokens(share: partitions.Share, tokenizer: Any, options: Options) -> Tokens:
    return tokenise(share.examples, tokenizer, options, share.task.regression)


def _data(share: partitions.Share, tokenizer: Any, options: Options) -> Data:
    return _divided(share.task.name, _tokens(share, tokenizer, options), options)


def _divided(task: str, tokens: Tokens, options: Options) -> Data:
    kept = max(1, len(tokens) // 10) if options.federated_evaluation else 0
    rows = list(range(len(tokens)))
    return Data(task, tokens.select(rows[kept:]), tokens.select(rows[:kept]))
