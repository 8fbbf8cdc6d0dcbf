"""The template of a Flower app, run by the commands of its page: `flwr run` on loopback, on a SuperLink of its own."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from flwr.app import Context, RecordDict
from flwr.serverapp.strategy import FedAvg
from peft import PeftModel

from fedfrom import FedFroM
from tests.conftest import ROOT
from tests.inprocess import InProcessGrid
from tests.processes import end, free_ports
from tests.test_docs import blocks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ends Flower's processes by /proc")

TEMPLATE = ROOT / "examples" / "flower_app"
COMMANDS = blocks(ROOT / "docs" / "flwr-run.md", "sh")[0].splitlines()


class Shell:
    """An empty folder in which commands are run, with a Flower of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        http, control = free_ports(2)
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),  # this fedfrom, whichever is installed
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(http),
            "FLWR_LOCAL_CONTROL_API_PORT": str(control),
            "NO_COLOR": "1",
        }

    def run(self, command: str) -> str:
        """Return what a command says; it has to exit with 0.

        On a busy machine Flower finds its SuperLink neither started within 15 seconds nor there within 0.4, and the
        command has done nothing: then it is tried again.
        """
        for _ in range(5):
            done = subprocess.run(
                ["bash", "-c", command.replace("path/to/fedfrom", str(ROOT))],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=800,
            )
            said = done.stdout + done.stderr
            if "Failed to start local SuperLink" not in said:
                break
        assert done.returncode == 0, said
        return said

    def outcome(self, said: str) -> str:
        """Return how the run ended that `flwr run` said it started, from what `flwr list` says once it has ended."""
        (run,) = re.findall(r"Successfully started run (\d+)", said)
        deadline = time.monotonic() + 120  # the log ends before the SuperLink has heard of the run's end
        while True:
            listed = self.run(f"flwr list --run-id {run} --format json")
            status = str(json.loads(listed[listed.index("{") :])["runs"][0]["status"])
            if status.startswith("finished") or time.monotonic() > deadline:
                return status
            time.sleep(1)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """One SuperLink for all runs: the first starts it."""
    shell = Shell(tmp_path_factory.mktemp("flwr run"))
    yield shell
    end(shell.environment["FLWR_HOME"])


@pytest.mark.slow
@pytest.mark.simulation
@pytest.mark.flwr_run
def test_the_template_learns_in_a_simulation_by_flwr_run(shell: Shell, template: dict[str, ModuleType]) -> None:
    environment, activate, install, copy, run = COMMANDS[:5]
    assert environment.startswith("python3 -m venv") and activate.startswith(". ") and install.startswith("pip install")
    shell.run(copy)
    said = shell.run(run)
    assert shell.outcome(said) == "finished:completed", said
    printed = [float(each) for each in re.findall(r"^round \d+: accuracy ([\d.]+)$", said, re.MULTILINE)]
    assert len(printed) == 4 and printed[-1] > printed[0] + 0.2, said
    task = template["task"]
    net = PeftModel.from_pretrained(task.model().unload(), str(shell.folder / "my-app-adapter"))
    assert task.accuracy(net, task.batches(seed=9, count=8)) == pytest.approx(printed[-1], abs=5e-4)


@pytest.mark.slow
@pytest.mark.simulation
def test_a_simulation_by_flwr_run_that_fails_is_known_by_flwr_list_alone(shell: Shell) -> None:
    """As the page says: `flwr run --stream` exits with 0 all the same."""
    shell.run("cp -r path/to/fedfrom/examples/flower_app broken")
    server = shell.folder / "broken" / "server_app.py"
    server.write_text("import no_such_package\n" + server.read_text())
    said = shell.run(COMMANDS[4].replace("my-app", "broken"))
    assert shell.outcome(said) == "finished:failed" and "no_such_package" in said


@pytest.fixture
def template(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The template's modules by name, as Flower imports them: with its folder on the path."""
    names = ("task", "client_app", "server_app")
    monkeypatch.syspath_prepend(str(TEMPLATE))
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        del sys.modules[name]


@pytest.mark.parametrize("strategy", [FedFroM, FedAvg])
def test_the_template_learns_with_either_strategy(
    strategy: type, template: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template["server_app"], "FedFroM", strategy)
    config = {**tomllib.loads((TEMPLATE / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]}
    config["out"] = str(tmp_path / "adapter")
    grid = InProcessGrid(template["client_app"].app, 2, run_config=config)
    template["server_app"].app(grid, Context(1, 0, node_config={}, state=RecordDict(), run_config=config))
    assert not grid.errors
    task = template["task"]
    net = PeftModel.from_pretrained(task.model().unload(), config["out"])
    first, last = (task.accuracy(each, task.batches(seed=9, count=8)) for each in (task.model(), net))
    assert last > first + 0.2


def test_the_template_is_as_short_as_its_page_says() -> None:
    files = [path for path in TEMPLATE.iterdir() if path.suffix in (".py", ".toml")]
    assert sorted(path.name for path in files) == ["client_app.py", "pyproject.toml", "server_app.py", "task.py"]
    (lines,) = re.findall(r"have (\d+) lines", (ROOT / "docs" / "flwr-run.md").read_text(encoding="utf-8"))
    assert sum(len(path.read_text().splitlines()) for path in files) == int(lines)
