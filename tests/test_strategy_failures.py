"""Rounds with errors, rejections and silence, and the metrics of all rounds."""

import logging
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedfrom import FedFroM
from tests.inprocess import InProcessGrid
from tests.models import (
    FEDFROM,
    arrays_of,
    crossed,
    far_apart,
    faulty,
    mixed_state,
    noisy,
    oracle,
    products,
    record_of,
    same_bits,
)
from tests.rounds import emptied, logged, raising, run

# --- Failures --------------------------------------------------------------------------------------------------------


def test_two_errors_and_one_valid_reply_complete_the_round() -> None:
    strategy = FedFroM()
    grid = InProcessGrid(faulty({0: raising, 2: raising}), 3, record=True)
    result = strategy.start(grid, record_of(mixed_state()), num_rounds=2)
    assert len(grid.errors) == 4
    report = strategy.reports[2]
    assert [grid.partition_of[node] for node in report.nodes] == [1]
    assert {grid.partition_of[node] for node in report.failed} == {0, 2}
    assert all("out of memory" in reason for reason in report.failed.values())
    sent = arrays_of(crossed(grid, "down")[1][0]["arrays"])
    reply = crossed(grid, "up")[1][1]
    assert (
        far_apart(products(arrays_of(result.arrays)), oracle(sent, [arrays_of(reply["arrays"])], [20], **FEDFROM))
        < 1e-5
    )
    metrics = result.train_metrics_clientapp[2]
    assert (metrics["replies-valid"], metrics["replies-failed"], metrics["replies-rejected"]) == (1, 2, 0)


def test_lost_nodes_are_named_though_the_superlink_answers_for_them() -> None:
    strategy = FedFroM()
    grid = InProcessGrid(noisy, 4, lost={1, 3})
    strategy.start(grid, record_of(mixed_state()), num_rounds=1)
    report = strategy.reports[1]
    assert {grid.partition_of[node] for node in report.failed} == {1, 3} and not report.missing
    assert all("Node Unavailable" in reason for reason in report.failed.values())
    assert {grid.partition_of[node] for node in report.nodes} == {0, 2}


def test_an_error_a_rejection_and_one_valid_reply_complete_the_round() -> None:
    result = run(faulty({0: raising, 2: emptied}), rounds=1)
    metrics = result.train_metrics_clientapp[1]
    assert (metrics["replies-valid"], metrics["replies-failed"], metrics["replies-rejected"]) == (1, 1, 1)
    assert not same_bits(result.arrays, record_of(mixed_state()))


def test_without_a_valid_reply_the_arrays_stay(flower_log: pytest.LogCaptureFixture) -> None:
    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and message.content["config"]["server-round"] == 2:
            return faulty({0: raising, 1: emptied, 2: emptied})(message, context)
        return noisy(message, context)

    grid = InProcessGrid(client, 3, record=True)
    strategy = FedFroM()
    result = strategy.start(grid, record_of(mixed_state()), num_rounds=3)
    down = crossed(grid, "down")
    assert same_bits(down[1][0]["arrays"], down[2][0]["arrays"])
    assert not same_bits(down[0][0]["arrays"], down[1][0]["arrays"])
    assert not same_bits(down[2][0]["arrays"], result.arrays)
    assert set(result.train_metrics_clientapp) == {1, 2, 3}
    skipped = result.train_metrics_clientapp[2]
    assert (skipped["replies-valid"], skipped["replies-rejected"], skipped["replies-failed"]) == (0, 2, 1)
    assert "weight-max" not in skipped and "loss" not in skipped
    assert set(result.evaluate_metrics_clientapp) == {1, 2, 3}
    report = strategy.reports[2]
    assert report.merge is None and report.nodes == [] and len(report.rejected) == 2 and len(report.failed) == 1
    assert logged(flower_log, "round 2 is skipped", "stay")
    assert not logged(flower_log, "no valid reply", "round 1")


def test_reasons_are_logged_by_kind_and_before_what_comes_of_them(caplog: pytest.LogCaptureFixture) -> None:
    def infinite(content: RecordDict) -> None:
        content["arrays"]["base_model.model.head.weight"] = Array(np.full((3, 10), np.inf, np.float32))

    strategy = FedFroM(min_valid_replies=2, fraction_evaluate=0.0)
    grid = InProcessGrid(faulty({0: emptied, 1: infinite, 2: emptied, 3: emptied}), 5)
    ended = pytest.raises(RuntimeError, match="expected at least 2 valid replies, found 1")
    with caplog.at_level(logging.DEBUG, logger="flwr"), ended:
        strategy.start(grid, record_of(mixed_state()), num_rounds=1)
    at = {"keys": "rejected 3 replies (keys), such as node", "not-finite": "rejected 1 reply (not-finite), node"}
    at |= {"few": "expected at least 2 valid replies, found 1", "skipped": "round 1 is skipped"}
    found = {name: logged(caplog, words) for name, words in at.items()}
    assert all(len(records) == 1 and records[0].levelname == "WARNING" for records in found.values()), found
    order = [caplog.records.index(found[name][0]) for name in at]
    assert order == sorted(order)
    keys = found["keys"][0].getMessage()
    examples = [node for node, reason in strategy.reports[1].rejected.items() if f"{node}'s: {reason}" in keys]
    assert len(examples) == 1 and grid.partition_of[examples[0]] in (0, 2, 3)
    assert len(strategy.reports[1].rejected) == 4  # each with its own reason
    for node, reason in strategy.reports[1].rejected.items():
        (record,) = logged(caplog, f"rejected the reply of node {node}: {reason}")
        assert record.levelname == "DEBUG"
    caplog.clear()
    with pytest.raises(RuntimeError, match="errors alone"):
        grid = InProcessGrid(faulty(dict.fromkeys(range(2), raising)), 2)
        FedFroM().start(grid, record_of(mixed_state()), num_rounds=1)
    assert logged(caplog, "expected at least 1 valid reply, found 0")


def test_a_silent_node_costs_its_own_reply_alone() -> None:
    strategy = FedFroM()
    grid = InProcessGrid(noisy, 3, silent=[1])
    result = strategy.start(grid, record_of(mixed_state()), num_rounds=2, timeout=5)
    assert {grid.partition_of[node] for node in strategy.reports[2].nodes} == {0, 2}
    assert result.train_metrics_clientapp[2]["replies-valid"] == 2
    silent = InProcessGrid(noisy, 3, silent=range(3))
    assert same_bits(FedFroM().start(silent, record_of(mixed_state()), num_rounds=1).arrays, record_of(mixed_state()))


@pytest.mark.parametrize(("options", "seconds"), [({"timeout": 12.5}, 12.5), ({}, 3600)])
def test_silent_nodes_are_waited_for_until_the_timeout(options: dict[str, Any], seconds: float) -> None:
    grid = InProcessGrid(noisy, 2, silent=[1])
    FedFroM(fraction_evaluate=0.0).start(grid, record_of(mixed_state()), num_rounds=1, **options)
    assert grid.clock.now == pytest.approx(seconds)


# --- Metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_are_fedavgs_and_the_strategys_own() -> None:
    initial = record_of(mixed_state())
    fedavg = FedAvg().start(InProcessGrid(noisy, 3), initial, num_rounds=2)
    fedfrom = FedFroM(clip=None).start(InProcessGrid(noisy, 3), initial, num_rounds=2)
    for server_round in (1, 2):
        metrics = dict(fedfrom.train_metrics_clientapp[server_round])
        for key, value in fedavg.train_metrics_clientapp[server_round].items():
            assert metrics.pop(key) == pytest.approx(value, rel=1e-12)
        assert set(metrics) == {
            *("replies-valid", "replies-rejected", "replies-failed", "replies-missing", "merge-seconds"),
            *("weight-min", "weight-max", "clients-effective", "lambda-max", "rank-max", "energy-dropped-max"),
            *("interference", "cosine-mean", "server-lr-min", "updates-clipped", "examples-capped"),
            *("bytes-down", "bytes-up"),
        }
        size = sum(len(array.data) for array in initial.values())
        assert metrics["bytes-down"] == metrics["bytes-up"] == 3 * size
        assert 0 < metrics["weight-min"] < 1 / 3 < metrics["weight-max"] < 1 < metrics["clients-effective"] <= 3
        assert 1 / 3 < metrics["lambda-max"] <= 1 and 0 < metrics["energy-dropped-max"] < 1
        assert metrics["rank-max"] == 4 and metrics["merge-seconds"] > 0
        assert 0 < metrics["interference"] < 1 and -1 < metrics["cosine-mean"] < 1
        assert metrics["server-lr-min"] == 1.0 and metrics["updates-clipped"] == 0
    assert {r: dict(m) for r, m in fedfrom.evaluate_metrics_clientapp.items()} == {
        r: pytest.approx(dict(m), rel=1e-12) for r, m in fedavg.evaluate_metrics_clientapp.items()
    }


def test_lists_are_averaged_and_other_keys_left_out(flower_log: pytest.LogCaptureFixture) -> None:
    def more(content: RecordDict) -> None:
        content["metrics"]["classes"] = [1.0, 2.0]

    def three(content: RecordDict) -> None:
        more(content)
        content["metrics"]["mine"] = 4.0

    def longer(content: RecordDict) -> None:
        content["metrics"]["classes"] = [1.0, 2.0, 3.0]

    metrics = run(faulty({0: more, 1: three, 2: more}), rounds=1).train_metrics_clientapp[1]
    assert metrics["classes"] == pytest.approx([1.0, 2.0]) and "mine" not in metrics and "loss" in metrics
    assert logged(flower_log, "'mine'")
    metrics = run(faulty({0: more, 1: longer, 2: more}), rounds=1).train_metrics_clientapp[1]
    assert metrics["classes"] == pytest.approx([1.0, 2.0]) and metrics["replies-valid"] == 3
    assert logged(flower_log, "1 replies lack")
    metrics = run(faulty({0: more, 1: longer}), rounds=1).train_metrics_clientapp[1]  # none is what most have
    assert "classes" not in metrics and "loss" in metrics


def test_evaluate_replies_are_screened_too(flower_log: pytest.LogCaptureFixture) -> None:
    def other(content: RecordDict) -> None:
        content["metrics"] = MetricRecord({"num-examples": 10, "accuracy": 0.5})

    def none(content: RecordDict) -> None:
        content["metrics"]["num-examples"] = 0

    def nothing(content: RecordDict) -> None:
        content.clear()

    grid = InProcessGrid(faulty({0: other, 1: raising, 2: none, 3: nothing}, "evaluate"), 6)
    strategy = FedFroM()
    result = strategy.start(grid, record_of(mixed_state()), num_rounds=1)
    found = result.evaluate_metrics_clientapp[1]
    assert "loss" in found and "accuracy" not in found  # two of three valid ones have it, and are averaged
    assert logged(flower_log, "aggregate_evaluate", "num-examples", "found 0")
    assert logged(flower_log, "aggregate_evaluate", "one MetricRecord")
    grid = InProcessGrid(faulty({1: raising, 2: none}, "evaluate"), 4)
    found = FedFroM().start(grid, record_of(mixed_state()), num_rounds=1).evaluate_metrics_clientapp[1]
    assert found == {"loss": pytest.approx((10 / 3 + 40 / 6) / 50)}
    grid = InProcessGrid(faulty(dict.fromkeys(range(4), raising), "evaluate"), 4)
    assert FedFroM().start(grid, record_of(mixed_state()), num_rounds=1).evaluate_metrics_clientapp == {}


def test_a_users_own_aggregation_of_metrics() -> None:
    def largest(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
        assert weighted_by_key == "num-examples"
        return MetricRecord({"loss": max(content["metrics"]["loss"] for content in contents)})

    result = run(rounds=1, train_metrics_aggr_fn=largest, evaluate_metrics_aggr_fn=largest)
    assert result.train_metrics_clientapp[1]["loss"] == pytest.approx(1 / 3)
    assert result.train_metrics_clientapp[1]["replies-valid"] == 3
    assert result.evaluate_metrics_clientapp[1] == {"loss": pytest.approx(1 / 3)}


def test_a_users_own_aggregation_may_give_none() -> None:
    """FedAvg's loop takes None for no metrics; the strategy's own are there all the same."""
    result = run(rounds=1, train_metrics_aggr_fn=lambda contents, key: None)
    assert result.train_metrics_clientapp[1]["replies-valid"] == 3
