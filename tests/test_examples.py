"""The examples: each runs as it stands, in this process, and learns."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from flwr.app import Context, RecordDict

from tests.conftest import ROOT
from tests.folders import config_of, done, load, same_bits
from tests.inprocess import InProcessGrid


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "clients", "learns"), [("lora_classifier", 4, 0.2), ("causal_lm", 3, -1.0)])
def test_an_example_learns(name: str, clients: int, learns: float, capsys: pytest.CaptureFixture[str]) -> None:
    module = example(name)
    grid = InProcessGrid(module.client_app, clients)
    module.server_app(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={}))
    assert not grid.errors
    printed = re.findall(r"^round \d+: \w+ ([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    first, last = float(printed[0]), float(printed[-1])
    assert len(printed) == 6 and (last - first) * (1 if learns > 0 else -1) > abs(learns), printed


def test_tensorboard_has_what_the_rounds_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    module = example("tensorboard_rounds")
    config = {"logdir": str(tmp_path)}
    grid = InProcessGrid(module.client_app, 4)
    module.server_app(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config))
    events = EventAccumulator(str(tmp_path)).Reload()
    accuracy = events.Scalars("server/accuracy")
    assert [event.step for event in accuracy] == [1, 2, 3] and accuracy[-1].value > accuracy[0].value
    weights = [name for name in events.Tags()["scalars"] if name.startswith("weights/")]
    modules = {name.rpartition("/")[0] for name in weights}
    assert len(weights) == 4 * len(modules)
    for name in modules:
        assert sum(events.Scalars(each)[0].value for each in weights if each.startswith(f"{name}/")) == pytest.approx(1)


@pytest.mark.slow
def test_merged_task_adapters_do_every_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = example("task_adapters")
    found = module.main(tmp_path)
    for task in range(module.TASKS):
        assert found[f"task-{task}"][task] > 0.9
    worst_of_one = max(min(found[f"task-{task}"]) for task in range(module.TASKS))
    for method in ("average", "from", "task-arithmetic"):
        assert min(found[method]) > 0.8 > worst_of_one, "the merged adapter does all tasks, none of its parts does"
    names = [str(tmp_path / f"task-{task}") for task in range(module.TASKS)]
    done(capsys, "merge", str(tmp_path / "by-command"), *names, "--rank", "0.999")
    assert same_bits(load(tmp_path / "by-command"), load(tmp_path / "from"))
    assert config_of(tmp_path / "by-command") == config_of(tmp_path / "from")
    seen = json.loads(done(capsys, "inspect", *names, "--json"))
    assert [layer["ranks"] for layer in seen["layers"]] == [list(module.RANKS)] * 2
