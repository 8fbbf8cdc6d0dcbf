"""Checkpoints: what they bring back, what is kept, and in what order it is written."""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.serverapp.strategy import Result

from fedfrom import FedFroM
from fedfrom.checkpoint import ARRAYS, STATE, SUMS, Checkpoint, Checkpoints
from fedfrom.random_states import random_states, set_random_states
from tests import killed
from tests.checkpoints import ROUNDS, Stopped, contents, names, start
from tests.inprocess import InProcessGrid
from tests.models import arrays_of, mixed_state, noisy, record_of, same_bits

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
