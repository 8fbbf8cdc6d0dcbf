"""Neither the order of the replies nor the nodes change a bit of a round; who is sampled follows from the seed."""

import math
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Result

from fedfrom import FedFroM
from tests.inprocess import InProcessGrid
from tests.models import (
    arrays_of,
    crossed,
    mixed_state,
    noisy,
    record_of,
    same_bits,
)
from tests.rounds import UNIT, logged, run, stable


def copycat(message: Message, context: Context) -> Message:
    """As `noisy`, but two pairs of partitions tie: in their examples and metrics, or in all they send."""
    partition = int(context.node_config["partition-id"])
    twin = {3: 1, 4: 0}.get(partition, partition)
    context.node_config["partition-id"] = twin
    reply = noisy(message, context)
    context.node_config["partition-id"] = partition
    if partition == 3 and message.metadata.message_type == "train":  # another update, of the same norm
        sent = arrays_of(message.content["arrays"])
        found = arrays_of(reply.content["arrays"])
        head = "base_model.model.head.weight"
        found[head] = sent[head] - (found[head] - sent[head])
        reply.content["arrays"] = record_of(found)
    return reply


@pytest.mark.parametrize(
    "options", [{}, {"scope": "model", "lora_config": UNIT}, {"solver": "alternating"}, {"k": math.inf}], ids=str
)
def test_order_and_nodes_change_no_bit(options: dict[str, Any]) -> None:
    ends = []
    for grid in (
        InProcessGrid(copycat, 5),
        InProcessGrid(copycat, 5, reply_order=1),
        InProcessGrid(copycat, 5, reply_order=2, seed=99),
        InProcessGrid(copycat, 5, reply_order=3, seed=7, partitions=[4, 2, 0, 3, 1]),
    ):
        ends.append(FedFroM(**options).start(grid, record_of(mixed_state()), num_rounds=3))
    for end in ends[1:]:
        assert same_bits(end.arrays, ends[0].arrays)
        assert stable(end.train_metrics_clientapp) == stable(ends[0].train_metrics_clientapp)
        assert end.evaluate_metrics_clientapp == ends[0].evaluate_metrics_clientapp


def test_order_changes_no_bit_where_norms_and_metrics_tie() -> None:
    """x + a - a and x - a + a differ in their last bits, and nothing but the content tells a from -a."""

    def client(message: Message, context: Context) -> Message:
        i = int(context.node_config["partition-id"])
        draw = np.random.default_rng(min(i, 1)).normal(size=(40, 50))
        update = (0.01 * draw, draw, -draw)[i].astype(np.float32)
        metrics = MetricRecord({"num-examples": 5})
        return Message(RecordDict({"arrays": record_of({"w": update}), "metrics": metrics}), reply_to=message)

    ends = []
    for partitions in ([0, 1, 2], [0, 2, 1], [2, 1, 0]):
        strategy = FedFroM(fraction_evaluate=0.0)
        grid = InProcessGrid(client, 3, partitions=partitions)
        ends.append(strategy.start(grid, record_of({"w": np.zeros((40, 50), np.float32)}), num_rounds=1).arrays)
        layer = strategy.reports[1].merge.layers[0]
        assert len(set(layer.norms)) == 2 and len(set(layer.weights)) == 2  # they do tie
    assert same_bits(ends[0], ends[1]) and same_bits(ends[0], ends[2])


def sampled(seed: int, grid_seed: int = 0, **options: Any) -> tuple[list[set[int]], Result]:
    grid = InProcessGrid(noisy, 8, record=True, seed=grid_seed)
    strategy = FedFroM(fraction_train=0.5, fraction_evaluate=0.25, seed=seed, **options)
    result = strategy.start(grid, record_of(mixed_state()), num_rounds=6)
    assert [len(c) for c in crossed(grid, "down")] == [4] * 6
    assert [len(c) for c in crossed(grid, "down", "evaluate")] == [2] * 6
    return [set(content) for content in crossed(grid, "down")], result


def test_sampling_follows_the_seed_and_the_order_of_registration() -> None:
    chosen, result = sampled(seed=1)
    again, same = sampled(seed=1, grid_seed=55)  # other node ids, listed in another order
    assert chosen == again and same_bits(result.arrays, same.arrays)
    assert len({frozenset(nodes) for nodes in chosen}) > 1
    assert set().union(*chosen) == set(range(8))
    other, _ = sampled(seed=2)
    assert other != chosen


def test_a_round_samples_as_it_would_without_the_rounds_before() -> None:
    """A run that resumes at round 3 must draw what the uninterrupted one drew."""
    chosen, _ = sampled(seed=1)
    grid = InProcessGrid(noisy, 8)
    messages = FedFroM(fraction_train=0.5, seed=1).configure_train(3, record_of(mixed_state()), ConfigRecord(), grid)
    assert isinstance(messages, list)  # HttpGrid iterates twice
    assert {grid.partition_of[m.metadata.dst_node_id] for m in messages} == chosen[2]


def test_sampling_leaves_no_node_twice_and_obeys_the_minimum() -> None:
    grid = InProcessGrid(noisy, 5)
    messages = FedFroM(fraction_train=0.01, min_train_nodes=3).configure_train(
        1, record_of(mixed_state()), ConfigRecord(), grid
    )
    assert len({m.metadata.dst_node_id for m in messages}) == 3


def test_waits_until_enough_nodes_are_there(flower_log: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = InProcessGrid(noisy, 4)
    every, calls = grid.get_nodes, []

    def joining() -> list:
        calls.append(1)
        return list(every())[: len(calls)]

    monkeypatch.setattr(grid, "get_nodes", joining)
    monkeypatch.setattr("fedfrom.wire.sampling.time.sleep", lambda seconds: None)
    messages = FedFroM(min_available_nodes=4).configure_train(1, record_of(mixed_state()), ConfigRecord(), grid)
    assert len(calls) == 4 and len(messages) == 4
    assert len(logged(flower_log, "Waiting", "3 connected", "4")) == 1


@pytest.mark.parametrize("nodes", [1, 3])
def test_too_few_nodes_end_the_run_by_name_after_the_timeout(nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("fedfrom.wire.sampling.time.sleep", waited.append)
    monkeypatch.setattr("fedfrom.wire.sampling.time.monotonic", lambda: float(len(waited)))
    with pytest.raises(RuntimeError, match=f"round 1: expected 4 nodes within 7 s, found {nodes}.*min_available_nodes"):
        run(nodes=nodes, min_available_nodes=4, node_timeout=7)
    assert len(waited) == 7
    with pytest.raises(ValueError, match="node_timeout"):
        FedFroM(node_timeout=-1)
