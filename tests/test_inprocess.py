"""The in-process Grid does what Flower's own does, as far as a strategy can tell."""

from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp.strategy import FedAvg, Result

from tests.inprocess import InProcessGrid

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Client i adds i + 1, says that it has i + 1 examples, and counts its rounds in its state."""
    i = int(context.node_config["partition-id"])
    rounds = 1 + (int(context.state["rounds"]["rounds"]) if "rounds" in context.state else 0)
    context.state["rounds"] = MetricRecord({"rounds": rounds})
    if i == context.run_config.get("failing") and rounds == context.run_config.get("in-round", rounds):
        raise RuntimeError("out of memory")
    (array,) = message.content["arrays"].to_numpy_ndarrays()
    message.content["arrays"].clear()  # the server must not notice
    metrics = MetricRecord({"num-examples": i + 1, "rounds": rounds})
    return Message(RecordDict({"arrays": ArrayRecord([array + i + 1]), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    (array,) = message.content["arrays"].to_numpy_ndarrays()
    metrics = MetricRecord({"num-examples": 1, "mean": float(array.mean())})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def fedavg(grid: InProcessGrid, **options: float) -> Result:
    initial = ArrayRecord([np.full((2, 3), 10.0)])
    return FedAvg().start(grid=grid, initial_arrays=initial, num_rounds=2, **options)


def value(result: Result) -> float:
    (array,) = result.arrays.to_numpy_ndarrays()
    assert array.shape == (2, 3) and np.ptp(array) == 0
    return float(array[0, 0])


def messages(grid: InProcessGrid) -> list[Message]:
    content = RecordDict({"arrays": ArrayRecord([np.zeros(2)])})
    return [Message(content, node_id, "train") for node_id in grid.partition_of]


def answered(grid: InProcessGrid, replies: list[Message]) -> list[int]:
    return [grid.partition_of[reply.metadata.src_node_id] for reply in replies]


def test_two_rounds_of_fedavg_give_the_mean_by_hand() -> None:
    grid = InProcessGrid(app, 3)
    result = fedavg(grid)
    step = (1 * 1 + 2 * 2 + 3 * 3) / (1 + 2 + 3)
    assert value(result) == pytest.approx(10 + 2 * step, rel=1e-12)
    assert not grid.errors
    assert result.evaluate_metrics_clientapp[2]["mean"] == pytest.approx(10 + 2 * step, rel=1e-12)


def test_a_client_keeps_its_state_over_the_rounds() -> None:
    result = fedavg(InProcessGrid(app, 3))
    assert [result.train_metrics_clientapp[r]["rounds"] for r in (1, 2)] == pytest.approx([1, 2])


def test_a_client_that_raises_gives_an_error_reply_and_keeps_its_old_state() -> None:
    grid = InProcessGrid(app, 3, run_config={"failing": 1, "in-round": 1})
    (failed,) = (reply for reply in grid.send_and_receive(messages(grid)) if reply.has_error())
    assert failed.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert failed.error.reason == "RuntimeError: out of memory"
    assert grid.partition_of[failed.metadata.src_node_id] == 1
    assert [str(error) for error in grid.errors] == ["out of memory"]
    # Its count of rounds was not kept, so it fails again.
    assert sum(reply.has_error() for reply in grid.send_and_receive(messages(grid))) == 1


def test_fedavg_goes_on_without_the_client_that_raises() -> None:
    step = (1 * 1 + 3 * 3) / (1 + 3)
    assert value(fedavg(InProcessGrid(app, 3, run_config={"failing": 1}))) == pytest.approx(10 + 2 * step)


@pytest.mark.parametrize("reply_order", [lambda replies: replies[::-1], 1])
def test_replies_come_in_the_order_asked_for(reply_order: int | Callable[[list], list]) -> None:
    grid = InProcessGrid(app, 6, reply_order=reply_order)
    order = answered(grid, list(grid.send_and_receive(messages(grid))))
    assert sorted(order) == list(range(6)) and order != list(range(6))


def test_a_seed_shuffles_the_replies_of_each_pull_anew() -> None:
    grid = InProcessGrid(app, 6, reply_order=1)
    orders = [answered(grid, list(grid.send_and_receive(messages(grid)))) for _ in range(2)]
    assert orders[0] != orders[1]


def test_a_silent_node_is_missing_where_there_is_a_timeout_and_an_error_where_there_is_none() -> None:
    grid = InProcessGrid(app, 3, silent={0})
    step = (2 * 2 + 3 * 3) / (2 + 3)
    assert value(fedavg(grid, timeout=1.0)) == pytest.approx(10 + 2 * step)
    with pytest.raises(TimeoutError, match=r"\[0\]"):
        grid.send_and_receive(messages(grid))


def test_replies_can_be_pulled_one_at_a_time_and_once() -> None:
    grid = InProcessGrid(app, 3)
    ids = list(grid.push_messages(messages(grid)))
    assert not [t for t in grid.traffic if t.direction == "up"]  # nobody has run yet
    for message_id in reversed(ids):
        (reply,) = grid.pull_messages([message_id])
        assert reply.metadata.reply_to_message_id == message_id
        with pytest.raises(KeyError, match=message_id):
            grid.pull_messages([message_id])


def test_a_node_that_does_not_exist_gets_no_message() -> None:
    grid = InProcessGrid(app, 2)
    content = RecordDict({"arrays": ArrayRecord([np.zeros(2)])})
    assert list(grid.push_messages([Message(content, 5, "train")])) == []


def test_nodes_registered_in_the_order_of_their_partitions_or_as_told() -> None:
    for partitions in (None, [2, 0, 1]):
        grid = InProcessGrid(app, 3, partitions=partitions, seed=4)
        nodes = sorted(grid.get_nodes(), key=lambda node: node.registered_at)
        assert [grid.partition_of[node.node_id] for node in nodes] == (partitions or [0, 1, 2])
        assert {node.node_id for node in nodes} == set(grid.get_node_ids())
    assert set(InProcessGrid(app, 3, seed=5).get_node_ids()).isdisjoint(grid.get_node_ids())
    with pytest.raises(ValueError, match="permutation"):
        InProcessGrid(app, 3, partitions=[0, 1, 1])


def test_clients_see_their_own_configuration() -> None:
    seen = []

    def client(message: Message, context: Context) -> Message:
        seen.append((dict(context.node_config), dict(context.run_config)))
        return Message(RecordDict(), reply_to=message)

    grid = InProcessGrid(client, 2, node_config=lambda i: {"rank": 4 * (i + 1)}, run_config={"lr": 0.1})
    grid.send_and_receive(messages(grid))
    assert seen == [
        ({"partition-id": 0, "num-partitions": 2, "rank": 4}, {"lr": 0.1}),
        ({"partition-id": 1, "num-partitions": 2, "rank": 8}, {"lr": 0.1}),
    ]


def test_traffic_counts_the_bytes_and_keeps_messages_only_when_told() -> None:
    for record in (False, True):
        grid = InProcessGrid(app, 2, record=record)
        content = RecordDict({"arrays": ArrayRecord([np.zeros(1000)])})
        sent = [Message(content, node_id, "train") for node_id in grid.partition_of]
        grid.send_and_receive(sent)
        for direction in ("down", "up"):
            assert 2 * 8000 < grid.num_bytes(direction, "train") == grid.num_bytes(direction) < 2 * 8000 + 1500
        assert grid.num_bytes("up", "evaluate") == 0
        assert all((t.message is not None) == record for t in grid.traffic)
        assert "arrays" in content and len(content["arrays"]) == 1  # the client cleared its copy alone
