"""Hostile replies: each is rejected with a reason, or merged rightly."""

import contextlib
import json
import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import event, given
from hypothesis import strategies as st

from fedfrom import FedFroM, FedMerge
from fedfrom.wire.adapter_configs import ADAPTER_KEY
from fedfrom.wire.contents import STATISTICS_KEY
from tests.hostile.given import STATES, STATISTICS, assert_reason, sent_and_replies
from tests.hostile.oracle import assert_is_the_merge, config_of, scaling_of
from tests.hostile.replies import reply_faults
from tests.hostile.values import (
    CONFIG,
    HEAD,
    cases,
)
from tests.hostile.watch import harmless, soon
from tests.models import FEDFROM, Arrays, Scaling, arrays_of

pytestmark = pytest.mark.timeout(6 * 3600)  # thousands of cases, on a machine that has other work


def score(state: dict[str, torch.Tensor]) -> float:
    return -float(state[HEAD].double().norm())


# The strategy, and the settings that the oracle needs; None where it does not know the method.
STRATEGIES: dict[str, tuple[Any, dict[str, Any] | None]] = {
    "from": (lambda: FedFroM(), FEDFROM),
    "from, with configs": (lambda: FedFroM(lora_config=CONFIG), FEDFROM),
    "the paper's": (lambda: FedFroM(lora_config=CONFIG, k=1.0, examples_power=0.0), {**FEDFROM, "k": 1.0, "p": 0.0}),
    "the largest": (lambda: FedFroM(lora_config=CONFIG, clip=None, k=math.inf), {"k": math.inf, "p": 0.5}),
    "whole updates": (lambda: FedFroM(lora_config=CONFIG, scope="model"), {**FEDFROM, "scope": "model"}),
    "half a step": (lambda: FedFroM(server_lr=0.5), {**FEDFROM, "server_lr": 0.5}),
    "average": (lambda: FedMerge("average", examples_power=1.0), {"k": 0.0, "p": 1.0}),
    "alternating": (lambda: FedFroM(lora_config=CONFIG, solver="alternating"), None),
    "k=auto": (lambda: FedFroM(k="auto", validate=score), None),
    "clipped and safe": (lambda: FedFroM(lora_config=CONFIG, clip=2.0, server_lr="safe"), None),
    "factor-average": (lambda: FedMerge("factor-average"), None),
    "task-arithmetic": (lambda: FedMerge("task-arithmetic", lora_config=CONFIG), None),
    "ties": (lambda: FedMerge("ties"), None),
    "dare-ties": (lambda: FedMerge("dare-ties"), None),
    "dare-from": (lambda: FedMerge("dare-from"), None),
    "knots-ties": (lambda: FedMerge("knots-ties", lora_config=CONFIG), None),
    "tsv": (lambda: FedMerge("tsv", lora_config=CONFIG), None),
    "iso-cts": (lambda: FedMerge("iso-cts"), None),
    "core-ties": (lambda: FedMerge("core-ties", lora_config=CONFIG), None),
    "ctm": (lambda: FedMerge("ctm", lora_config=CONFIG), None),
    "greedy-soup": (lambda: FedMerge("greedy-soup", validate=score), None),
    "regmean": (lambda: FedMerge("regmean", lora_config=CONFIG), None),
    "lorm": (lambda: FedMerge("lorm", lora_config=CONFIG), None),
    "fisher": (lambda: FedMerge("fisher"), None),
}


@st.composite
def rounds(draw: st.DrawFn) -> tuple[str, type, list[Any]]:
    """Draw a strategy, a dtype, and what is wrong with one client's reply."""
    name = draw(st.sampled_from(list(STRATEGIES)))
    dtype = draw(st.sampled_from([np.float32, np.float32, np.float32, np.float64, np.float16]))
    statistics = STATISTICS.get(STRATEGIES[name][0]().method.needs, {})
    faults = draw(st.lists(reply_faults(STATES[dtype], statistics), min_size=1, max_size=2))
    return name, dtype, faults


@cases(200)
@given(given_round=rounds())
def test_a_reply_is_rejected_with_a_reason_or_merged(given_round: Any) -> None:
    name, dtype, faults = given_round
    make, oracle = STRATEGIES[name]
    strategy, state = make(), STATES[dtype]
    honest, bad = sent_and_replies(strategy, state)
    for fault in faults:
        # Flower itself refuses some records, and one fault may need what another took away.
        with contextlib.suppress(TypeError, ValueError, KeyError, AttributeError):
            fault(bad.content)
    with harmless():
        arrays, metrics = strategy.aggregate_train(1, [*honest, bad])

    report = strategy.reports[1]
    event("rejected" if report.rejected else "merged")
    assert arrays is not None, report.rejected
    merged = arrays_of(arrays)
    assert {k: (v.shape, v.dtype) for k, v in merged.items()} == {k: (v.shape, v.dtype) for k, v in state.items()}
    assert all(np.isfinite(value).all() for value in merged.values())
    assert metrics["replies-valid"] + metrics["replies-rejected"] == 3
    json.dumps(report.to_dict())
    honest_nodes = {message.metadata.src_node_id for message in honest}
    assert set(report.rejected) <= {bad.metadata.src_node_id}
    for reason in report.rejected.values():
        assert_reason(reason)
    if name != "greedy-soup":
        assert honest_nodes <= set(report.nodes)
    if oracle is not None:
        accepted = honest if report.rejected else [*honest, bad]
        assert_round(merged, state, accepted, oracle, strategy.lora_config, strategy.examples_cap)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("alpha", [1e-39, 1e-300, 5e-324])
def test_a_scaling_at_which_the_global_adapter_overflows_costs_its_sender_alone(dtype: type, alpha: float) -> None:
    """Without an entry or a product that is too large."""
    strategy, state = STRATEGIES["from, with configs"][0](), STATES[dtype]
    honest, bad = sent_and_replies(strategy, state)
    bad.content[ADAPTER_KEY]["lora_alpha"] = alpha
    arrays, _ = strategy.aggregate_train(1, [*honest, bad])
    assert arrays is not None
    (reason,) = strategy.reports[1].rejected.values()
    assert "expected a scaling at which" in reason


def assert_round(
    merged: Arrays, state: Arrays, accepted: list[Message], oracle: dict[str, Any], lora_config: Any, cap: float | None
) -> None:
    """Assert that a round's result is the merge of these replies, read anew."""

    def scaling(message: Message) -> Scaling:
        if lora_config is None:
            return lambda module: 1.0
        record = message.content.config_records.get(ADAPTER_KEY)
        return scaling_of(lora_config if record is None else config_of(record))

    replies = [arrays_of(model_of(message.content)) for message in accepted]
    said = [next(iter(message.content.metric_records.values()))["num-examples"] for message in accepted]
    most = math.inf if cap is None else cap * statistics.median(said)
    examples = [min(count, most) for count in said]
    own = [scaling(message) for message in accepted]
    base = scaling_of(lora_config) if lora_config else lambda module: 1.0
    assert_is_the_merge(merged, state, replies, examples, scaling=base, scalings=own, **oracle)


def model_of(content: RecordDict) -> ArrayRecord:
    records = {name: record for name, record in content.array_records.items() if name != STATISTICS_KEY}
    return records["arrays"] if "arrays" in records else next(iter(records.values()))


@cases(40)
@given(
    value=st.one_of(st.floats(), st.integers(-(2**63), 2**63 - 1), st.lists(st.floats(), max_size=2)),
    key=st.sampled_from(["num-examples", "loss"]),
)
def test_metrics_of_evaluate_replies_are_averaged_or_left_out(value: Any, key: str) -> None:
    strategy = FedFroM()
    honest, bad = sent_and_replies(strategy, STATES[np.float32])
    with contextlib.suppress(TypeError):  # Flower's own
        bad.content["metrics"][key] = value
    with harmless():
        metrics = strategy.aggregate_evaluate(1, [*honest, bad])
    assert metrics is not None
    MetricRecord(dict(metrics))


def test_a_reply_may_not_name_more_modules_than_there_are() -> None:
    strategy = FedFroM(lora_config=CONFIG)
    honest, bad = sent_and_replies(strategy, STATES[np.float32])
    names = json.dumps({f"m{i}": 4 for i in range(100_000)})
    bad.content[ADAPTER_KEY] = ConfigRecord({**CONFIG, "rank_pattern": names, "alpha_pattern": "{}"})
    with soon(20):
        strategy.aggregate_train(1, [*honest, bad])
    (reason,) = strategy.reports[1].rejected.values()
    assert "rank_pattern" in reason and "100000" in reason


def test_a_reason_is_one_line_of_bearable_length() -> None:
    strategy = FedFroM()
    honest, bad = sent_and_replies(strategy, STATES[np.float32])
    bad.content["m\x1b[2J" + "x" * 10**6] = MetricRecord({"num-examples": 1})
    strategy.aggregate_train(1, [*honest, bad])
    (reason,) = strategy.reports[1].rejected.values()
    assert_reason(reason)


def test_a_scaling_beyond_sense_is_no_update_to_square() -> None:
    strategy = FedFroM(lora_config=CONFIG)
    honest, bad = sent_and_replies(strategy, STATES[np.float64])
    bad.content[ADAPTER_KEY] = ConfigRecord(
        {**CONFIG, "lora_alpha": 1e200, "rank_pattern": "{}", "alpha_pattern": "{}"}
    )
    strategy.aggregate_train(1, [*honest, bad])
    (reason,) = strategy.reports[1].rejected.values()
    assert "product of norm up to" in reason
