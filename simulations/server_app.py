"""The Flower ServerApp: runs the strategies one after the other on the same clients, and compares them."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp

from simulations import environment, running
from simulations.aggregation import distance_from_mean
from simulations.history import History, Round, client_weights
from simulations.metrics import Scores
from simulations.options import ABOUT, Options
from simulations.traffic import CountingGrid

environment.quiet()

NODES_TIMEOUT = 120.0
SETTLED_SECONDS = 10.0

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Entry of `flwr run`: the options come from the run configuration, the clients are the connected nodes."""
    options = Options.from_mapping(dict(context.run_config))
    environment.prepare(options.needs_hub)
    if options.partition != "tasks":
        options = dataclasses.replace(options, clients=_number_of_nodes(grid, options.clients))
    running.compare(options, lambda experiment, narrator: compare(grid, experiment, narrator))


def app_for(experiment: Any, narrator: Any, finished: Callable[[History], None]) -> ServerApp:
    """Return an app that runs a prepared experiment, and calls `finished` with each strategy's history."""
    bound = ServerApp()

    @bound.main()
    def run(grid: Grid, context: Context) -> None:
        for history in compare(grid, experiment, narrator):
            finished(history)

    return bound


def compare(grid: Grid, experiment: Any, narrator: Any) -> Iterator[History]:
    """Run every strategy of the options from the same initial weights, and yield each history when it is finished.

    Raises
    ------
    RuntimeError
        Every client failed in a round.
    """
    start_clients(grid, experiment.options, narrator)
    specs = experiment.options.strategies
    for number, spec in enumerate(specs, 1):
        yield run_strategy(grid, spec, experiment, narrator, len(specs) - number)


def start_clients(grid: Grid, options: Options, narrator: Any) -> None:
    """Let every client load its data and model, and wait for all of them.

    Raises
    ------
    RuntimeError
        A client can't load them, or two clients have the same share: every round would fail.
    """
    start = time.perf_counter()
    while len(nodes := list(grid.get_node_ids())) < options.clients:
        if time.perf_counter() - start > NODES_TIMEOUT:
            raise RuntimeError(f"{len(nodes)} of {options.clients} nodes within {NODES_TIMEOUT:.0f} seconds")
        time.sleep(0.1)
    content = RecordDict({"config": options.to_record()})
    messages = [Message(content, message_type=MessageType.QUERY, dst_node_id=node) for node in nodes]
    taken: set[int] = set()
    for reply in CountingGrid(grid).send_and_receive(messages):
        if reply.has_error():
            raise RuntimeError(f"a client can't start: {reply.error.reason}")
        share = int(reply.content.config_records[ABOUT]["partition-id"])  # type: ignore[arg-type]
        if share in taken:
            raise RuntimeError(f"two nodes have partition-id={share}: give each its own in its --node-config")
        taken.add(share)
    narrator.say(f"Clients ready after {time.perf_counter() - start:.0f} s")


def run_strategy(grid: Grid, spec: str, experiment: Any, narrator: Any, still_to_come: int = 0) -> History:
    """Run one strategy over all rounds and return its history; `still_to_come` strategies follow it."""
    options, start = experiment.options, time.perf_counter()
    narrator.strategy(spec)
    recorder = Recorder(spec, experiment, narrator, still_to_come)
    strategy = experiment.strategy(spec)
    strategy.aggregate_train = recorder.timed(strategy.aggregate_train)
    counting = CountingGrid(grid, recorder.on_reply)
    recorder.attach(counting, strategy)
    result = strategy.start(
        grid=counting,
        initial_arrays=experiment.initial_arrays(),
        num_rounds=options.rounds,
        train_config=_config(options, spec),
        evaluate_config=_config(options, spec),
        evaluate_fn=recorder.evaluate,
    )
    history = recorder.finish(result)
    history.started, history.wall_seconds = start, time.perf_counter() - start
    return history


def _config(options: Options, spec: str) -> ConfigRecord:
    config = options.to_record()
    config["strategy"] = spec
    return config


def _number_of_nodes(grid: Grid, wanted: int) -> int:
    """Return the number of nodes, as soon as the wanted number is there or no node was added for a while."""
    start = since = time.monotonic()
    found = 0
    while True:
        now, before, found = time.monotonic(), found, len(list(grid.get_node_ids()))
        since = now if found != before else since
        if found >= wanted or (found >= 2 and now - since > SETTLED_SECONDS):
            return found
        if now - start > NODES_TIMEOUT:
            raise RuntimeError(f"fewer than two nodes within {NODES_TIMEOUT:.0f} seconds")
        time.sleep(0.5)


class Recorder:
    """Records one strategy: the time of its merges, every reply, and the scores after each round."""

    def __init__(self, spec: str, experiment: Any, narrator: Any, still_to_come: int) -> None:
        self.history = History(spec)
        self.still_to_come = still_to_come
        self.experiment = experiment
        self.narrator = narrator
        self._client_of_node: dict[int, int] = {}
        self._before = experiment.initial
        self._new_round()

    def attach(self, counting: CountingGrid, strategy: Any) -> None:
        """Set the grid that counts bytes, and the strategy that reports its merges."""
        self._counting, self._strategy = counting, strategy

    def _new_round(self) -> None:
        self._clients: dict[int, dict[str, float]] = {}
        self._replies: list[Message] = []
        self._merge_seconds = 0.0
        self._started = time.perf_counter()

    def timed(self, aggregate: Any) -> Any:
        """Wrap a strategy's aggregation to measure its seconds."""

        @functools.wraps(aggregate)
        def aggregate_train(server_round: int, replies: Any) -> Any:
            # Waiting for clients is not the server's time. In the order of the clients: FedAvg's sums depend on it.
            self._replies = replies = sorted(replies, key=self._client)
            start = time.perf_counter()
            try:
                return aggregate(server_round, replies)
            finally:
                self._merge_seconds += time.perf_counter() - start

        return aggregate_train

    def _client(self, reply: Message) -> int:
        return self._client_of_node.get(reply.metadata.src_node_id, -1)

    def on_reply(self, reply: Message) -> None:
        """Record a reply's client and its numbers, and print them."""
        number = len(self.history.rounds)
        if reply.has_error():
            self.narrator.failure(number, reply.error.reason or "no reason given")
            return
        about = reply.content.get(ABOUT)
        if not isinstance(about, ConfigRecord) or "loss" not in about:
            return
        client = int(about["partition-id"])  # type: ignore[arg-type]
        self._client_of_node[reply.metadata.src_node_id] = client
        numbers = {name: float(value) for name, value in about.items() if name != "partition-id"}  # type: ignore[arg-type]
        self._clients[client] = numbers
        self.narrator.client(number, self.experiment.options.rounds, client, numbers["loss"], numbers["speed"])

    def evaluate(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Evaluate the global model; Flower calls this before the first round and after each.

        Rounds that `--eval-every` leaves out are recorded without scores, and give None.
        """
        if server_round and not self._clients:
            raise RuntimeError(f"{self.history.label}, round {server_round}: every client failed; see above")
        start = time.perf_counter()
        state = arrays.to_torch_state_dict()
        scores = self._scores(server_round, state)
        now = time.perf_counter()
        entry = Round(server_round, scores, evaluation_seconds=now - start)
        if server_round:
            entry.bytes_down, entry.bytes_up = self._counting.down, self._counting.up
            entry.seconds, entry.server_seconds = now - self._started, self._merge_seconds
            entry.clients = dict(sorted(self._clients.items()))
            report = self._report(server_round)
            entry.weights = client_weights(report, self._client_of_node)
            entry.distance_from_mean = self._distance_from_mean(state)
            self._before = state
            if self.experiment.options.save_clients:
                self.history.client_states = self._client_states()
        self.history.rounds.append(entry)
        self.narrator.round(entry, self.experiment.options.rounds, self.experiment.metric, self._seconds_left())
        self._counting.down = self._counting.up = 0
        self._new_round()
        return MetricRecord({**scores}) if scores else None

    def _scores(self, server_round: int, state: dict[str, Any]) -> Scores:
        options = self.experiment.options
        if server_round == 0:
            return dict(self.experiment.start())
        if server_round % options.eval_every and server_round < options.rounds:
            return {}
        return dict(self.experiment.evaluate(state))

    def _distance_from_mean(self, state: dict[str, Any]) -> float | None:
        replies = [reply.content for reply in self._replies if reply.has_content()]
        states = [next(iter(content.array_records.values())).to_torch_state_dict() for content in replies]
        examples = [float(content.metric_records["metrics"]["num-examples"]) for content in replies]  # type: ignore[arg-type]
        return distance_from_mean(self._before, states, examples, state)

    def _client_states(self) -> dict[int, dict[str, Any]]:
        """Return each client's state of this round."""
        found = {
            self._client_of_node[reply.metadata.src_node_id]: next(iter(reply.content.array_records.values()))
            for reply in self._replies
            if reply.has_content()
        }
        return {client: found[client].to_torch_state_dict() for client in sorted(found)}

    def _seconds_left(self) -> float:
        done, rounds = self.history.rounds[1:], self.experiment.options.rounds
        left = rounds - len(done) + rounds * self.still_to_come
        return left * sum(entry.seconds for entry in done) / len(done) if done else 0.0

    def _report(self, server_round: int) -> dict[str, Any]:
        report = getattr(self._strategy, "reports", {}).get(server_round)
        if report is None:
            return {}
        plain: dict[str, Any] = report.to_dict()
        # Node ids mean nothing after the run; the clients do.
        plain["clients"] = [self._client_of_node.get(int(node)) for node in plain.get("nodes", [])]
        self.history.reports[server_round] = plain
        return plain

    def finish(self, result: Any) -> History:
        """Take the final weights, and the clients' metrics that Flower aggregated."""
        for entry in self.history.rounds:
            entry.train_metrics = dict(result.train_metrics_clientapp.get(entry.number, {}))
            entry.evaluate_metrics = dict(result.evaluate_metrics_clientapp.get(entry.number, {}))
        self.history.state = result.arrays.to_torch_state_dict()
        return self.history
