"""The Flower ClientApp: a client trains the global model on its own share of the data, and replies with its weights.

`fedfrom.client` loads the message and builds the reply for every strategy, FedAvg included. For strategies that merge
by statistics of the clients' data, the reply has the statistics beside the weights.
"""

import dataclasses
import os
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from simulations import environment
from simulations.options import ABOUT, OWN, Options

if TYPE_CHECKING:  # it imports torch, which `flwr run` needs only where a client trains
    from simulations.worker import Worker

environment.quiet()

app = ClientApp()


@app.query()
def prepare(message: Message, context: Context) -> Message:
    """Load data and model before the first round, so that few rounds' seconds include it."""
    worker, client = _worker_of(message, context)
    worker.model(client)
    worker.data(client)
    return Message(RecordDict({ABOUT: _about(client)}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train for one round; reply with the weights, the number of examples, the loss and the speed."""
    from fedfrom import client as wire
    from simulations import client_statistics, training

    config = message.content.config_records["config"]
    server_round = int(str(config["server-round"]))
    worker, client = _worker_of(message, context)
    options, model, tokens = worker.options, worker.model(client), worker.data(client).train
    wire.load(model, message)
    seed = training.round_seed(options.seed, server_round, client)
    done = training.train(model, tokens, options, seed)
    kind = client_statistics.needed(str(config.get("strategy", "fedavg")))
    found = None if kind is None else client_statistics.compute(kind, model, tokens, options, seed)
    speed = done.examples / max(done.seconds, 1e-9)
    metrics = {"num-examples": len(tokens), "loss": done.loss, "steps": done.steps, "examples-per-second": speed}
    reply = wire.reply(model, message, metrics, statistics=found)
    numbers = {"loss": done.loss, "seconds": done.seconds, "speed": speed, "process": os.getpid()}
    reply.content[ABOUT] = _about(client, **numbers)
    return reply


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the global model on the client's own examples that it does not train on."""
    from fedfrom import client as wire
    from simulations import training

    worker, client = _worker_of(message, context)
    options, model, data = worker.options, worker.model(client), worker.data(client)
    wire.load(model, message)
    scores = training.evaluate(model, data.own, data.task, precision=options.precision)
    # The same key for every task: Flower's aggregation needs equal keys.
    metrics = MetricRecord({"num-examples": len(data.own), "loss": scores["loss"], "score": scores["score"]})
    return Message(RecordDict({"metrics": metrics, ABOUT: _about(client)}), reply_to=message)


def _about(client: int, **numbers: float) -> ConfigRecord:
    return ConfigRecord({"partition-id": client, **numbers})


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


_workers: dict[Options, "Worker"] = {}  # this process's, of the run that it was asked for last


def provide(worker: "Worker") -> None:
    """Let this process's clients use a worker that is prepared already."""
    _workers.clear()
    _workers[worker.options] = worker


def _worker(options: Options) -> "Worker":
    if options not in _workers:
        from simulations.worker import load

        provide(load(options))
    return _workers[options]
