"""What stands between a client that means harm and the global model: caps, counts, selection, screened metrics."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp import NeighboringRelation, PrivacyConfig, SamplingMethod
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, FedAvg, Result
from flwr.supercore.differential_privacy import KEY_CLIPPING_NORM

from fedfrom import FedFroM, FedMerge
from fedfrom.wire.metrics import cap_examples, with_examples
from tests.inprocess import InProcessGrid
from tests.models import (
    Fault,
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

A, B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
HEAD = "base_model.model.head.weight"


def logged(log: pytest.LogCaptureFixture, *words: str) -> bool:
    return any(all(word in record.getMessage() for word in words) for record in log.records)


def run(strategy: Any, faults: dict[int, Fault], nodes: int = 5, rounds: int = 1, kind: str = "train") -> Result:
    return strategy.start(InProcessGrid(faulty(faults, kind), nodes), record_of(mixed_state()), num_rounds=rounds)


def says(key: str, value: Any) -> Fault:
    def fault(content: RecordDict) -> None:
        content["metrics"][key] = value

    return fault


def spoiled(key: str, value: float) -> Fault:
    def fault(content: RecordDict) -> None:
        content["arrays"] = record_of(
            {k: np.full_like(v, value) if k == key else v for k, v in arrays_of(content["arrays"]).items()}
        )

    return fault


def reshaped(content: RecordDict) -> None:
    content["arrays"] = record_of({**arrays_of(content["arrays"]), HEAD: np.zeros((1, 10), np.float32)})


def renamed(content: RecordDict) -> None:
    content["arrays"] = record_of({"w": np.zeros(2)})


# --- Reasons ---------------------------------------------------------------------------------------------------------


def test_rejections_are_counted_by_their_kind() -> None:
    faults = {
        0: spoiled(HEAD, math.nan),
        1: spoiled(B, math.inf),
        2: spoiled(HEAD, 3e38),
        3: reshaped,
        4: renamed,
        5: says("num-examples", 0),
    }
    strategy = FedFroM()
    metrics = run(strategy, faults, nodes=8).train_metrics_clientapp[1]
    found = {key: value for key, value in metrics.items() if key.startswith("replies-rejected")}
    assert found == {
        "replies-rejected": 6,
        "replies-rejected-not-finite": 2,
        "replies-rejected-too-large": 1,
        "replies-rejected-shapes": 1,
        "replies-rejected-keys": 1,
        "replies-rejected-examples": 1,
    }
    assert sum(strategy.reports[1].reasons.values()) == len(strategy.reports[1].rejected)


def test_what_is_wrong_first_is_the_reason() -> None:
    """Keys before shapes, shapes before num-examples, and entries last: only they take a pass over memory."""

    def both(one: Fault, other: Fault) -> Fault:
        def fault(content: RecordDict) -> None:
            other(content)
            one(content)

        return fault

    no_examples = says("num-examples", -1)
    for fault, kind in {
        "keys": both(renamed, no_examples),
        "shapes": both(reshaped, no_examples),
        "examples": both(spoiled(HEAD, math.nan), no_examples),
    }.items():
        strategy = FedFroM()
        run(strategy, {0: kind})
        assert strategy.reports[1].reasons == {fault: 1}


def later(faults: dict[int, Fault]) -> Any:
    """Return clients that are at fault from the second round on: a run that merged nothing would be an error."""

    def client(message: Message, context: Context) -> Message:
        is_first = message.content["config"]["server-round"] == 1
        return noisy(message, context) if is_first else faulty(faults)(message, context)

    return client


@pytest.mark.parametrize(("least", "skipped"), [(3, False), (4, True)])
def test_with_fewer_than_min_valid_replies_the_arrays_stay(
    least: int, skipped: bool, flower_log: pytest.LogCaptureFixture
) -> None:
    faults = {0: renamed, 1: spoiled(HEAD, math.nan)}
    strategy, start = FedFroM(min_valid_replies=least), record_of(mixed_state())
    result = strategy.start(InProcessGrid(later(faults), 5), start, num_rounds=2)
    before = FedFroM(min_valid_replies=least).start(InProcessGrid(noisy, 5), start, num_rounds=1)
    assert same_bits(result.arrays, before.arrays) == skipped
    assert (strategy.reports[2].merge is None) == skipped
    assert logged(flower_log, "expected at least 4 valid replies, found 3") == skipped
    assert logged(flower_log, "round 2 is skipped") == skipped
    # a skipped round says what it lacked, too
    metrics = result.train_metrics_clientapp[2]
    assert (metrics["replies-valid"], metrics["replies-rejected"], metrics["replies-rejected-keys"]) == (3, 2, 1)
    assert ("weight-max" in metrics) == (not skipped)


# --- num-examples ----------------------------------------------------------------------------------------------------


def test_examples_count_for_so_many_times_the_median_at_most() -> None:
    assert cap_examples([10, 20, 30, 1e12], 2.0) == [10, 20, 30, 50]
    assert cap_examples([10, 20, 30, 1e12], None) == [10, 20, 30, 1e12]
    assert cap_examples([7], 1.0) == [7] and cap_examples([], 4.0) == []


@pytest.mark.parametrize(
    ("strategy", "cap"), [(FedFroM, 3), (lambda **o: FedMerge("average", examples_power=1, **o), 10)]
)
def test_absurd_examples_count_as_what_they_are_capped_to(strategy: Any, cap: int, flower_log: Any) -> None:
    """10, 20, 30, 40 and 1e12: the median is 30, and so many times that is what the last counts for."""
    absurd = strategy(clip=None)
    result = run(absurd, {4: says("num-examples", 1e12)})
    expected = run(strategy(clip=None), {4: says("num-examples", 30 * cap)})
    assert same_bits(result.arrays, expected.arrays)
    assert result.train_metrics_clientapp[1]["examples-capped"] == 1
    assert expected.train_metrics_clientapp[1]["examples-capped"] == 0
    assert logged(
        flower_log, "aggregate_train", "num-examples 1e+12", f"counts as {30 * cap}", f"{cap} times the median"
    )
    # nor does it have the averages of the metrics to itself
    means = [each.train_metrics_clientapp[1]["loss"] for each in (result, expected)]
    assert means[0] == pytest.approx(means[1], rel=1e-12)

    bare = strategy(clip=None, examples_cap=None)
    assert not same_bits(run(bare, {4: says("num-examples", 1e12)}).arrays, expected.arrays)
    assert not absurd.reports[1].rejected


def test_counts_are_replaced_in_a_copy() -> None:
    content = RecordDict({"m": MetricRecord({"num-examples": 9, "loss": 1.0})})
    assert with_examples(content, "num-examples", 9.0) is content
    assert dict(with_examples(content, "num-examples", 3.0)["m"]) == {"num-examples": 3.0, "loss": 1.0}
    assert content["m"]["num-examples"] == 9


# --- Metrics ---------------------------------------------------------------------------------------------------------


def test_an_evaluate_reply_with_nan_or_absurd_examples_spoils_no_average(flower_log: Any) -> None:
    faults = {0: says("loss", math.nan), 1: says("loss", math.inf), 2: says("num-examples", 1e12)}
    found = run(FedFroM(), faults, nodes=6, kind="evaluate").evaluate_metrics_clientapp[1]["loss"]
    # partitions 2 to 5 have the losses 1/5, 1/6, 1/7, 1/8; their median of 1e12, 40, 50, 60 examples is 55
    counts, losses = [165, 40, 50, 60], [1 / 5, 1 / 6, 1 / 7, 1 / 8]
    assert found == pytest.approx(np.average(losses, weights=counts), rel=1e-12)
    assert logged(flower_log, "aggregate_evaluate", "'loss'", "finite", "nan")
    assert logged(flower_log, "aggregate_evaluate", "1e+12", "counts as 165")


def test_a_train_replys_nan_metric_leaves_its_arrays_in_and_its_metrics_out(flower_log: Any) -> None:
    strategy = FedFroM()
    result, sound = run(strategy, {0: says("loss", math.nan)}), run(FedFroM(), {})
    assert same_bits(result.arrays, sound.arrays) and not strategy.reports[1].rejected
    counts = [20, 30, 40, 50]
    expected = np.average([1 / 4, 1 / 5, 1 / 6, 1 / 7], weights=counts)
    assert result.train_metrics_clientapp[1]["loss"] == pytest.approx(expected, rel=1e-12)
    assert logged(flower_log, "out of the averages", "'loss'")


# --- Clipping --------------------------------------------------------------------------------------------------------


def loud(scale: float) -> Fault:
    """Move against what was sent, `scale` times as far."""

    def fault(content: RecordDict) -> None:
        start = mixed_state()
        found = arrays_of(content["arrays"])
        for key in (B, HEAD):
            found[key] = (start[key] - scale * (found[key] - start[key])).astype(np.float32)
        content["arrays"] = record_of({**found, A: start[A]})

    return fault


def test_the_default_clips_and_its_merge_hardly_depends_on_how_loud_an_attacker_is() -> None:
    start = products(mixed_state())

    def moved(strategy: FedFroM, faults: dict[int, Fault]) -> np.ndarray:
        found = products(arrays_of(run(strategy, faults, nodes=9).arrays))
        return np.concatenate([(found[name] - start[name]).ravel() for name in (HEAD, "base_model.model.q")])

    quiet, large, larger = (moved(FedFroM(), {0: loud(scale)}) for scale in (1, 1e3, 1e6))
    assert np.linalg.norm(larger - large) < 1e-2 * np.linalg.norm(large)
    assert np.linalg.norm(large) < 2 * np.linalg.norm(quiet)
    bare = moved(FedFroM(clip=None), {0: loud(1e3)})
    assert np.linalg.norm(bare) > 50 * np.linalg.norm(large)


# --- Selection -------------------------------------------------------------------------------------------------------


def alike(message: Message, context: Context) -> Message:
    """As `noisy`, all partitions as far, and mostly in one direction."""
    reply = noisy(message, context)
    if message.metadata.message_type == "train":
        sent = arrays_of(message.content["arrays"])
        common, own = (np.random.default_rng(s) for s in (7, int(context.node_config["partition-id"]) + 100))
        moved = {
            key: (value + 0.1 * common.normal(size=value.shape) + 0.05 * own.normal(size=value.shape)).astype(
                value.dtype
            )
            for key, value in sent.items()
        }
        reply.content["arrays"] = record_of(moved)
    return reply


def attacked(scales: dict[int, float]) -> Any:
    def client(message: Message, context: Context) -> Message:
        reply = alike(message, context)
        partition = int(context.node_config["partition-id"])
        if message.metadata.message_type == "train" and partition in scales:
            loud(scales[partition])(reply.content)
        return reply

    return client


def test_multikrum_leaves_attackers_out_and_the_rest_is_merged_as_without_them() -> None:
    strategy = FedFroM(select="multikrum", attackers=2)
    grid = InProcessGrid(attacked({1: 1.0, 4: 1e6}), 8)
    result = strategy.start(grid, record_of(mixed_state()), num_rounds=1)
    assert {grid.partition_of[node] for node in strategy.reports[1].nodes} == {0, 2, 3, 5, 6, 7}
    assert result.train_metrics_clientapp[1]["replies-rejected-unselected"] == 2
    assert all("select" in reason for reason in strategy.reports[1].rejected.values())
    without = FedFroM().start(InProcessGrid(alike, 8, silent=[1, 4]), record_of(mixed_state()), num_rounds=1)
    assert same_bits(result.arrays, without.arrays)


def test_what_is_selected_does_not_depend_on_the_factors_or_the_order() -> None:
    def turned(message: Message, context: Context) -> Message:
        reply = attacked({1: 1.0})(message, context)
        if message.metadata.message_type == "train":
            found = arrays_of(reply.content["arrays"])
            partition = int(context.node_config["partition-id"])
            G = np.linalg.qr(np.random.default_rng(partition).normal(size=(4, 4)))[0] * 2.0 ** (partition - 3)
            found[A] = np.linalg.solve(G, found[A]).astype(np.float32)
            found[B] = (found[B] @ G).astype(np.float32)
            reply.content["arrays"] = record_of(found)
        return reply

    for client, options in ((attacked({1: 1.0}), {}), (turned, {}), (turned, {"reply_order": 3, "seed": 5})):
        strategy = FedFroM(select="multikrum", attackers=1)
        grid = InProcessGrid(client, 8, **options)
        strategy.start(grid, record_of(mixed_state()), num_rounds=1)
        assert {grid.partition_of[node] for node in strategy.reports[1].rejected} == {1}


def test_a_round_with_too_few_replies_to_select_from_is_skipped(flower_log: pytest.LogCaptureFixture) -> None:
    strategy = FedFroM(select="multikrum", attackers=2)
    with pytest.raises(RuntimeError, match="select: expected at least .* found 6"):  # as no round merges anything
        run(strategy, {}, nodes=6)
    assert strategy.reports[1].merge is None and logged(flower_log, "round 1 is skipped")
    assert logged(flower_log, "select: expected at least 2 * 2 + 3 valid replies", "found 6")


def test_rejected_replies_are_among_the_attackers_that_were_reckoned_with() -> None:
    """Who sends NaN could otherwise have every round skipped, or an honest client left out in its place."""
    strategy = FedFroM(select="multikrum", attackers=2)
    result = run(strategy, {0: renamed, 3: spoiled(HEAD, math.nan)}, nodes=6)
    expected = run(FedFroM(), {0: renamed, 3: spoiled(HEAD, math.nan)}, nodes=6)
    assert len(strategy.reports[1].nodes) == 4 and same_bits(result.arrays, expected.arrays)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"examples_cap": 0.5}, ["examples_cap", "0.5"]),
        ({"examples_cap": math.nan}, ["examples_cap", "nan"]),
        ({"min_valid_replies": 0}, ["min_valid_replies", "0"]),
        ({"min_valid_replies": True}, ["min_valid_replies", "True"]),
        ({"attackers": True, "select": "multikrum"}, ["attackers", "True"]),
        ({"examples_cap": "3"}, ["examples_cap", "'3'"]),
        ({"node_timeout": "3600"}, ["node_timeout", "'3600'"]),
        ({"checkpoints_kept": True}, ["checkpoints_kept", "True"]),
        ({"memory_budget": True}, ["memory_budget", "True"]),
        ({"min_valid_replies": 2.5}, ["min_valid_replies", "2.5"]),
        ({"select": "krum"}, ["select", "'multikrum'", "'krum'"]),
        ({"attackers": 1}, ["attackers", "select"]),
        ({"select": "multikrum", "attackers": -1}, ["attackers", "-1"]),
        ({"clip": 0}, ["clip", "0"]),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(options: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        FedFroM(**options)
    for word in named:
        assert word in str(error.value)


def test_a_function_that_takes_no_report_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="on_round: expected a function that takes a round's report"):
        FedFroM(on_round=lambda: 1)  # type: ignore[misc,arg-type]


# --- Flower's differential privacy -----------------------------------------------------------------------------------

FLOATS = {key: value for key, value in mixed_state().items() if value.dtype.kind == "f"}
LOCAL = LocalDpMod(clipping_norm=0.05, sensitivity=1e-6, epsilon=10.0, delta=1e-5)


def behind(mod: Any) -> Any:
    def client(message: Message, context: Context) -> Message:
        return noisy(message, context) if message.metadata.message_type == "evaluate" else mod(message, context, noisy)

    return client


@pytest.mark.parametrize("mod", [fixedclipping_mod, adaptiveclipping_mod, LOCAL], ids=["fixed", "adaptive", "local"])
def test_flowers_dp_mods_compose_with_full_models_and_with_adapters(mod: Any) -> None:
    """They clip what is sent, entry by entry: an adapter's factors, so that its product is not within the norm."""
    for state in (FLOATS, {key: value for key, value in FLOATS.items() if "lora" not in key}):
        grid = InProcessGrid(behind(mod), 3, record=True)
        strategy = FedFroM(clip=None)
        config = ConfigRecord({KEY_CLIPPING_NORM: 0.05})
        result = strategy.start(grid, record_of(state), num_rounds=1, train_config=config)
        assert not grid.errors and not strategy.reports[1].rejected and not strategy.reports[1].failed
        sent = arrays_of(crossed(grid, "down")[0][0]["arrays"])
        replies = [arrays_of(crossed(grid, "up")[0][i]["arrays"]) for i in range(3)]
        for found in replies:
            norm = np.sqrt(sum(np.linalg.norm(found[key] - sent[key]) ** 2 for key in sent))
            assert norm == pytest.approx(0.05, rel=1e-2)  # float32, and the noise of LocalDpMod
        expected = oracle(sent, replies, [10, 20, 30], k=0.5, p=0.5)
        assert far_apart(products(arrays_of(result.arrays)), expected) < 1e-5


@pytest.mark.parametrize("mod", [fixedclipping_mod, adaptiveclipping_mod])
def test_flowers_clipping_mods_do_not_go_with_lora_config(mod: Any) -> None:
    """They demand one ConfigRecord, and lora_config sends a second: the run ends loudly, and nothing moves."""
    strategy = FedFroM(lora_config={"r": 4, "lora_alpha": 4})
    config = ConfigRecord({KEY_CLIPPING_NORM: 0.05})
    with pytest.raises(RuntimeError, match="3 replies, errors alone"):
        strategy.start(InProcessGrid(behind(mod), 3), record_of(FLOATS), num_rounds=1, train_config=config)
    assert len(strategy.reports[1].failed) == 3 and strategy.reports[1].merge is None


def test_flowers_dp_strategy_wraps_but_its_accountant_is_refused() -> None:
    """Its noise assumes uniform weights, which norms are not: no epsilon may be claimed for FedFroM."""
    wrapped = DifferentialPrivacyClientSideFixedClipping(FedFroM(fraction_evaluate=0.0), 0.1, 0.05, 3)
    result = wrapped.start(InProcessGrid(behind(fixedclipping_mod), 3), record_of(FLOATS), num_rounds=1)
    assert all(np.isfinite(value).all() for value in arrays_of(result.arrays).values())
    config = PrivacyConfig(
        target_delta=1e-5,
        population_size=3,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        sampling_method=SamplingMethod.NO_AMPLIFICATION,
    )
    accountant = SimpleNamespace(config=config)  # Flower's own needs a package that is not among the dependencies
    DifferentialPrivacyClientSideFixedClipping(FedAvg(), 1.0, 0.05, 3, accountant=accountant)  # it would do for FedAvg
    with pytest.raises(ValueError, match="FedAvg.aggregate_train"):
        DifferentialPrivacyClientSideFixedClipping(FedFroM(), 1.0, 0.05, 3, accountant=accountant)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"k": math.inf}, True),
        ({"k": math.inf, "clip": None}, False),
        ({"k": math.inf, "scope": "model"}, False),  # whole updates, which no clipping makes equal
        ({"k": 8.0}, False),
        ({"k": "auto", "validate": lambda state: 0.0}, False),
    ],
)
def test_the_summary_says_that_clipping_comes_before_infinity(
    settings: dict[str, Any], said: bool, flower_log: pytest.LogCaptureFixture
) -> None:
    FedFroM(**settings).summary()
    assert logged(flower_log, "k is infinite", "clip=None") == said
