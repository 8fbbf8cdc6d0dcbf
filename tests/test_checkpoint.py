"""Checkpoints: what they bring back, what they refuse, and that no kill, fault or full disk spoils them."""

import hashlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp.strategy import Result

from fedfrom import Average, FedFroM, FedMerge, FroM, checkpoint
from fedfrom.checkpoint import ARRAYS, FORMAT, STATE, SUMS, Checkpoint, Checkpoints, random_states, set_random_states
from tests import killed
from tests.conftest import ROOT
from tests.inprocess import InProcessGrid
from tests.models import arrays_of, mixed_state, noisy, record_of, same_bits
from tests.simulated import NAP

ROUNDS = 3


class Stopped(Exception):
    """Ends a run before its time, in this process."""


def errors(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.levelno >= logging.ERROR]


def start(folder: Path | None, rounds: int = ROUNDS, state: dict | None = None, **options: Any) -> Result:
    arrays = record_of(mixed_state() if state is None else state)
    return FedFroM(checkpoint=folder, **options).start(InProcessGrid(noisy, 3), arrays, num_rounds=rounds)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("round-*/*")}


# --- What is brought back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instant", range(1 + 3 * ROUNDS))
def test_a_run_that_is_stopped_ends_as_if_it_had_not_been(instant: int, tmp_path: Path) -> None:
    """Arrays to the bit, the metrics and reports of all rounds, whatever was drawn since; nothing is scored twice."""
    expected = killed.outcome(*killed.run(None, ROUNDS))
    left, scored = instant, []

    def tick() -> None:
        nonlocal left
        left -= 1
        if left == -1:
            raise Stopped

    class Stopping(InProcessGrid):
        def push_messages(self, messages: Any) -> Any:
            tick()
            return super().push_messages(messages)

    def scoring(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        tick()
        scored.append(server_round)
        return killed.evaluated(server_round, arrays)

    with pytest.raises(Stopped):
        killed.run(tmp_path, ROUNDS, scoring, Stopping)
    assert killed.outcome(*killed.run(tmp_path, ROUNDS, scoring, Stopping)) == expected
    assert scored == list(range(ROUNDS + 1))


def test_checkpoints_change_nothing(tmp_path: Path) -> None:
    assert killed.outcome(*killed.run(tmp_path, ROUNDS)) == killed.outcome(*killed.run(None, ROUNDS))


def test_a_finished_run_is_returned_at_once_and_can_be_made_longer(tmp_path: Path) -> None:
    def refuse(*_: Any) -> MetricRecord:
        raise AssertionError("a whole round was scored again")

    class Closed(InProcessGrid):
        def push_messages(self, messages: Any) -> Any:
            raise AssertionError("a whole round was trained again")

    first = killed.outcome(*killed.run(tmp_path, 2))
    before = contents(tmp_path)
    assert killed.outcome(*killed.run(tmp_path, 2, refuse, Closed)) == first
    assert contents(tmp_path) == before
    assert killed.outcome(*killed.run(tmp_path, 4)) == killed.outcome(*killed.run(None, 4))
    with pytest.raises(ValueError, match=r"num_rounds: expected 4 or more.*found 3"):
        killed.run(tmp_path, 3)


def test_a_finished_run_says_that_nothing_is_left_to_do(tmp_path: Path, flower_log: pytest.LogCaptureFixture) -> None:
    def said(words: str) -> list[str]:
        return [record.getMessage() for record in flower_log.records if words in record.getMessage()]

    start(tmp_path, rounds=2)
    start(tmp_path, rounds=3)
    assert not said("Nothing is left") and len(said("Going on after round 2")) == 1
    flower_log.clear()
    start(tmp_path, rounds=3)
    (line,) = said("Nothing is left to do")
    assert str(tmp_path) in line and "all 3 rounds" in line and "num_rounds" in line and "another folder" in line
    assert not said("Going on")


def not_used(log: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings that initial arrays are not used, and forget them."""
    found = [r.getMessage() for r in log.records if r.levelname == "WARNING" and "initial arrays" in r.getMessage()]
    log.clear()
    return found


def test_other_initial_arrays_are_warned_of(tmp_path: Path, flower_log: pytest.LogCaptureFixture) -> None:
    """Compared with those that the run started from, over any number of resumes, and in a finished run too."""
    state = mixed_state()
    head, q = "base_model.model.head.weight", "base_model.model.q.lora_A.weight"
    columns = state | {head: np.asfortranarray(state[head])}  # the same numbers, stored in another order
    first = start(tmp_path, rounds=1, state=state)
    for rounds in (2, 3):
        start(tmp_path, rounds, state=columns)
        assert not not_used(flower_log)
        start(tmp_path, rounds, state=state | {head: state[head] + 1})
        (line,) = not_used(flower_log)
        assert f"in 1 of 5 keys, such as {head!r}: they are not used" in line and f"round-{rounds:04d}" in line
    start(tmp_path, 4, state=state | {key: state[key] + 1 for key in (head, q)})
    (line,) = not_used(flower_log)
    assert f"in 2 of 5 keys, such as {q!r}, {head!r}: " in line
    start(tmp_path, 4, state=state)  # what did not count in round 4 is not what the run started from, then or later
    assert not not_used(flower_log)
    start(tmp_path, 4, state=arrays_of(first.arrays))  # the global arrays of a round are not what it started from
    (line,) = not_used(flower_log)
    found = start(tmp_path, 4, state=mixed_state(seed=1))
    (line,) = not_used(flower_log)
    assert "in 4 of 5 keys" in line and line.count("base_model.model") == 2
    assert same_bits(found.arrays, start(None, 4, state=state).arrays)


def test_reports_come_back_whole(tmp_path: Path) -> None:
    """Those of rounds with rejected and failed replies too, and of skipped rounds: equal, and of the same types."""

    def client(message: Message, context: Context) -> Message:
        partition, server_round = context.node_config["partition-id"], message.content["config"]["server-round"]
        if server_round == 2 or (server_round, partition) == (1, 0):
            raise RuntimeError("out of memory")
        reply = noisy(message, context)
        if (server_round, partition) == (1, 1) and message.metadata.message_type == "train":
            reply.content["arrays"] = ArrayRecord()
        return reply

    strategies = [FedFroM(checkpoint=tmp_path, lora_config={"r": 4, "lora_alpha": 4}) for _ in range(2)]
    for strategy in strategies:
        strategy.start(InProcessGrid(client, 3), record_of(mixed_state()), num_rounds=3)
    first, second = (strategy.reports for strategy in strategies)
    assert first[1].rejected and first[1].failed and first[2].merge is None and first[3].merge is not None
    assert first == second


def test_the_swing_is_warned_of_once_over_a_resume(tmp_path: Path, flower_log: pytest.LogCaptureFixture) -> None:
    def opposed(message: Message, context: Context) -> Message:
        reply = noisy(message, context)
        if message.metadata.message_type == "train":
            sign = 1 if context.node_config["partition-id"] else -1
            moved = {key: value + sign for key, value in arrays_of(message.content["arrays"]).items()}
            reply.content["arrays"] = record_of(moved)
        return reply

    for rounds in (1, 2):
        strategy = FedFroM(k=1.0, checkpoint=tmp_path)
        strategy.start(InProcessGrid(opposed, 2), record_of({"w": np.ones((3, 4))}), num_rounds=rounds)
    assert sum("lambda_max" in record.getMessage() for record in flower_log.records) == 1
    assert any("Going on after round 1" in record.getMessage() for record in flower_log.records)


ARRAYS_OF_ALL_KINDS = {
    "z.last.by.name": np.arange(6, dtype=np.float16).reshape(2, 3),
    "float64": np.array([[1e-310, -0.0], [np.inf, np.pi]]),
    "NaN with a payload": np.array([0x7FC00123, 0xFF800001], np.uint32).view(np.float32),
    "number": np.array(3.5, np.float32),
    "count": np.array(7),
    "none": np.zeros((0, 3), np.float32),
    "flags": np.array([True, False, True]),
    "bytes": np.array([[0, 255]], np.uint8),
    "large": np.array([2**64 - 1], np.uint64),
    "small": np.array([-5], np.int8),
    "columns first": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "ключ\n\t'\"": np.ones(2),
    "": np.ones(1),
}


def saved(folder: Path, arrays: ArrayRecord, **more: Any) -> Result:
    """Return what comes back of a result that was saved."""
    with Checkpoints(folder, 1, {}) as checkpoints:
        checkpoints.save(Checkpoint(0, Result(arrays=arrays, **more), {}, random_states()))
        found = checkpoints.newest()
    assert found is not None
    return found.result


@pytest.mark.parametrize("state", [ARRAYS_OF_ALL_KINDS, {}], ids=["all kinds", "empty"])
def test_arrays_come_back_to_the_bit(state: dict, tmp_path: Path) -> None:
    record = record_of(state)
    found = saved(tmp_path, record).arrays
    assert list(found) == list(record)
    assert same_bits(found, record)
    assert [array.shape for array in found.values()] == [array.shape for array in record.values()]


def test_metrics_come_back_as_they_were(tmp_path: Path) -> None:
    values = {"int": 2**70, "float": 0.1, "one": 1.0, "inf": np.inf, "ints": [1, -2], "floats": [0.5, 1e-320], "no": []}
    rounds = {0: MetricRecord(values), 12: MetricRecord(), 3: MetricRecord({"np": np.float64(0.1)})}
    found = saved(tmp_path, ArrayRecord(), evaluate_metrics_serverapp=rounds).evaluate_metrics_serverapp
    assert found == rounds and list(found) == list(rounds)
    assert [type(value) for value in found[0].values()] == [type(value) for value in values.values()]


def test_random_states_come_back(seed: int) -> None:
    def draws() -> tuple:
        return random.gauss(), random.random(), np.random.normal(), np.random.random(), float(torch.randn(1))  # noqa: NPY002

    draws()  # half of a pair of normals is kept for the next draw: part of the state
    states = json.loads(json.dumps(random_states()))
    expected = draws()
    assert draws() != expected
    set_random_states(states)
    assert draws() == expected


def test_cuda_generators_come_back_where_there_are_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Acted out: the machines that test this have no GPU."""
    devices = [torch.arange(16, dtype=torch.uint8), torch.ones(16, dtype=torch.uint8)]
    taken: list[list[torch.Tensor]] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", taken.append)
    states = random_states()
    for count in (2, 1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        set_random_states(states)
    assert len(taken) == 1 and all(torch.equal(*pair) for pair in zip(taken[0], devices, strict=True))


# --- What is kept, and in what order it is written -------------------------------------------------------------------


@pytest.mark.parametrize("kept", [1, 2, 10])
def test_the_newest_are_kept(kept: int, tmp_path: Path) -> None:
    start(tmp_path, checkpoints_kept=kept)
    assert names(tmp_path) == [".lock", *[f"round-{number:04d}" for number in range(ROUNDS + 1)][-kept:]]
    for folder in tmp_path.glob("round-*"):
        assert names(folder) == sorted([ARRAYS, STATE, SUMS])


def test_the_files_are_what_they_say(tmp_path: Path) -> None:
    """Others can read them: safetensors with the state's keys, JSON, and sums that sha256sum takes."""
    from safetensors.torch import load_file

    result = start(tmp_path)
    folder = tmp_path / "round-0003"
    state = load_file(folder / ARRAYS)
    assert state.keys() == result.arrays.keys()
    assert all(np.array_equal(state[key].numpy(), array.numpy()) for key, array in result.arrays.items())
    assert json.loads((folder / STATE).read_text())["round"] == 3
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=folder, check=True, capture_output=True)


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss of power can't be tested; that files, then names, are flushed around the rename can."""
    done: list[str] = []
    flush, rename = os.fsync, os.rename

    def flushed(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        flush(descriptor)

    def renamed(old: Path, new: Path) -> None:
        done.append(f"{old.name} -> {new.name}")
        rename(old, new)

    start(tmp_path, rounds=1)
    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "rename", renamed)
    start(tmp_path, rounds=2)
    hidden = ".round-0002.partial"
    at = done.index(f"{hidden} -> round-0002")
    assert set(done[at - 4 : at]) == {ARRAYS, STATE, SUMS, hidden} and done[at - 1] == hidden
    assert done[at + 1 :] == [tmp_path.name, "round-0000 -> .round-0000.removed"]


def test_what_a_killed_run_left_is_swept_away(tmp_path: Path) -> None:
    start(tmp_path, rounds=1)
    for name in (".round-0002.partial", ".round-0000.removed"):
        shutil.copytree(tmp_path / "round-0001", tmp_path / name)
    (tmp_path / ".nfs0001").write_text("not ours")
    start(tmp_path, rounds=1)
    assert names(tmp_path) == [".lock", ".nfs0001", "round-0000", "round-0001"]


# --- What is refused -------------------------------------------------------------------------------------------------

CONFIG = {"r": 4, "lora_alpha": 4}
OTHER_SETTINGS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"k": 1.0}, r"method\.k = 1\.0 where the checkpoint has 0\.5"),
    ({"k": float("inf")}, {}, r"method\.k = 0\.5 where the checkpoint has inf"),
    ({}, {"rank": 2}, r"method\.rank = 2 where the checkpoint has None"),
    ({}, {"solver": "alternating"}, r"method\.solver = 'alternating'"),
    ({}, {"server_lr": 0.5}, r"server_lr = 0\.5 where the checkpoint has 1\.0"),
    ({}, {"seed": 1}, r"seed = 1 where the checkpoint has 0"),
    ({}, {"fraction_train": 0.5}, r"fraction_train = 0\.5 where the checkpoint has 1\.0"),
    ({}, {"min_available_nodes": 3}, r"min_available_nodes = 3 where"),
    ({}, {"lora_config": CONFIG}, r"lora_config\.r = 4 where the checkpoint has nothing"),
    ({"lora_config": CONFIG | {"lora_alpha": 8}}, {"lora_config": CONFIG}, r"lora_config\.lora_alpha = 4 where.*has 8"),
]


@pytest.mark.parametrize(("there", "here", "found"), OTHER_SETTINGS, ids=[str(case[:2]) for case in OTHER_SETTINGS])
def test_other_settings_are_refused_by_name(there: dict, here: dict, found: str, tmp_path: Path) -> None:
    start(tmp_path, rounds=1, **there)
    before = contents(tmp_path)
    grid = InProcessGrid(noisy, 3)
    with pytest.raises(ValueError, match=f"round-0001.*{found}"):
        FedFroM(checkpoint=tmp_path, **here).start(grid, record_of(mixed_state()), num_rounds=2)
    assert not grid.traffic and contents(tmp_path) == before
    start(tmp_path, rounds=2, **there)


def test_another_method_is_refused_and_the_same_by_object_is_not(tmp_path: Path) -> None:
    def once(method: Any, rounds: int) -> None:
        strategy = FedMerge(method, checkpoint=tmp_path)
        strategy.start(InProcessGrid(noisy, 3), record_of(mixed_state()), num_rounds=rounds)

    once("from", 1)
    once(FroM(), 2)
    with pytest.raises(ValueError, match=r"method = 'Average' where the checkpoint has 'FroM'; method\.k"):
        once(Average(), 3)


def test_what_is_searched_counts_as_a_setting_as_a_list_and_as_an_array_alike(tmp_path: Path) -> None:
    def once(values: Any, rounds: int) -> None:
        start(tmp_path, rounds, k="auto", search={"k": values}, validate=lambda state: 0.0)

    once([0.0, 1.0], 1)
    once(np.array([0.0, 1.0]), 2)
    with pytest.raises(ValueError, match=r"search\.k = \[0\.0, 2\.0\] where the checkpoint has \[0\.0, 1\.0\]"):
        once(np.array([0.0, 2.0]), 3)


def test_a_config_by_another_version_of_peft_is_the_same(tmp_path: Path) -> None:
    for rounds, version in ((1, "0.20"), (2, "0.21")):
        start(tmp_path, rounds, lora_config=CONFIG | {"peft_version": version})


def test_other_arrays_and_configs_are_refused_by_name(tmp_path: Path) -> None:
    """Other numbers in them are none: the checkpoint's count."""

    def once(rounds: int, state: dict, train: Any, evaluate: Any) -> None:
        FedFroM(checkpoint=tmp_path).start(
            InProcessGrid(noisy, 3),
            record_of(state),
            num_rounds=rounds,
            train_config=train if isinstance(train, ConfigRecord) else ConfigRecord(train),
            evaluate_config=ConfigRecord(evaluate),
        )

    # the same record again, which by then says what round it was
    configs: dict[str, Any] = {"train": ConfigRecord({"lr": 0.1, "key": b"\xff"}), "evaluate": {}}
    once(1, mixed_state(), **configs)
    once(2, mixed_state(seed=1), **configs)
    key = "base_model.model.head.weight"
    for state, found in [
        (mixed_state() | {key: np.ones((4, 10), np.float32)}, rf"{key} = 'float32 \(4, 10\)' where.*\(3, 10\)"),
        (mixed_state() | {key: np.ones((3, 10))}, rf"{key} = 'float64 \(3, 10\)' where the checkpoint has 'float32"),
        ({k: value for k, value in mixed_state().items() if k != key}, rf"{key} = nothing where"),
        (mixed_state() | {"more": np.ones(1)}, r"more = 'float64 \(1,\)' where the checkpoint has nothing"),
    ]:
        with pytest.raises(ValueError, match=found):
            once(3, state, **configs)
    for change, found in [({"lr": 0.2}, r"lr = 0\.2 where.*0\.1"), ({"key": b"\xfe"}, r"key = .*xfe.*xff")]:
        with pytest.raises(ValueError, match=rf"train_config\.{found}"):
            once(3, mixed_state(), train={**configs["train"], **change}, evaluate={})
    with pytest.raises(ValueError, match=r"evaluate_config\.full = True"):
        once(3, mixed_state(), train=configs["train"], evaluate={"full": True})
    with pytest.raises(ValueError, match=r"; and 3 more; give"):
        once(3, {"other": np.ones(1)}, **configs)


def test_a_subclass_has_settings_and_a_state_of_its_own(tmp_path: Path) -> None:
    """What its constructor keeps counts; functions, which can't be compared, don't."""

    class Stepping(FedFroM):
        def __init__(self, step: float, score: Callable[[], float], **others: Any) -> None:
            super().__init__(**others)
            self.step, self.score, self.steps = step, score, 0

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            self.steps += 1
            return super().aggregate_train(server_round, replies)

        def state(self) -> dict[str, Any]:
            return super().state() | {"steps": self.steps}

        def restore(self, state: Any) -> None:
            super().restore(state)
            self.steps = state["steps"]

    scores = [lambda: 1.0, lambda: 2.0]

    def once(rounds: int, step: float) -> Stepping:
        strategy = Stepping(step, scores[rounds > 1], checkpoint=tmp_path)
        strategy.start(InProcessGrid(noisy, 3), record_of(mixed_state()), num_rounds=rounds)
        return strategy

    once(1, 0.1)
    assert once(3, 0.1).steps == 3
    with pytest.raises(ValueError, match=r"step = 0\.2 where the checkpoint has 0\.1"):
        once(3, 0.2)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def halved(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", [ARRAYS, STATE, SUMS])
@pytest.mark.parametrize("damage", [flipped, halved, emptied, Path.unlink])
def test_a_damaged_checkpoint_is_refused_and_the_whole_one_named(
    name: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    expected = start(None)
    start(tmp_path, rounds=2, checkpoints_kept=3)
    damage(tmp_path / "round-0002" / name)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"round-0002, .*{name}.*round-0001 is whole.*delete round-0002"):
        start(tmp_path)
    assert contents(tmp_path) == before
    damage(tmp_path / "round-0001" / name)
    with pytest.raises(ValueError, match="round-0000 is whole: to go on from it, delete round-0001, round-0002"):
        start(tmp_path)
    damage(tmp_path / "round-0000" / name)
    with pytest.raises(ValueError, match="no older checkpoint is whole"):
        start(tmp_path)
    shutil.rmtree(tmp_path / "round-0002")
    shutil.rmtree(tmp_path / "round-0001")
    shutil.rmtree(tmp_path / "round-0000")
    assert same_bits(start(tmp_path).arrays, expected.arrays)


def test_the_whole_one_goes_on(tmp_path: Path) -> None:
    expected = killed.outcome(*killed.run(None, ROUNDS))
    killed.run(tmp_path, 2)
    flipped(tmp_path / "round-0002" / ARRAYS)
    with pytest.raises(ValueError, match="delete round-0002"):
        killed.run(tmp_path, ROUNDS)
    shutil.rmtree(tmp_path / "round-0002")
    assert killed.outcome(*killed.run(tmp_path, ROUNDS)) == expected


def test_a_renamed_checkpoint_and_another_format_are_refused(tmp_path: Path) -> None:
    start(tmp_path, rounds=1)
    os.rename(tmp_path / "round-0001", tmp_path / "round-0007")
    with pytest.raises(ValueError, match=r"round-0007, state\.json: expected the round of the folder's name, found 1"):
        start(tmp_path, rounds=9)
    os.rename(tmp_path / "round-0007", tmp_path / "round-0001")
    state = tmp_path / "round-0001" / STATE
    old = digest(state)
    state.write_text(json.dumps(json.loads(state.read_text()) | {"format": FORMAT + 1}))
    sums = tmp_path / "round-0001" / SUMS
    sums.write_text(sums.read_text().replace(old, digest(state)))
    with pytest.raises(ValueError, match=f"expected format {FORMAT}, found {FORMAT + 1}"):
        start(tmp_path)


@pytest.mark.parametrize("name", ["thesis.tex", "round-0001", "round-1/", "round-00001/", "round-x/", "src/"])
def test_a_folder_with_anything_else_is_refused(name: str, tmp_path: Path) -> None:
    strange = tmp_path / name
    strange.mkdir() if name.endswith("/") else strange.write_text("mine")
    with pytest.raises(ValueError, match=f"expected an empty folder.*found {name.strip('/')}"):
        start(tmp_path)
    assert names(tmp_path) == [strange.name]


@pytest.mark.parametrize("kept", [0, -1, 1.5, "2"])
def test_a_number_to_keep_is_checked(kept: Any) -> None:
    with pytest.raises(ValueError, match=r"checkpoints_kept: expected a whole number >= 1"):
        FedFroM(checkpoints_kept=kept)


UNHOLDABLE = {
    "complex128": record_of({"w": np.ones(2, np.complex128)}),
    ">f4": record_of({"w": np.ones(2, ">f4")}),
    "<M8": record_of({"w": np.array(["2025-01-01"], "<M8[D]")}),
    "Unsupported": ArrayRecord({"w": Array("bfloat16", (1,), "torch.tensor", b"\0\0")}),
    "key": record_of({"__metadata__": np.ones(2)}),
    "UTF-8": record_of({"\ud800": np.ones(2)}),
}


@pytest.mark.parametrize("found", UNHOLDABLE)
def test_what_safetensors_cannot_hold_is_refused_before_training(found: str, tmp_path: Path) -> None:
    grid = InProcessGrid(noisy, 3)
    with pytest.raises(ValueError, match=rf"checkpoint, '.+': expected .*{found}"):
        FedFroM(checkpoint=tmp_path).start(grid, UNHOLDABLE[found], num_rounds=1)
    assert not grid.traffic and names(tmp_path) == [".lock"]


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    def evaluated(server_round: int, arrays: ArrayRecord) -> None:
        with pytest.raises(ValueError, match=rf"no other run uses, found it in use by process {os.getpid()} on "):
            start(tmp_path)

    strategy = FedFroM(checkpoint=tmp_path)
    strategy.start(InProcessGrid(noisy, 3), record_of(mixed_state()), num_rounds=1, evaluate_fn=evaluated)
    assert len(start(tmp_path).train_metrics_clientapp) == ROUNDS  # it is free again


def test_a_refused_run_lets_go_of_the_folder(tmp_path: Path) -> None:
    start(tmp_path, rounds=1)
    (tmp_path / ".round-0002.partial").touch()  # a file, which can't be swept away as a folder
    with pytest.raises(OSError, match="expected a folder") as first:
        start(tmp_path)
    (tmp_path / ".round-0002.partial").unlink()
    with pytest.raises(ValueError, match="server_lr") as second:  # not: in use
        start(tmp_path, server_lr=0.5)
    start(tmp_path)
    del first, second  # whose tracebacks could have kept the lock open


def test_other_versions_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flower_log: pytest.LogCaptureFixture
) -> None:
    start(tmp_path, rounds=1)
    start(tmp_path, rounds=1)
    assert not any("last bits" in record.getMessage() for record in flower_log.records)
    monkeypatch.setitem(checkpoint._VERSIONS, "torch", "9.9")
    start(tmp_path, rounds=1)
    assert any(f"by torch {torch.__version__}: the last bits" in record.getMessage() for record in flower_log.records)


# --- What the disk refuses -------------------------------------------------------------------------------------------


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Let the kernel fail every write that makes a file larger: as a full disk does, in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


LARGE = {"w": np.ones((100, 200), np.float32)}  # 80 kB: the arrays' file is the largest by far


def test_no_room_ends_the_run_before_training(tmp_path: Path) -> None:
    for size, file in ((20_000, "arrays"), (200, "state")):
        grid = InProcessGrid(noisy, 3)
        state = LARGE if file == "arrays" else {"w": np.ones(1, np.float32)}
        with files_up_to(size), pytest.raises(OSError, match=r"expected a folder with room.*File too large") as error:
            FedFroM(checkpoint=tmp_path).start(grid, record_of(state), num_rounds=1)
        assert str(tmp_path) in str(error.value)
        assert not grid.traffic and names(tmp_path) == [".lock"]


def test_no_room_on_a_resume_ends_the_run_before_training(tmp_path: Path) -> None:
    start(tmp_path, rounds=1, state=LARGE)
    before = contents(tmp_path)
    grid = InProcessGrid(noisy, 3)
    with files_up_to(20_000), pytest.raises(OSError, match="expected a folder with room"):
        FedFroM(checkpoint=tmp_path).start(grid, record_of(LARGE), num_rounds=2)
    assert not grid.traffic and contents(tmp_path) == before
    with files_up_to(20_000):
        start(tmp_path, rounds=1, state=LARGE)  # nothing to write


def test_no_room_in_mid_run_costs_checkpoints_but_no_training(
    tmp_path: Path, flower_log: pytest.LogCaptureFixture
) -> None:
    """The one before stays, and the next that fits is written."""
    expected = start(None, rounds=4, state=LARGE)
    seen = {}
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)

    def evaluated(server_round: int, arrays: ArrayRecord) -> None:
        seen[server_round] = contents(tmp_path)
        size = 20_000 if server_round in (2, 3) else previous[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, previous[1]))

    strategy = FedFroM(checkpoint=tmp_path)
    try:
        result = strategy.start(InProcessGrid(noisy, 3), record_of(LARGE), num_rounds=4, evaluate_fn=evaluated)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
    assert same_bits(result.arrays, expected.arrays)
    assert seen[2] == seen[3] == seen[4] != seen[1]
    assert names(tmp_path) == [".lock", "round-0001", "round-0004"]
    assert [message.split(":")[0] for message in errors(flower_log)] == [f"checkpoint of round {n}" for n in (2, 3)]
    assert same_bits(start(tmp_path, rounds=4, state=LARGE).arrays, expected.arrays)


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Lay down the rights of root, whom no file system refuses anything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_folder_is_refused_before_training() -> None:
    parent = Path(tempfile.mkdtemp(prefix="fedfrom-"))  # pytest's own folders can't even be entered by others
    try:
        for path, mode in ((parent, 0o555), (parent / "made", 0o555)):
            path.mkdir(exist_ok=True)
            path.chmod(mode)
            for folder in (path, path / "new"):
                grid = InProcessGrid(noisy, 3)
                with ordinary_user(), pytest.raises(PermissionError, match="the right to write to it"):
                    FedFroM(checkpoint=folder).start(grid, record_of(mixed_state()), num_rounds=1)
                assert not grid.traffic
    finally:
        shutil.rmtree(parent)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="expected a folder"):
            start(path)


# --- Killed ----------------------------------------------------------------------------------------------------------


def killed_runs(folder: Path, *options: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.killed", str(folder), *options]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.mark.parametrize("instants", [3, pytest.param(24, marks=pytest.mark.slow)])
def test_killed_at_a_random_instant_a_run_ends_with_the_same_bits(instants: int, tmp_path: Path) -> None:
    runs = killed_runs(tmp_path, "--instants", str(instants))
    assert len(runs) == instants and all(run["same"] for run in runs), runs
    if instants > 20:  # what they hit is chance, but not that they hit many things
        assert len({run["left"][-1] for run in runs if run["left"]}) >= 3, runs


@pytest.mark.slow
def test_killed_before_any_step_on_the_disk_a_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Every instant that matters: before each open, mkdir, rename and removal of two rounds."""
    runs = killed_runs(tmp_path, "--rounds", "2", "--every", "1")
    assert all(run["same"] for run in runs), runs
    left = {name for run in runs for name in run["left"]}
    assert {".round-0002.partial", ".round-0001.removed", "round-0002"} <= left


@pytest.mark.slow
@pytest.mark.simulation
def test_killed_twice_in_a_real_simulation_a_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    """The server's process is killed, with Ray's driver in it; the next starts while Ray's agents still linger."""
    rounds, draw = 6, random.Random(0)
    strategy = FedFroM()  # on the in-process Grid: the clients are the same functions
    grid, arrays = InProcessGrid(noisy, 2), record_of(mixed_state())
    result = strategy.start(grid, arrays, num_rounds=rounds, evaluate_fn=killed.score)
    expected = killed.outcome(strategy, result)
    folder, out = tmp_path / "run", tmp_path / "out.json"
    ray = tempfile.mkdtemp(prefix="ray-")  # the names of Ray's sockets must be short
    command = [sys.executable, "-m", "tests.simulated", str(folder), str(out), str(rounds), ray]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # for Ray's workers
    started: list[subprocess.Popen] = []

    def run() -> subprocess.Popen:
        with open(tmp_path / f"log-{len(started)}", "w") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        started.append(process)
        return process

    try:
        for whole in (1, 3):
            process, since = run(), time.monotonic()
            while not any(path.name >= f"round-{whole:04d}" for path in folder.glob("round-*")):
                assert process.poll() is None, (tmp_path / f"log-{len(started) - 1}").read_text()
                assert time.monotonic() - since < 400
                time.sleep(0.02)
            time.sleep(draw.uniform(0, 2 * NAP))  # of the next round, for which two clients nap one after the other
            process.kill()
            assert process.wait() == -signal.SIGKILL and not out.exists()
        process = run()
        assert process.wait(400) == 0, (tmp_path / "log-2").read_text()
        assert json.loads(out.read_text()) == expected
        said = (tmp_path / "log-2").read_text()
        assert "Going on after round" in said and "[ROUND 3/6]" not in said
    finally:
        for process in started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # Ray's agents, which would linger a minute
            process.wait()
        shutil.rmtree(ray, ignore_errors=True)
