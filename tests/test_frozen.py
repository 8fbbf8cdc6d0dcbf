"""Frozen tensors: not sent back, kept to the bit, and nothing else is any different."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.serverapp.strategy import Result

from benchmarks import bytes as measured
from fedfrom import FedFroM, FedMerge, client, to_record
from fedfrom.wire.contents import STATISTICS_KEY
from fedfrom.wire.frozen import FROZEN_KEY, leave_out
from fedfrom.wire.records import to_state_dict
from tests.inprocess import InProcessGrid
from tests.models import (
    PREFIX,
    adapted,
    adapter,
    arrays_of,
    crossed,
    faulty,
    mixed_state,
    net,
    noisy,
    record_of,
    same_bits,
    train,
)

WORDS = "words.weight"
BOTH = {"target_modules": ["query", "words"]}
HEAD = f"{PREFIX}head.weight"


def full_client(trains_words: bool = False, **reply: Any) -> Callable[[Message, Context], Message]:
    """Return clients of a full model that use fedfrom.client and leave the embedding as it is."""

    def app(message: Message, context: Context) -> Message:
        i, server_round = int(context.node_config["partition-id"]), int(message.content["config"]["server-round"])
        model = net()
        client.load(model, message)
        model.words.weight.requires_grad_(trains_words)
        loss = train(model, i, server_round)
        return client.reply(model, message, {"num-examples": 10 * (i + 1), "loss": loss}, **reply)

    return app


def initial() -> ArrayRecord:
    """A full model's arrays, with the zeros in the embedding that a sum with 0 would turn."""
    state = net().state_dict()
    state[WORDS][0] = torch.tensor([-0.0, 0.0, 1e-42] * 6)
    return to_record(state)


def run(app: Any, start: ArrayRecord, rounds: int = 2, nodes: int = 3, **options: Any) -> tuple[Any, FedFroM, Result]:
    grid, strategy = InProcessGrid(app, nodes, record=True), FedFroM(fraction_evaluate=0.0, **options)
    return grid, strategy, strategy.start(grid, start, num_rounds=rounds)


def size(record: ArrayRecord, *keys: str) -> int:
    return sum(len(record[key].data) for key in keys or record)


@pytest.mark.parametrize(
    "options", [{}, {"scope": "model"}, {"memory_budget": 0}, {"select": "multikrum", "attackers": 1}], ids=str
)
def test_it_changes_the_bytes_and_nothing_else(options: dict[str, Any]) -> None:
    start = initial()
    ends, bytes_up = [], []
    for frozen in ((), {WORDS}):
        grid, strategy, result = run(full_client(), start, nodes=5, frozen=frozen, **options)
        assert not grid.errors and not any(report.failed for report in strategy.reports.values())
        for number, contents in enumerate(crossed(grid, "up"), 1):
            assert all((WORDS in content["arrays"]) != bool(frozen) for content in contents.values())
            assert strategy.reports[number].bytes_down == 5 * size(start)
            bytes_up.append(strategy.reports[number].bytes_up)
        assert result.arrays[WORDS].data == start[WORDS].data or not frozen
        assert list(result.arrays) == list(start)  # Flower's clipping mods compare the order too
        ends.append(ArrayRecord({key: array for key, array in result.arrays.items() if key != WORDS}))
    assert same_bits(*ends)
    assert bytes_up == [5 * size(start)] * 2 + [5 * (size(start) - size(start, WORDS))] * 2


def test_patterns_and_names_are_told_as_keys_in_train_messages_alone() -> None:
    for frozen in (WORDS, "w*s.*", ["words.w[e]ight", WORDS], {"*words*"}):
        grid, strategy = InProcessGrid(full_client(), 2, record=True), FedFroM(frozen=frozen)
        strategy.start(grid, initial(), num_rounds=1)
        assert all(c[FROZEN_KEY]["keys"] == [WORDS] for c in crossed(grid, "down")[0].values())
        assert all(FROZEN_KEY not in c for c in crossed(grid, "down", "evaluate")[0].values())
    grid, _, _ = run(full_client(), initial())
    assert all(FROZEN_KEY not in c for c in crossed(grid, "down")[0].values())


def test_what_other_clients_send_of_it_is_not_looked_at() -> None:
    """Plain Flower clients send everything: moved, NaN, of another shape or nothing that can be read."""

    def nan(content: RecordDict) -> None:
        content["arrays"] = record_of(arrays_of(content["arrays"]) | {HEAD: np.full((3, 10), np.nan, np.float32)})

    def misshapen(content: RecordDict) -> None:
        content["arrays"] = record_of(arrays_of(content["arrays"]) | {HEAD: np.ones(7)})

    def unreadable(content: RecordDict) -> None:
        content["arrays"][HEAD].data = b"cos\nsystem\n"

    def missing(content: RecordDict) -> None:
        del content["arrays"][HEAD]

    start, ends = record_of(mixed_state()), []
    for faults in ({}, {0: nan, 1: misshapen, 2: unreadable, 3: missing}):
        grid, strategy, result = run(faulty(faults), start, nodes=5, frozen=["*head*"])
        assert [report.valid for report in strategy.reports.values()] == [5, 5]
        assert result.arrays[HEAD].data == start[HEAD].data and not same_bits(result.arrays, start)
        assert [layer.name for layer in strategy.reports[1].merge.layers if "head" in layer.name] == []
        ends.append(result.arrays)
    assert same_bits(*ends)


def test_what_is_trained_has_to_be_there() -> None:
    def missing(content: RecordDict) -> None:
        for key in (HEAD, f"{PREFIX}norm.running_mean"):
            del content["arrays"][key]

    _, strategy, _ = run(faulty({1: missing}), record_of(mixed_state()), rounds=1, frozen=HEAD)
    (reason,) = strategy.reports[1].rejected.values()
    assert "1 missing" in reason and "running_mean" in reason


@pytest.mark.parametrize(
    ("frozen", "reason"),
    [
        (["*embeddings*"], r"frozen, '\*embeddings\*': expected a key .* such as .*lora_A.*found none"),
        ([HEAD, "head"], "frozen, 'head'.*found none"),
        (["*lora_A*"], r"frozen, 'base_model.model.q': expected all tensors of a LoRA module or none.*lora_A"),
        (["*lora_B*", "*head*"], r"frozen.*'base_model.model.q'.*lora_B.weight'\] alone"),
        (["*"], "frozen: expected tensors that clients train"),
    ],
)
@pytest.mark.parametrize("method", ["from", "factor-average"])
def test_what_can_not_be_right_ends_the_run_before_it_starts(frozen: list[str], reason: str, method: str) -> None:
    grid = InProcessGrid(noisy, 3)
    with pytest.raises(ValueError, match=reason):
        FedMerge(method, frozen=frozen).start(grid, record_of(mixed_state()), num_rounds=1)
    assert not grid.traffic


@pytest.mark.parametrize("frozen", [3, [1], [b"head"], None])
def test_what_is_no_collection_of_names_is_refused(frozen: Any) -> None:
    with pytest.raises(ValueError, match="frozen: expected a collection of key names or patterns"):
        FedFroM(frozen=frozen)


def test_a_client_that_trains_it_all_the_same_is_told() -> None:
    """Its work would be lost without a word."""
    reports: list[Any] = []
    with pytest.raises(RuntimeError, match=f"3 replies, errors alone.*{WORDS}.*frozen="):
        run(full_client(trains_words=True), initial(), rounds=1, frozen=WORDS, on_round=reports.append)
    assert len(reports[0].failed) == 3 and reports[0].merge is None
    assert all(WORDS in reason and "frozen=" in reason for reason in reports[0].failed.values())


def test_a_model_in_a_narrower_dtype_has_not_trained_it() -> None:
    def app(message: Message, context: Context) -> Message:
        model = net().to(torch.bfloat16)
        client.load(model, message)
        reply = client.reply(model, message, {"num-examples": 1})
        assert WORDS not in reply.content["arrays"]
        reply.content["arrays"] = to_record({k: v.float() for k, v in to_state_dict(reply.content["arrays"]).items()})
        return reply

    start = to_record({key: value.float() for key, value in net().state_dict().items()})
    grid, strategy, result = run(app, start, rounds=1, frozen=WORDS)
    assert not grid.errors and strategy.reports[1].valid == 3 and result.arrays[WORDS].data == start[WORDS].data


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_deltas_and_bfloat16(dtype: torch.dtype) -> None:
    start = initial()
    start = ArrayRecord({**start, **to_record({WORDS: to_state_dict(start)[WORDS].to(dtype)})})
    grid, strategy, result = run(full_client(as_delta=True), start, frozen=WORDS)
    assert not grid.errors and strategy.reports[2].valid == 3
    assert result.arrays[WORDS].data == start[WORDS].data
    head = result.arrays["head.weight"].numpy()
    assert not np.array_equal(head, start["head.weight"].numpy())


# --- Adapters --------------------------------------------------------------------------------------------------------


def test_a_whole_module_can_be_frozen_among_clients_of_unequal_ranks() -> None:
    """Its factors go down, cut to the client's rank, and none comes back."""
    of = f"{PREFIX}words.lora_embedding_"
    own = [{"r": 8}, {"r": 4, "rank_pattern": {"words": 2}}, {"r": 12, "rank_pattern": {"query": 3}}]

    def app(message: Message, context: Context) -> Message:
        i = int(context.node_config["partition-id"])
        model = adapted(seed=i, lora_alpha=9, **own[i], **BOTH)
        client.load(model, message)
        for name, parameter in model.named_parameters():
            if "lora_embedding" in name:
                parameter.requires_grad_(False)
        train(model, i, int(message.content["config"]["server-round"]))
        return client.reply(model, message, {"num-examples": 1})

    server = adapted(r=8, lora_alpha=16, **BOTH)
    start = arrays_of(adapter(server))
    start[f"{of}A"] = np.random.default_rng(0).normal(size=start[f"{of}A"].shape).astype(np.float32)
    start = record_of(start)
    grid, strategy, result = run(
        app, start, rounds=3, frozen="*words*", lora_config=server.peft_config["default"], scope="model"
    )
    assert not grid.errors and [report.valid for report in strategy.reports.values()] == [3, 3, 3]
    for contents in crossed(grid, "up"):
        assert not any(key.startswith(of) for content in contents.values() for key in content["arrays"])
    assert [crossed(grid, "down")[2][i]["arrays"][f"{of}A"].numpy().shape[0] for i in range(3)] == [8, 2, 8]
    assert all(result.arrays[key].data == start[key].data for key in start if key.startswith(of))
    assert not same_bits(result.arrays, start)


# --- Methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["from", "greedy-soup"])
def test_what_is_scored_is_the_whole_model(method: str) -> None:
    seen, start = [], initial()

    def validate(state: Any) -> float:
        seen.append(set(state))
        assert state[WORDS].numpy().tobytes() == start[WORDS].numpy().tobytes()
        return float(state["head.weight"].sum())

    options = {"k": "auto", "search": {"k": (0.0, 1.0)}} if method == "from" else {}
    strategy = FedMerge(method, validate=validate, frozen=WORDS, fraction_evaluate=0.0, **options)
    grid = InProcessGrid(full_client(), 3)
    strategy.start(grid, start, num_rounds=1)
    assert not grid.errors and strategy.reports[1].merge is not None
    assert seen and all(keys == set(start) for keys in seen)


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_statistics_of_it_are_left_out_too(method: str) -> None:
    def app(message: Message, context: Context) -> Message:
        model = net()
        client.load(model, message)
        tokens = torch.randint(0, 24, (6, 5), generator=torch.Generator().manual_seed(1))
        if method == "regmean":
            found = client.gram(model, [tokens])
        else:
            found = client.fisher(model, [tokens], lambda model, batch: model(batch).square().sum())
        assert {name.removesuffix(".weight") for name in found} >= {"query", "head"}
        return client.reply(model, message, {"num-examples": 1}, statistics=found)

    strategy = FedMerge(method, frozen=["query.*", "norm.num*"], fraction_evaluate=0.0)
    grid = InProcessGrid(app, 3, record=True)
    strategy.start(grid, initial(), num_rounds=1)
    assert not grid.errors and strategy.reports[1].valid == 3 and strategy.reports[1].merge is not None
    sent = crossed(grid, "up")[0][0]["fedfrom.statistics"]
    assert sent and not any("query" in name for name in sent)


# --- What is measured in docs/performance.md -------------------------------------------------------------------------


def test_statistics_of_it_that_other_clients_send_are_not_looked_at() -> None:
    def telling(message: Message, context: Context) -> Message:
        reply = noisy(message, context)
        if message.metadata.message_type == "train":
            fisher = {key: np.ones_like(array) for key, array in arrays_of(reply.content["arrays"]).items()}
            reply.content[STATISTICS_KEY] = record_of(fisher)
        return reply

    start = record_of({"a.weight": np.ones((3, 4), np.float32), "b.weight": np.ones((2, 3), np.float32)})
    strategy = FedMerge("fisher", frozen=["b.*"])
    result = strategy.start(InProcessGrid(telling, 3), start, num_rounds=1)
    assert strategy.reports[1].valid == 3 and not strategy.reports[1].rejected
    assert same_bits(ArrayRecord({"b.weight": result.arrays["b.weight"]}), ArrayRecord({"b.weight": start["b.weight"]}))


def test_nan_in_it_is_not_training() -> None:
    sent = {"mask": torch.tensor([float("nan"), 0.0, 1.0]), "head": torch.ones(2)}
    assert list(leave_out(sent, {"mask"}, {key: value.clone() for key, value in sent.items()})) == ["head"]
    with pytest.raises(ValueError, match="mask"):
        leave_out({**sent, "mask": torch.tensor([float("nan"), 0.0, float("nan")])}, {"mask"}, sent)


def test_the_bytes_that_are_saved() -> None:
    """Of each kind: what is sent less of is less by its own bytes, from the round on that the docs say."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 30}
    alike, unequal, *full = [rounds for _, rounds in measured.table({**sizes, "vocab_size": 50})]
    assert unequal[0][0] == alike[0][0] == alike[0][1]
    saved = (2 * 4 * (24 + 24)) * (12 + 8)  # of two modules' factors in float32; ranks 4 and 8 where 16 is the largest
    for down, up in unequal[1:]:
        assert down == up == alike[0][0] - saved
    words = 3 * (4 * 50 * 24 + 128)
    assert full[1] == [(down, up - words) for down, up in full[0]]
    assert full[2][0][0] == full[0][0][0] and full[2][0][1] < full[1][0][1] / 2


# --- Checkpoints and the rest ----------------------------------------------------------------------------------------


def test_a_resumed_run_keeps_it_and_another_setting_is_refused(tmp_path: Path) -> None:
    start, frozen = record_of(mixed_state()), {HEAD, "*running*", "*lora_*"}
    _, _, expected = run(noisy, start, rounds=3, frozen=frozen)
    run(noisy, start, rounds=2, frozen=frozen, checkpoint=tmp_path)
    _, _, result = run(noisy, start, rounds=3, frozen=list(frozen)[::-1], checkpoint=tmp_path)
    assert same_bits(result.arrays, expected.arrays)
    with pytest.raises(ValueError, match="frozen"):
        run(noisy, start, rounds=4, checkpoint=tmp_path)


def test_a_skipped_round_leaves_everything(flower_log: pytest.LogCaptureFixture) -> None:
    flower_log.set_level(logging.ERROR)

    def empty_later(message: Message, context: Context) -> Message:
        reply = noisy(message, context)
        if message.metadata.message_type == "train" and message.content["config"]["server-round"] == 2:
            reply.content["arrays"] = ArrayRecord()
        return reply

    start = record_of(mixed_state())
    _, _, before = run(noisy, start, rounds=1, frozen=HEAD)
    _, strategy, result = run(empty_later, start, rounds=2, frozen=HEAD)
    assert strategy.reports[2].merge is None and same_bits(result.arrays, before.arrays)
