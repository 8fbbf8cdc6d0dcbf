"""Every fault of one client: named by `merge`, rejected alone in a round, refused by the command line."""

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedfrom import FedFroM, merge, to_record, to_state_dict
from fedfrom.wire.adapter_configs import ADAPTER_KEY
from tests import folders
from tests.faults import CONFIGS, FAULTS, FULL, Fault, State, full_state
from tests.inprocess import InProcessGrid
from tests.models import faulty, noisy, same_bits

STATES: dict[str, tuple[Mapping[str, Fault], Callable[[int], State]]] = {
    "adapter": (FAULTS, folders.adapter_state),
    "full": (FULL, full_state),
}
CONFIG = {"r": 4, "lora_alpha": 8, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}

cases = pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in STATES for name in STATES[kind][0]])
configs = pytest.mark.parametrize("name", CONFIGS)
strategies = pytest.mark.parametrize("lora_config", [None, CONFIG], ids=["plain", "lora_config"])


def assert_names(message: str, who: str, fault: Fault) -> None:
    for word in (who, "expected", "found", *fault.words):
        assert word in message, f"{word!r} is not in: {message}"
    assert fault.found in message.partition("found ")[2], f"{fault.found!r} is not found in: {message}"


# --- Where they are merged -------------------------------------------------------------------------------------------


def refused_by_merge(fault: Fault, *arguments: Any, **options: Any) -> None:
    with pytest.raises(ValueError) as caught:
        merge(*arguments, **options)
    assert type(caught.value) is ValueError and str(caught.value).isprintable()
    assert_names(str(caught.value), "client 1", fault)


@cache
def without_it(kind: str, has_config: bool) -> ArrayRecord:
    """Return what a round comes to where the client at fault never answers."""
    strategy, silent = FedFroM(lora_config=CONFIG if has_config else None), InProcessGrid(noisy, 3, silent=[1])
    return strategy.start(silent, to_record(STATES[kind][1](5)), num_rounds=1).arrays


def rejected_alone(fault: Fault, spoil: Callable[[RecordDict], None], kind: str, lora_config: Any) -> str:
    """Return the reason that the round gives for it."""
    grid, strategy = InProcessGrid(faulty({1: spoil}), 3), FedFroM(lora_config=lora_config)
    result = strategy.start(grid, to_record(STATES[kind][1](5)), num_rounds=1)
    report = strategy.reports[1]
    node = next(node for node, partition in grid.partition_of.items() if partition == 1)
    assert not grid.errors and list(report.rejected) == [node]
    assert report.reasons == {fault.kind: 1}
    assert_names(f"node {node}: {report.rejected[node]}", f"node {node}", fault)
    assert same_bits(result.arrays, without_it(kind, lora_config is not None))
    return report.rejected[node]


def refused_by_the_commands(fault: Fault, capsys: Any, root: Path, *arguments: str) -> None:
    before = sorted(root.rglob("*"))
    for command in (["merge", str(root / "out")], ["inspect"]):
        line = folders.refused(capsys, *command, *arguments)
        assert_names(line, "client-1", fault)
        assert len(line) < 700 + 4 * len(str(root))
    assert sorted(root.rglob("*")) == before


# --- States ----------------------------------------------------------------------------------------------------------


@cases
def test_merge_names_it(kind: str, name: str) -> None:
    faults, state_of = STATES[kind]
    states = [state_of(i) for i in range(3)]
    faults[name].spoil(states[1])
    for reference in (None, state_of(5)):
        refused_by_merge(faults[name], states, reference)


@strategies
@cases
def test_a_round_rejects_it_alone(kind: str, name: str, lora_config: Any) -> None:
    faults, _ = STATES[kind]

    def spoil(content: RecordDict) -> None:
        state = to_state_dict(content["arrays"])
        faults[name].spoil(state)
        content["arrays"] = to_record(state)

    rejected_alone(faults[name], spoil, kind, lora_config)


@cases
def test_the_command_line_refuses_it(kind: str, name: str, tmp_path: Path, capsys: Any) -> None:
    faults, state_of = STATES[kind]
    states = [state_of(i) for i in range(3)]
    faults[name].spoil(states[1])
    states[1] = {key: value.contiguous() for key, value in states[1].items()}
    paths = [tmp_path / f"client-{i}" for i in range(3)]
    if kind == "adapter":
        inputs = [folders.write_adapter(*own, folders.adapter_config()) for own in zip(paths, states, strict=True)]
    else:
        inputs = [folders.write_checkpoint(*own) for own in zip(paths, states, strict=True)]
        inputs += ["--base", folders.write_checkpoint(tmp_path / "base", state_of(5))]
    refused_by_the_commands(faults[name], capsys, tmp_path, *inputs)


# --- Adapter configs -------------------------------------------------------------------------------------------------


def spoiled(fault: Fault, **more: Any) -> dict[str, Any]:
    config = {**CONFIG, **more}
    fault.spoil(config)
    return config


@configs
def test_merge_names_a_config(name: str) -> None:
    states = [folders.adapter_state(i) for i in range(3)]
    refused_by_merge(CONFIGS[name], states, configs=[CONFIG, spoiled(CONFIGS[name]), CONFIG])


@strategies
@configs
def test_a_round_rejects_a_config_alone(name: str, lora_config: Any) -> None:
    config = spoiled(CONFIGS[name])
    fields = {key: json.dumps(value) if key.endswith("_pattern") else value for key, value in config.items()}

    def spoil(content: RecordDict) -> None:
        content[ADAPTER_KEY] = ConfigRecord(fields)

    assert ADAPTER_KEY in rejected_alone(CONFIGS[name], spoil, "adapter", lora_config)


@configs
def test_the_command_line_refuses_a_config(name: str, tmp_path: Path, capsys: Any) -> None:
    sound = folders.adapter_config()
    own = [sound, spoiled(CONFIGS[name], **sound), sound]
    paths = [tmp_path / f"client-{i}" for i in range(3)]
    inputs = [folders.write_adapter(path, folders.adapter_state(i), own[i]) for i, path in enumerate(paths)]
    refused_by_the_commands(CONFIGS[name], capsys, tmp_path, *inputs)
