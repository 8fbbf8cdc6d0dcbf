"""The examples: each runs as it stands, in this process, and learns."""

import importlib.util
import re
from types import ModuleType

import pytest
from flwr.app import Context, RecordDict

from tests.conftest import ROOT
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
