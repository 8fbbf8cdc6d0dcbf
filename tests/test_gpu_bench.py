"""The benchmark of a GPU in tiny: each part as a rehearsal on the CPU, what a machine lacks, and what is counted."""

import csv
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import adapters, full, needs, run
from benchmarks.gpu.__main__ import LIMITS, lacking, main
from benchmarks.gpu.adapters import Adapters
from benchmarks.gpu.full import Model
from benchmarks.gpu.timing import WAITS, Device, Limits, count, count_waits
from fedfrom import methods
from tests.conftest import ROOT
from tests.pretended import DEVICE, Gpu

TINY = run.Sizes(True, Adapters("a tiny model", {(24, 16): 2, (8, 16): 1}, 1, 4, (2, 3)), Model(32, 48, 8, 1, 100))
# In a process of its own, since this one has datasets: none of the three is imported.
BLOCKED = """
import sys
for name in ("datasets", "flwr_datasets", "ray"):
    sys.modules[name] = None
from benchmarks.gpu import federated, run
from benchmarks.gpu.__main__ import main
run.sizes = lambda quick: run.Sizes(quick, federated=federated.Federation(2, 1, 2, 16, 1, 12, 4, clients=2, rank=2))
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rehearsal hides the GPUs from its process."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "sizes", lambda quick: TINY)


@pytest.fixture
def glue_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "glue"
    for task, header in {"SST-2": "sentence\tlabel", "QNLI": "index\tquestion\tsentence\tlabel"}.items():
        (folder / task).mkdir(parents=True)
        for part in ("train", "dev"):
            pairs = [f"{i}\twho {i}?\tit was {i}\t{'not_' * (i % 2)}entailment" for i in range(12)]
            lines = [f"good or bad {i}\t{i % 2}" for i in range(12)] if task == "SST-2" else pairs
            (folder / task / f"{part}.tsv").write_text("\n".join([header, *lines]) + "\n")
    return folder


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def rehearse(*arguments: str) -> int:
    return main(["--device", "cpu", "--quick", *arguments])


def test_adapters(tiny: None, tmp_path: Path) -> None:
    assert rehearse("--only", "adapters", "--out", str(tmp_path)) == 0
    found = rows(tmp_path, "adapters")
    assert found[0]["method"] == "PEFT svd" and float(found[0]["device s"]) > 0
    assert [row["method"] for row in found[1:]] == 2 * adapters.measured_methods()
    assert {row["clients"] for row in found} == {"2", "3"}
    for row in found[1:]:
        assert float(row["difference"]) == 0 and float(row["device s"]) > 0 and row["waits, module"] == ""
    text = (tmp_path / "adapters.md").read_text()
    assert "This is a rehearsal" in text and "torch 2" in text
    named = set(adapters.measured_methods()) | {"regmean", "fisher", "lorm", "greedy-soup", "soup", "knots-ta"}
    assert named == set(methods()) and all(name in text for name in named)


def test_full_models(tiny: None, tmp_path: Path) -> None:
    assert rehearse("--only", "full", "--out", str(tmp_path)) == 0
    found = rows(tmp_path, "full")
    assert [row["method"] for row in found] == ["from", "average", "ties"]
    assert all(float(row["difference"]) <= 1e-2 and row["scaled shapes"] == "0" for row in found)


def test_the_shapes_are_those_of_the_models_named() -> None:
    assert 1.2e9 < full.LLAMA.parameters < 1.3e9
    assert sum(adapters.LLAMA.modules.values()) == 7 * adapters.LLAMA.blocks


def test_federated_without_ray_and_datasets(glue_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", BLOCKED, "--device", "cpu", "--quick", "--only", "federated"]
    command += ["--glue-dir", str(glue_folder), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / "out", "federated")
    assert [row["task"] for row in found] == ["sst2", "qnli"]
    assert all(float(row["rounds a minute"]) > 0 and 0 < float(row["training share"]) <= 1 for row in found)


def test_a_model_that_can_not_be_read_is_one_line(
    glue_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tmp_path)  # a folder without a model
    assert rehearse("--only", "federated", "--glue-dir", str(glue_folder), "--model", model) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"--model {model}: can't load its") and said.count("\n") == 1


def test_a_rehearsal_writes_nothing_by_default(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert rehearse("--only", "full") == 0
    assert list(tmp_path.iterdir()) == [] and "rehearsal" in capsys.readouterr().out


def test_without_a_gpu_it_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--only", "adapters", "full"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("No GPU: torch ") and said.err.count("\n") == 1
    assert "--device cpu" in said.err and list(tmp_path.iterdir()) == []


def test_each_missing_package_has_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("peft", "flwr"):
        monkeypatch.setitem(sys.modules, name, None)
    said = lacking(needs.PARTS, "cpu", "", "minilm")
    assert said == [
        "The package peft is not installed, which adapters and federated need: pip install -c constraints.txt peft.",
        "The package flwr is not installed, which federated needs: pip install -c constraints.txt flwr.",
    ]
    assert lacking(["full"], "cpu", "", "minilm") == []


def test_no_glue_folder_no_file_and_no_model_have_a_sentence_each(
    glue_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lacking(["federated"], "cpu", str(glue_folder), "minilm") == []
    (none,) = lacking(["federated"], "cpu", "", "minilm")
    assert none.startswith("No GLUE folder: give --glue-dir or FEDFROM_GLUE_DIR")
    (glue_folder / "QNLI" / "dev.tsv").unlink()
    monkeypatch.setattr("simulations.assets.MODEL_PACKAGE", ("no-such-package", "1"))
    monkeypatch.setattr("simulations.assets.model_folder", lambda: _no_model())
    some, model = lacking(["federated"], "cpu", str(glue_folder), "minilm")
    assert some.startswith(f"The GLUE folder {glue_folder} lacks QNLI/dev.tsv: give")
    assert model.startswith("The model minilm is missing: package") and model.endswith("name another with --model.")


def _no_model() -> None:
    from simulations import assets

    assets.locate(assets.MODEL_PACKAGE, assets.MODEL_FILE)


def test_the_parts_time_is_seven_minutes_as_the_documentation_says() -> None:
    assert 420 <= sum(total for total, *_ in LIMITS.values()) <= 435


def test_what_would_take_too_long_is_scaled_by_its_work() -> None:
    ran: list[str] = []

    def run_of(kind: str) -> Callable[[], str]:
        return lambda: kind

    def seconds_of(run: Callable[[], Any]) -> float:
        run()
        ran.append("run")
        return 2.0

    found = count([("large", 3, 40.0), ("small", 5, 1.0), ("middling", 1, 3.0)], run_of, seconds_of, longest=10.0)
    assert found.results == {"small": "small", "middling": "middling"} and len(ran) == 2
    assert found.scaled == 1 and found.seconds == pytest.approx(5 * 2 + 1 * 2 + 3 * 2 * 40 / 3)


def test_waits_are_counted_and_the_mode_is_put_back() -> None:
    modes: list[str] = []

    def work() -> None:
        for _ in range(3):
            warnings.warn(WAITS, stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert count_waits(work, modes.append) == 3 and modes == ["warn", "default"]
    assert Device("cpu").waits(work) is None


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """A GPU that is none, whose waits torch warns of."""
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(gpu, "warns", mode == "warn"))
    monkeypatch.setattr(Device, "describe", lambda device: "Device: a pretended GPU.")
    monkeypatch.setattr(Device, "generator", lambda device, seed: torch.Generator().manual_seed(seed))
    monkeypatch.setattr(adapters, "_add_peft", lambda *given: None)  # a module's parameters can't be pretended
    with gpu:
        yield gpu


def test_a_gpu_has_waits_and_memory(pretended: Gpu, tmp_path: Path) -> None:
    device, limits = Device("cuda"), Limits(60, 5, 0, 1)
    assert torch.ones(1, device=device.name).device == DEVICE
    adapters.measure(TINY.adapters, device, limits, tmp_path, "Somewhere.")
    full.measure(TINY.full, device, limits, tmp_path, "Somewhere.")
    for row in rows(tmp_path, "adapters"):
        assert int(row["waits, module"]) > 0 and float(row["peak MiB"]) == 2 and float(row["difference"]) < 1e-6
    for row in rows(tmp_path, "full"):
        assert int(row["waits, matrix"]) > 0 and int(row["waits, norms"]) > 0 and float(row["difference"]) < 1e-2


def test_what_has_no_time_is_named(tmp_path: Path) -> None:
    full.measure(TINY.full, Device("cpu"), Limits(-1, 5, 0, 1), tmp_path, "Somewhere.")
    assert "Left out, as the part's time was spent: from, average, ties." in (tmp_path / "full.md").read_text()
