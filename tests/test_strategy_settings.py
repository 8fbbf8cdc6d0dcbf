"""Settings of the strategies: which are refused, what they change of a round, and what is reported and warned of."""

import inspect
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedfrom import Average, FedFroM, FedMerge, FroM
from fedfrom.rounds import RoundReport
from tests.inprocess import InProcessGrid
from tests.models import (
    FEDFROM,
    adapted,
    adapter,
    arrays_of,
    far_apart,
    faulty,
    mixed_state,
    noisy,
    record_of,
    same_bits,
)
from tests.rounds import Q, emptied, logged, raising, run

FRACTIONS = ("fraction_train", "fraction_evaluate")
COUNTS = ("min_train_nodes", "min_evaluate_nodes", "min_available_nodes")
KEYS = ("weighted_by_key", "arrayrecord_key", "configrecord_key")
FUNCTIONS = ("train_metrics_aggr_fn", "evaluate_metrics_aggr_fn")


def test_summary_logs_the_settings(flower_log: pytest.LogCaptureFixture) -> None:
    FedFroM(k=0.75, rank=3, server_lr=0.25, seed=11, fraction_train=0.125).summary()
    text = "\n".join(record.getMessage() for record in flower_log.records)
    for word in ("FroM", "k: 0.75", "rank: 3", "server_lr: 0.25", "seed: 11", "lora_config: False", "0.12"):
        assert word in text


def test_numbers_of_numpys_are_taken_as_pythons_own() -> None:
    options: dict[str, Any] = {"k": np.float32(0.25), "server_lr": np.float32(0.5), "clip": np.int64(2)}
    given, meant = FedFroM(**options), FedFroM(**{name: value.item() for name, value in options.items()})
    results = [each.start(InProcessGrid(noisy, 3), record_of(mixed_state()), num_rounds=1) for each in (given, meant)]
    assert same_bits(results[0].arrays, results[1].arrays)
    reports = [json.loads(json.dumps(each.reports[1].to_dict())) for each in (given, meant)]
    assert reports[0]["merge"]["method"] == reports[1]["merge"]["method"]


def test_defaults_are_the_designs() -> None:
    assert FedFroM().method == FroM(k=FEDFROM["k"], examples_power=FEDFROM["p"])
    assert FedFroM().clip == FEDFROM["clip"] and FedMerge().clip is None
    assert FedFroM().examples_cap == 3.0 and FedMerge().examples_cap == 10.0 and FedFroM().min_valid_replies == 1
    assert FedMerge().method == FroM(k=1.0, examples_power=0.0)
    assert FedMerge("average", examples_power=1).method == Average(examples_power=1)
    method = FroM(k=3, rank=2)
    assert FedMerge(method).method is method
    assert FedFroM(seed=5).method.seed == 5


def test_reports_can_be_written_as_json() -> None:
    from peft import LoraConfig

    state = adapter(adapted())

    def client(message: Message, context: Context) -> Message:
        return noisy(message, context)

    for lora_config in (None, LoraConfig(r=4, lora_alpha=8, target_modules=["query"])):
        strategy = FedFroM(lora_config=lora_config)
        strategy.start(InProcessGrid(faulty({1: emptied, 2: raising}), 4), state, num_rounds=2)
        report = json.loads(json.dumps(strategy.reports[2].to_dict()))
        assert len(report["nodes"]) == 2 and len(report["rejected"]) == 1 and len(report["failed"]) == 1
        assert report["merge"]["clients"] == [f"node {node}" for node in report["nodes"]]
        layers = {layer["name"]: layer for layer in report["merge"]["layers"]}
        assert sum(layers["base_model.model.query"]["weights"]) == pytest.approx(1)
        assert report["seconds"] > 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"k": float("-inf")}, ["k", "-inf"]),
        ({"k": math.nan}, ["k", "nan"]),
        ({"examples_power": -0.5}, ["examples_power", "-0.5"]),
        ({"examples_power": math.inf}, ["examples_power", "inf"]),
        ({"rank": 0}, ["rank", "0"]),
        ({"rank": -2}, ["rank", "-2"]),
        ({"rank": 1.5}, ["rank", "1.5"]),
        ({"rank": True}, ["rank", "True"]),
        ({"solver": "qr"}, ["solver", "'qr'"]),
        ({"scope": "client"}, ["scope", "'client'"]),
        ({"iterations": 0}, ["iterations", "0"]),
        ({"tolerance": -1e-3}, ["tolerance", "-0.001"]),
        ({"server_lr": math.nan}, ["server_lr", "nan"]),
        ({"server_lr": math.inf}, ["server_lr", "inf"]),
        ({"server_lr": -1.0}, ["server_lr", ">= 0", "-1.0"]),
        ({"server_lr": True}, ["server_lr", "True"]),
        ({"fraction_trian": 0.5}, ["fraction_trian"]),
        ({"spool": 3}, ["spool", "path of a folder", "found 3"]),
        ({"checkpoint": ["a"]}, ["checkpoint", "path of a folder", "found ['a']"]),
        ({"k": math.inf, "server_lr": "safe"}, ["server_lr", "k = infinity", "'safe'"]),
        ({"method": "ties"}, ["method", "FedMerge('ties')"]),
        ({"k": "auto", "validate": len, "search": {"k": ()}}, ["search, 'k'", "found ()"]),
        ({"validate": len}, ["validate", "k='auto'", "k=0.5"]),
        ({"on_round": 3}, ["on_round", "a function", "found 3"]),
        ({"density": 0.2}, ["density"]),
        ({"lora_config": {"r": 0, "lora_alpha": 8}}, ["lora_config", "r", "0"]),
        ({"lora_config": {"r": 8}}, ["lora_config", "lora_alpha"]),
        ({"lora_config": {"r": 8, "lora_alpha": 8, "use_dora": True}}, ["lora_config", "DoRA"]),
        ({"lora_config": {"r": 8, "lora_alpha": 8, "init_lora_weights": "pissa"}}, ["lora_config", "pissa"]),
        ({"lora_config": {"peft_type": "LOHA"}}, ["lora_config", "LOHA"]),
        ({"lora_config": {"r": 8, "lora_alpha": 8, "rank_pattern": {"q": 0}}}, ["lora_config", "rank_pattern", "0"]),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(options: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        FedFroM(**options)
    for word in named:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        *((name, (-0.1, 2.0, math.nan, "1", True, None), (0, 0.0, 0.5, 1)) for name in FRACTIONS),
        *((name, (-1, 1.5, 2.0, math.nan, "2", True, None), (0, 3)) for name in COUNTS),
        *((name, ("", None, 3, b"k"), ("k",)) for name in KEYS),
        *((name, (3, "mean"), (None, lambda contents, key: None)) for name in FUNCTIONS),
    ],
)
def test_fedavgs_arguments_are_checked(name: str, wrong: tuple[Any, ...], right: tuple[Any, ...]) -> None:
    for value in wrong:
        with pytest.raises(ValueError, match=f"^{name}: expected .*, found {re.escape(repr(value))}"):
            FedFroM(**{name: value})
    for value in right:
        assert value in (None, getattr(FedFroM(**{name: value}), name))


def test_all_of_fedavgs_arguments_are_checked() -> None:
    """Flower may get new ones: a range that nobody thought of would pass."""
    checked = {*FRACTIONS, *COUNTS, *KEYS, *FUNCTIONS}
    assert checked == set(inspect.signature(FedAvg.__init__).parameters) - {"self"}


def test_a_wrong_method_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected one of from, average.*'form'"):
        FedMerge("form")
    with pytest.raises(ValueError, match="k"):
        FedMerge("average", k=1.0)
    with pytest.raises(ValueError, match=r"\['k'\].*FroM"):
        FedMerge(FroM(), k=1.0)


@pytest.mark.parametrize("method", ["from", "factor-average"])
def test_initial_arrays_that_cannot_be_merged_end_the_run_by_name(method: str) -> None:
    """Half an adapter is the server app's mistake, not a client's: nothing is trained for nothing."""
    half, dora = mixed_state(), mixed_state()
    del half[f"{Q}.lora_B.weight"]
    dora[f"{Q}.lora_magnitude_vector"] = np.ones(10, np.float32)
    for state, found in ((half, r"base_model\.model\.q.*lora_B"), (dora, r"lora_magnitude_vector.*DoRA")):
        grid = InProcessGrid(noisy, 3)
        with pytest.raises(ValueError, match=found):
            FedMerge(method).start(grid, record_of(state), num_rounds=1)
        assert not grid.traffic


def test_the_model_scope_needs_the_scaling_where_adapters_stand_beside_tensors() -> None:
    grid = InProcessGrid(noisy, 3)
    with pytest.raises(ValueError, match=r"lora_config.*scope='model'"):
        FedFroM(scope="model").start(grid, record_of(mixed_state()), num_rounds=1)
    assert not grid.traffic


@pytest.mark.parametrize("key", ["w", "base_model.model.q.lora_B.weight"])
def test_opposed_updates_are_warned_of_in_spite_of_rounding(key: str, flower_log: pytest.LogCaptureFixture) -> None:
    def opposed(message: Message, context: Context) -> Message:
        reply = noisy(message, context)
        if message.metadata.message_type == "train":
            sent = arrays_of(message.content["arrays"])
            step = np.random.default_rng(5).normal(size=sent[key].shape).astype(np.float32)
            sign = 1 if context.node_config["partition-id"] else -1
            reply.content["arrays"] = record_of({**sent, key: sent[key] + sign * step})
        return reply

    start = mixed_state() | {"w": np.random.default_rng(4).normal(size=(7, 5)).astype(np.float32)}
    run(opposed, nodes=2, rounds=1, state=start, k=1.0)
    assert logged(flower_log, "lambda_max", "2.00", "lower k")


def test_buffers_count_in_no_figure_of_the_weights(flower_log: pytest.LogCaptureFixture) -> None:
    def client(message: Message, context: Context) -> Message:
        reply = noisy(message, context)
        if message.metadata.message_type == "train":
            sent = arrays_of(message.content["arrays"])
            partition = int(context.node_config["partition-id"])
            moved = {"w": sent["w"].copy(), "bn.running_mean": sent["bn.running_mean"] + 1 + partition}
            moved["w"][partition] += 1  # orthogonal updates: lambda_max = 1/2
            reply.content["arrays"] = record_of(moved)
        return reply

    state = {"w": np.zeros((2, 3)), "bn.running_mean": np.zeros(4)}
    metrics = run(client, nodes=2, rounds=1, state=state, k=1.0, examples_power=0.0).train_metrics_clientapp[1]
    assert metrics["lambda-max"] == pytest.approx(0.5) and metrics["weight-max"] == pytest.approx(0.5)
    assert not logged(flower_log, "lambda_max", "lower k")


def test_updates_that_swing_are_warned_of_once(flower_log: pytest.LogCaptureFixture) -> None:
    def opposed(message: Message, context: Context) -> Message:
        reply = noisy(message, context)
        if message.metadata.message_type == "train":
            sign = 1 if context.node_config["partition-id"] else -1
            sent = arrays_of(message.content["arrays"])
            moved = {key: value + np.asarray(sign * 0.1, value.dtype) for key, value in sent.items()}
            reply.content["arrays"] = record_of(moved)
        return reply

    run(opposed, nodes=2, rounds=2, state={"w": np.ones((3, 4))}, k=1.0)
    assert len(logged(flower_log, "lambda_max", "2.00", "lower k")) == 1  # once a run
    flower_log.clear()
    run(opposed, nodes=2, rounds=1, state={"count": np.array(3), "w": np.ones((3, 4))}, k=math.inf)
    assert logged(flower_log, "lambda_max", "inf", "lower k")
    flower_log.clear()
    run(faulty({0: raising}), nodes=2, rounds=1, k=1.0)  # a client alone can't swing
    run(opposed, nodes=2, rounds=1, state={"w": np.ones((3, 4))}, k=0.5)
    assert not logged(flower_log, "lambda_max", "lower k")


def test_k_is_chosen_each_round_by_the_validation_function() -> None:
    seen: list[set[str]] = []

    def validate(state: Mapping[str, torch.Tensor]) -> float:
        seen.append(set(state))
        # the smallest model is the best one, which is no k's by right
        return -float(sum(value.double().square().sum() for value in state.values()))

    tried = (0.0, 0.25, 0.5)
    found = run(k="auto", search={"k": tried}, validate=validate, rounds=2)
    assert len(seen) == 2 * len(tried) and all(keys == set(mixed_state()) for keys in seen)
    for server_round in (1, 2):
        metrics = found.train_metrics_clientapp[server_round]
        assert metrics["k"] in tried and metrics["validation-score"] < 0
    # each round is the one that the chosen k would have made
    fixed = run(k=float(found.train_metrics_clientapp[1]["k"]), rounds=1)
    again = run(k="auto", search={"k": tried}, validate=validate, rounds=1)
    assert same_bits(fixed.arrays, again.arrays)


def test_a_validation_without_any_score_skips_the_round(flower_log: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RuntimeError, match="validate: expected a number"):  # as no other round merges anything
        run(k="auto", validate=lambda state: math.nan, rounds=1)
    assert logged(flower_log, "round 1 is skipped")


@pytest.mark.parametrize("method", ["from", "greedy-soup"])
def test_a_validation_that_fails_skips_the_round_by_name(method: str, flower_log: pytest.LogCaptureFixture) -> None:
    """Only in some rounds: what a round could not score is not a reason to lose the others."""
    rounds: list[RoundReport] = []

    def validate(state: Mapping[str, torch.Tensor]) -> Any:
        if len(rounds) == 1:
            return None
        if len(rounds) == 2:
            raise FileNotFoundError("held-out.tsv")
        return 0.0

    options = {"k": "auto"} if method == "from" else {}
    strategy = FedMerge(method, validate=validate, on_round=rounds.append, **options)
    strategy.start(InProcessGrid(noisy, 3), record_of(mixed_state()), num_rounds=4)
    assert [report.merge is None for report in strategy.reports.values()] == [False, True, True, False]
    assert logged(flower_log, "validate: expected a score", "returned None")
    assert logged(flower_log, "validate: expected a score", "raised FileNotFoundError: held-out.tsv")


def test_a_safe_step_is_taken_where_clients_are_opposed(flower_log: pytest.LogCaptureFixture) -> None:
    def opposed(message: Message, context: Context) -> Message:
        reply = noisy(message, context)
        if message.metadata.message_type == "train":
            sign = 1 if context.node_config["partition-id"] else -1
            reply.content["arrays"] = record_of({"w": arrays_of(message.content["arrays"])["w"] + sign * 0.5})
        return reply

    found = run(opposed, nodes=2, rounds=1, state={"w": np.ones((3, 4))}, k=1.0, server_lr="safe")
    assert found.train_metrics_clientapp[1]["server-lr-min"] == pytest.approx(0.9)
    assert not logged(flower_log, "lambda_max", "lower k")


def test_an_update_too_large_is_clipped_and_counted() -> None:
    def loud(content: RecordDict) -> None:
        sent = mixed_state()
        arrays = arrays_of(content["arrays"])
        content["arrays"] = record_of({key: sent[key] + 1000 * (arrays[key] - sent[key]) for key in arrays})

    quiet = run(nodes=5, rounds=1, clip=None)
    clipped = run(faulty({0: loud}), nodes=5, rounds=1, clip=2.0)
    bare = run(faulty({0: loud}), nodes=5, rounds=1, clip=None)
    metrics = clipped.train_metrics_clientapp[1]
    assert metrics["updates-clipped"] > 0 and metrics["weight-max"] < 0.5
    assert bare.train_metrics_clientapp[1]["weight-max"] > 0.8
    start = mixed_state()
    moved = {name: far_apart(arrays_of(each.arrays), start) for name, each in (("quiet", quiet), ("clipped", clipped))}
    assert moved["clipped"] < 3 * moved["quiet"] < far_apart(arrays_of(bare.arrays), start)
