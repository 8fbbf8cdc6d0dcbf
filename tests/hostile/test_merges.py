"""Hostile states, configs and files: each is refused with a reason, or merged rightly."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from safetensors import SafetensorError

from fedfrom import merge, methods
from tests.hostile.given import FILE_STATE, assert_refused_or_merged, refused, tensors
from tests.hostile.oracle import dense
from tests.hostile.states import Lazy, odd_configs, odd_files, odd_states
from tests.hostile.values import (
    CONFIG,
    cases,
    mixed_state,
    moved,
    numbers,
    texts,
)
from tests.hostile.watch import harmless
from tests.merging.test_memory import LargestResult

pytestmark = pytest.mark.timeout(6 * 3600)  # thousands of cases, on a machine that has other work
NAMES = [name for name in methods() if name not in ("regmean", "lorm", "fisher", "greedy-soup")]


@st.composite
def merges(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the arguments of a merge, some of them hostile."""
    n, dtype = draw(st.integers(1, 3)), draw(st.sampled_from([np.float32, np.float32, np.float64, np.float16]))
    state = mixed_state(dtype=dtype)
    states: list[Any] = [tensors(moved(state, i)) for i in range(n)]
    arguments: dict[str, Any] = {"states": states, "method": draw(st.sampled_from(["from", "from", "from", *NAMES]))}
    if draw(st.booleans()):
        arguments["reference"] = tensors(state)
    if draw(st.booleans()):
        arguments["configs"] = [dict(CONFIG) for _ in range(n)]
        if "reference" in arguments:
            arguments["reference_config"] = dict(CONFIG)
    if draw(st.booleans()):
        arguments["examples"] = [10 * (i + 1) for i in range(n)]
    i = draw(st.integers(0, n - 1))
    for _ in range(draw(st.integers(1, 2))):
        kind = draw(st.sampled_from(["state", "state", "reference", "config", "config", "examples", "option"]))
        if kind == "state":
            states[i] = draw(odd_states(tensors(moved(state, i))))
        elif kind == "reference" and "reference" in arguments:
            arguments["reference"] = draw(odd_states(tensors(state)))
        elif kind == "config":
            configs = arguments.setdefault("configs", [dict(CONFIG) for _ in range(n)])
            configs[i] = draw(odd_configs)
        elif kind == "examples":
            arguments["examples"] = [draw(st.one_of(numbers, texts, st.none())) for _ in range(n)]
        elif kind == "option":
            name = draw(st.sampled_from(["rank", "server_lr", "clip", "as_reference", "received", "names"]))
            ranges = {"as_reference": st.booleans(), "names": st.just(["ann"] * n), "received": st.just([{}] * n)}
            arguments[name] = draw(ranges.get(name, st.one_of(numbers, texts)))
    return arguments


@cases(150)
@given(arguments=merges())
def test_states_and_configs_are_merged_or_refused(arguments: dict[str, Any]) -> None:
    with harmless():
        assert_refused_or_merged(arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@cases(120)
@given(data=odd_files(FILE_STATE), lazily=st.booleans(), reference=st.booleans())
def test_files_are_merged_or_refused(folder: Path, data: bytes, lazily: bool, reference: bool) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(data)
    with harmless(str(path)):
        try:
            state = Lazy(path) if lazily else safetensors.torch.load_file(path)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            assert isinstance(error, SafetensorError), repr(error)
            event("refused by safetensors")
            return
        arguments = {"states": [FILE_STATE, state], "method": "from"}
        if reference:
            arguments["reference"] = FILE_STATE
        assert_refused_or_merged(arguments)


@pytest.mark.parametrize(
    "value", [None, 3, "w", np.ones(2), torch.ones(2, dtype=torch.complex64), torch.ones(2).to_sparse()]
)
def test_values_that_are_no_tensors_of_real_numbers(value: Any) -> None:
    refused("client 1, 'w'", "expected a", states=[{"w": torch.ones(2)}, {"w": value}])
    refused("reference, 'w'", "expected a", states=[{"w": torch.ones(2)}], reference={"w": value})


def test_states_that_can_not_be_read() -> None:
    class Broken(dict):
        def __getitem__(self, key: str) -> Any:
            raise OSError("the disk\nis gone")

    refused("client 1, 'w'", "readable", "OSError", states=[{"w": torch.ones(2)}, Broken(w=None)])
    refused("reference", "list", states=[{"w": torch.ones(2)}], reference=[1])
    refused("client 1", "text", states=[{"w": torch.ones(2)}, {3: torch.ones(2)}])
    refused("client 1", "characters", states=[{"w": torch.ones(2)}, {".lora_a" * 10**5 + "\nx": torch.ones(2)}])
    for bad in (10**400, "3", None):
        refused("client 1", "examples", states=[{"w": torch.ones(2)}] * 2, examples=[1, bad])


def test_factors_are_never_taken_for_tensors() -> None:
    """A name that PEFT does not give is refused, or read all the same: A and B are not averaged one by one."""
    A, B = torch.randn(2, 3), torch.randn(4, 2)
    for prefix in ("", "."):
        refused("client 0", "lora_A", states=[{f"{prefix}lora_A.weight": A, f"{prefix}lora_B.weight": B}])
    _, report = merge([{"a\nb.lora_A.weight": A, "a\nb.lora_B.weight": B}] * 2)
    assert [layer.kind for layer in report.layers] == ["adapter"]


def test_factors_wider_than_their_matrix_take_no_more_than_their_own_memory() -> None:
    rank = 5000
    states = [{"l.lora_A.weight": torch.randn(rank, 5), "l.lora_B.weight": torch.randn(4, rank)} for _ in range(3)]
    with LargestResult() as largest:
        merged, report = merge(states[:2], states[2], rank=4)
    assert largest.numel <= 3 * rank * 5
    expected = dense({key: value.numpy() for key, value in states[2].items()}, lambda module: 1.0)["l"]
    deltas = [
        dense({key: value.numpy() for key, value in state.items()}, lambda module: 1.0)["l"] - expected
        for state in states[:2]
    ]
    norms = [float(np.linalg.norm(delta)) for delta in deltas]
    assert report.layers[0].norms == pytest.approx(norms, rel=1e-9)
    assert report.layers[0].cosines[0][1] == pytest.approx(float((deltas[0] * deltas[1]).sum()) / math.prod(norms))
    assert merged["l.lora_A.weight"].shape == (4, 5)
    same, report = merge([states[2], states[2]], states[2], rank=4)
    assert report.layers[0].norms == [0.0, 0.0]  # who changes nothing has no norm


def test_updates_whose_squares_leave_every_range() -> None:
    W = {"w": torch.full((3,), 1.0, dtype=torch.float64)}
    states = [{"w": torch.tensor([s, 2 * s, -s], dtype=torch.float64)} for s in (1e200, 3e200)]
    _, report = merge(states, W)
    assert report.interference == pytest.approx(report.layers[0].interference)
    assert report.cosines()[0][1] == pytest.approx(1.0)
    refused("server_lr", states=states, reference=W, server_lr=1e200)
