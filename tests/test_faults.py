"""Every fault of one client's adapter: named by `merge`, rejected alone in a round, refused by the command line."""

from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord, RecordDict

from fedfrom import FedFroM, merge
from tests import folders
from tests.faults import FAULTS
from tests.inprocess import InProcessGrid
from tests.models import faulty, noisy, same_bits

cases = pytest.mark.parametrize("name", FAULTS)


def names(message: str, who: str, name: str) -> None:
    for word in (who, "expected", "found", *FAULTS[name].words):
        assert word in message, f"{word!r} is not in: {message}"


@cases
def test_merge_names_it(name: str) -> None:
    states = [folders.adapter_state(i) for i in range(3)]
    FAULTS[name].spoil(states[1])
    with pytest.raises(ValueError) as caught:
        merge(states)
    names(str(caught.value), "client 1", name)
    with pytest.raises(ValueError) as caught:
        merge(states, folders.adapter_state(5))
    names(str(caught.value), "client 1", name)


@cases
def test_a_round_rejects_it_alone(name: str) -> None:
    def spoil(content: RecordDict) -> None:
        state = content["arrays"].to_torch_state_dict()
        FAULTS[name].spoil(state)
        content["arrays"] = ArrayRecord(state)

    sent = ArrayRecord(folders.adapter_state(5))
    grid, strategy = InProcessGrid(faulty({1: spoil}), 3), FedFroM()
    result = strategy.start(grid, sent, num_rounds=1)
    report = strategy.reports[1]
    node = next(node for node, partition in grid.partition_of.items() if partition == 1)
    assert not grid.errors and list(report.rejected) == [node]
    assert report.reasons == {FAULTS[name].kind: 1}
    names(f"node {node}: {report.rejected[node]}", f"node {node}", name)
    without = FedFroM().start(InProcessGrid(noisy, 3, silent=[1]), sent, num_rounds=1)
    assert same_bits(result.arrays, without.arrays)


@cases
@pytest.mark.parametrize("command", ["merge", "inspect"])
def test_the_command_line_refuses_it(name: str, command: str, tmp_path: Path, capsys: Any) -> None:
    inputs = folders.adapters(tmp_path, n=3)
    state = folders.load(inputs[1])
    FAULTS[name].spoil(state)
    folders.rewrite(inputs[1], state)
    before = sorted(tmp_path.rglob("*"))
    line = folders.refused(capsys, command, *([str(tmp_path / "out")] if command == "merge" else []), *inputs)
    names(line, "adapter-1", name)
    assert sorted(tmp_path.rglob("*")) == before
