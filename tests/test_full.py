"""The benchmark of full models: what it merges, whom it merges against, and what it leaves out."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.adapters.figures import Panel, draw, slope
from benchmarks.full import growth
from benchmarks.full.__main__ import Bounds
from benchmarks.full.contenders import FEDAVG, LINEAR
from benchmarks.full.measure import timed
from benchmarks.full.models import BF16, MODELS, States, bytes_of, numel, shapes

SMALL = "8x2x16"


@pytest.mark.parametrize("model", MODELS)
def test_models_are_of_their_names_size(model: str) -> None:
    assert numel(model) == pytest.approx(1e6 * int(model.removesuffix("M")), rel=0.05)


def test_more_layers_are_more_tensors_of_as_many_parameters() -> None:
    models = [f"{width}x{layers}x0" for layers, width in growth.LAYERS.items()]
    assert [numel(model) for model in models] == pytest.approx([numel(models[0])] * len(models), rel=0.02)
    assert [len(shapes(model)) for model in models] == [1 + 14 * layers for layers in growth.LAYERS]


def test_clients_have_the_same_state_in_every_process_and_none_has_another_ones() -> None:
    first, second = States(SMALL), States(SMALL)
    for client in range(3):
        state = first.of(client)
        assert all(torch.equal(state[key], tensor) for key, tensor in second.of(client).items())
        assert not any(torch.equal(state[key], tensor) for key, tensor in first.of(client + 3).items())
        assert not any(torch.equal(state[key], tensor) for key, tensor in first.reference.items())


def test_bfloat16_is_half_the_bytes_of_the_same_numbers() -> None:
    whole, half = States(SMALL), States(SMALL + BF16)
    assert bytes_of(SMALL + BF16) == numel(SMALL) * 2 == bytes_of(SMALL) / 2
    for key, tensor in half.of(1).items():
        assert tensor.dtype == half.reference[key].dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), whole.of(1)[key], rtol=0.02, atol=0.02)


MERGEKIT = """
def merge_state_dicts(states, method, parameters):
    weights = {weights}
    return {{key: sum(w * state[key] for w, state in zip(weights, states)) / sum(weights) for key in states[0]}}
"""


def stand_in(folder: Path, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a package of mergekit's name and call whose linear merge takes these weights."""
    (folder / "mergekit").mkdir()
    (folder / "mergekit" / "__init__.py").write_text("")
    (folder / "mergekit" / "merge_methods.py").write_text(MERGEKIT.format(weights=weights))
    (folder / "mergekit-9.9.dist-info").mkdir()
    (folder / "mergekit-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mergekit\nVersion: 9.9\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_mergekit_takes_its_turns_in_another_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task_identity: None
) -> None:
    stand_in(tmp_path, 'parameters["weight"]', monkeypatch)
    found = timed(SMALL, 3, 2, [FEDAVG], sys.executable)
    assert found["versions"].startswith("mergekit 9.9, torch 2") and found[LINEAR] > 0 and found[FEDAVG] > 0


def test_another_merge_than_fedavgs_is_not_timed_against_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task_identity: None
) -> None:
    stand_in(tmp_path, "[1.0, 0.0, 0.0]", monkeypatch)
    with pytest.raises(RuntimeError, match="merged something else"):
        timed(SMALL, 3, 1, [FEDAVG], sys.executable)


def test_what_memory_and_disk_do_not_hold_is_left_out_and_said(tmp_path: Path) -> None:
    bounds = Bounds(largest=1.0, spool=str(tmp_path), copies=2)
    assert bounds.in_memory("22M", 4) and not bounds.skipped  # 0.7 GiB, twice what is sent
    assert not bounds.in_memory("22M", 16) and not bounds.on_disk("350M", 64)
    assert not bounds.in_memory(SMALL + BF16, 2) and "no bfloat16" in bounds.skipped.pop()
    first, second = bounds.skipped
    assert first.startswith("22M x 16 in memory: 1.3 GiB of replies, 2.7 needed, 1.0 GiB are the limit")
    assert second.startswith("350M x 64 spooled")


def test_slopes_are_of_power_laws_and_the_picture_has_a_column_a_panel(tmp_path: Path) -> None:
    curve = [(n, 0.1 * n**0.5, 3.0 * n**2) for n in (1, 2, 4, 8)]
    assert slope(curve, 1) == pytest.approx(0.5) and slope(curve, 2) == pytest.approx(2)
    panel = Panel("by clients", "clients", {"FedFroM": curve}, fitted_from=4)
    assert panel.fitted(curve) == curve[2:]
    growth.write([panel, panel], tmp_path, "about")
    lines = (tmp_path / "full-growth.csv").read_text().splitlines()
    assert lines[0] == "sweep,contender,value,median s,extra MiB" and "slope,0.5,2" in lines[5]
    draw([panel], tmp_path / "one.png")
    width = [int.from_bytes((tmp_path / name).read_bytes()[16:20], "big") for name in ("one.png", "full-growth.png")]
    assert width[1] == 2 * width[0]
