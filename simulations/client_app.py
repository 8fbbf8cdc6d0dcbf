"""The Flower ClientApp: a client trains the global model on its own share of the data, and replies with its weights.

`fedfrom.client` loads the message and builds the reply for every strategy, FedAvg included. For strategies that merge
by statistics of the clients' data, the reply has the statistics beside the weights.
"""

import dataclasses
import os
from functools import lru_cache
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from simulations import environment
from simulations.options import ABOUT, OWN, Options

environment.quiet()

app = ClientApp()


@app.query()
def prepare(message: Message, context: Context) -> Message:
    """Load data and model before the first round, so that no round's seconds include it."""
    worker, partition_id = _worker_of(message, context)
    worker.model(worker.options.client_rank(partition_id))
    worker.tokens(partition_id)
    return Message(RecordDict({ABOUT: _about(partition_id)}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train for one round; reply with the weights, the number of examples, the loss and the speed."""
    from fedfrom import client
    from simulations import client_statistics, training

    config = message.content.config_records["config"]
    server_round = int(str(config["server-round"]))
    worker, partition_id = _worker_of(message, context)
    options = worker.options
    model = worker.model(options.client_rank(partition_id))
    client.load(model, message)
    tokens = worker.tokens(partition_id)[0]
    seed = training.round_seed(options.seed, server_round, partition_id)
    done = training.train(model, tokens, options, seed)
    kind = client_statistics.needed(str(config.get("strategy", "fedavg")))
    found = None if kind is None else client_statistics.compute(kind, model, tokens, options, seed)
    speed = done.examples / max(done.seconds, 1e-9)
    metrics = {"num-examples": len(tokens), "loss": done.loss, "steps": done.steps, "examples-per-second": speed}
    reply = client.reply(model, message, metrics, statistics=found)
    numbers = {"loss": done.loss, "seconds": done.seconds, "speed": speed, "process": os.getpid()}
    reply.content[ABOUT] = _about(partition_id, **numbers)
    return reply


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the global model on the client's own examples that it does not train on."""
    from fedfrom import client
    from simulations import training

    worker, partition_id = _worker_of(message, context)
    model = worker.model(worker.options.client_rank(partition_id))
    client.load(model, message)
    tokens = worker.tokens(partition_id)[1]
    scores = training.evaluate(model, tokens, worker.share(partition_id).task.name)
    # The same key for every task: Flower's aggregation needs equal keys.
    metrics = MetricRecord({"num-examples": len(tokens), "loss": scores["loss"], "score": scores["score"]})
    return Message(RecordDict({"metrics": metrics, ABOUT: _about(partition_id)}), reply_to=message)


def _about(partition_id: int, **numbers: float) -> ConfigRecord:
    return ConfigRecord({"partition-id": partition_id, **numbers})


def _worker_of(message: Message, context: Context) -> tuple["Worker", int]:
    options, node = Options.from_record(message.content.config_records["config"]), context.node_config
    own = options.partition == OWN
    if own and not {"partition-id", "glue-dir"} <= set(node):
        raise RuntimeError("the node has no data of its own: give --node-config 'partition-id=0 glue-dir=\"folder\"'")
    if not own and not {"partition-id", "num-partitions"} <= set(node):
        raise RuntimeError('the node has no share of the data: give --node-config "partition-id=0 num-partitions=4"')
    if not own and int(node["num-partitions"]) != options.clients:
        raise RuntimeError(f"the node has 1 of {node['num-partitions']} shares, the run {options.clients} clients")
    if "glue-dir" in node:  # this machine's folder; the options name the server's
        options = dataclasses.replace(options, glue_dir=str(node["glue-dir"]))
    return _worker(options), int(node["partition-id"])


class Worker:
    """Data, tokens and models of a client process, kept between rounds: a round then takes the time of its training."""

    def __init__(self, options: Options) -> None:
        environment.prepare(options.needs_hub)
        import torch

        from simulations import models, partitions, tasks

        if not torch.cuda.is_available():
            torch.set_num_threads(1)  # there is one process a core already
        self.options = options
        self._own = options.partition == OWN
        loaded = tasks.load(options, (tasks.TRAIN,) if self._own else (tasks.TRAIN, tasks.HELD_OUT))
        self.shares = partitions.split(options, loaded)
        self.head = models.Head(loaded[0].num_labels, loaded[0].regression)
        self.tokenizer = models.tokenizer(options)
        self._models: dict[int, Any] = {}
        self._tokens: dict[int, Any] = {}

    def model(self, rank: int) -> Any:
        """Return the model of this rank. Its weights are those of the last training: load new ones first."""
        from simulations import models

        if rank not in self._models:
            self._models[rank] = models.build(self.options, self.head, rank)
        return self._models[rank]

    def share(self, partition_id: int) -> Any:
        """Return a client's training examples and their task. With `--partition own` the folder holds one share."""
        return self.shares[0 if self._own else partition_id]

    def tokens(self, partition_id: int) -> Any:
        """Return a client's training examples, and the examples of its own evaluation."""
        from simulations.batches import tokenise

        if partition_id not in self._tokens:
            share = self.share(partition_id)
            tokens = tokenise(share.examples, self.tokenizer, self.options, self.head.regression)
            kept = max(1, len(tokens) // 10) if self.options.federated_evaluation else 0
            rows = list(range(len(tokens)))
            self._tokens[partition_id] = (tokens.select(rows[kept:]), tokens.select(rows[:kept]))
        return self._tokens[partition_id]


@lru_cache(maxsize=1)
def _worker(options: Options) -> Worker:
    return Worker(options)
