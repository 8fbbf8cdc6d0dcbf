"""Checkpoints that are refused: of other settings, damaged, or in a folder that is in use or not theirs."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord

from fedfrom import Average, FedFroM, FedMerge, FroM, checkpoint
from fedfrom.checkpoint import ARRAYS, FORMAT, STATE, SUMS
from tests import killed
from tests.checkpoints import ROUNDS, contents, names, start
from tests.inprocess import InProcessGrid
from tests.models import mixed_state, noisy, record_of, same_bits

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
    with pytest.raises(ValueError, match=r"method = 'Average' where the checkpoint has 'FroM'; method\."):
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
