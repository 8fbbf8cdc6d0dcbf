"""The same apps deployed: a SuperLink and three SuperNodes as processes on loopback, through deployment/'s scripts.

Every message starts a client process that imports torch anew, so one deployment runs once and all tests look at it: two
strategies of two rounds each, and in the first round of the second one site is killed.

Opt-in, `FEDFROM_TEST_DEPLOYMENT=1 make test-all ARGS="-k deployment"`: Flower gives every process that it starts 30
seconds to sign on, which on a machine that is busy with something else they miss.
"""

import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from safetensors.torch import load_file

from fedfrom.merging.peft import layers as L
from simulations import client_app, server_app
from tests.conftest import ROOT
from tests.inprocess import InProcessGrid
from tests.processes import free_ports, of_home
from tests.simulations.conftest import write_tsv

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # in seconds, for the one deployment
    pytest.mark.skipif(
        not (shutil.which("bash") and shutil.which("openssl") and shutil.which("ssh-keygen")),
        reason="needs bash, openssl and ssh-keygen",
    ),
    pytest.mark.skipif(
        not os.environ.get("FEDFROM_TEST_DEPLOYMENT"),
        reason="FEDFROM_TEST_DEPLOYMENT is not set: needs an idle machine",
    ),
]

SITES = ("north", "south", "west")
KILLED = 2
SLOW = 900.0  # seconds that one step may take on a busy machine before it counts as hanging


@dataclass
class Deployment:
    """Processes that were started from one folder, and what they said."""

    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.keys = self.folder / "keys"
        self.environment = {
            **os.environ,
            # flower-superlink starts flower-superexec by its name.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "FLWR_HOME": str(self.folder / "flwr"),
            "NO_COLOR": "1",
        }

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one of deployment/'s scripts to its end."""
        return subprocess.run(
            [ROOT / "deployment" / script, *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SLOW,
        )

    def start(self, name: str, *command: str) -> None:
        """Start a process that stays, in a session of its own, its output in a file."""
        with self.log(name).open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [str(ROOT / "deployment" / command[0]) if command[0].endswith(".sh") else command[0], *command[1:]],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def said(self, name: str) -> str:
        return self.log(name).read_text(encoding="utf-8", errors="replace")

    def wait(self, what: str, done: Callable[[], bool], needed: str) -> None:
        """Wait until something is so, while a process that it needs goes on."""
        deadline = time.monotonic() + SLOW
        while not done():
            ended = self.processes[needed].poll() is not None
            if ended or time.monotonic() > deadline:
                logs = "\n".join(f"--- {name}\n{self.said(name)[-3000:]}" for name in self.processes)
                pytest.fail(f"{what}: {needed} {'ended' if ended else f'took over {SLOW:.0f} s'}\n{logs}")
            time.sleep(0.2)

    def wait_for_end(self, name: str) -> None:
        self.wait(f"{name}'s end", lambda: self.processes[name].poll() is not None, "link")

    def left(self) -> list[int]:
        """Return the ids of all processes that were started here, by whomever, and have not ended."""
        return of_home(self.environment["FLWR_HOME"])

    def kill(self) -> None:
        """End whatever is left, the SuperLink last."""
        for name in sorted(self.processes, key=lambda name: name == "link"):
            if self.processes[name].poll() is None:
                os.killpg(self.processes[name].pid, signal.SIGKILL)
            self.processes[name].wait(30)
        for identifier in self.left():
            try:
                os.kill(identifier, signal.SIGKILL)
            except ProcessLookupError:
                continue


@dataclass
class Ran:
    """What came of the one deployment."""

    out: Path
    config: dict[str, Any]
    sites: list[Path]
    said: dict[str, str]
    codes: dict[str, int]
    nodes: list[dict[str, Any]]
    stopped: subprocess.CompletedProcess[str]
    left: list[int]

    @property
    def strategies(self) -> dict[str, Any]:
        return json.loads((self.out / "results.json").read_text())["strategies"]


@pytest.fixture(scope="module")
def ran(tiny_model: str, tiny_glue: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    folder = tmp_path_factory.mktemp("deployment")
    here = Deployment(folder)
    server, sites = divide(Path(tiny_glue), folder)
    port, *ports = free_ports(len(SITES) + 3)
    config = {
        "clients": len(SITES),
        "strategies": "from,average",
        "task": "sst2",
        "partition": "own",
        "glue-dir": str(server),
        "model": tiny_model,
        "pooling": "mean",
        "rounds": 2,
        "steps": 3,
        "batch-size": 8,
        "lora-r": 4,
        "lr": 0.02,
    }
    try:
        prepare(here, port)
        here.start("link", "link.sh", str(here.keys), "--host", "127.0.0.1", "--port", str(port))
        here.wait("the SuperLink's start", lambda: answers(port, here.keys / "ca.crt"), "link")
        registered = here.run("register.sh", "test", *(str(here.keys / f"{name}.pub") for name in SITES))
        assert registered.returncode == 0, registered.stdout + registered.stderr
        to = ("--superlink", f"127.0.0.1:{port}", "--max-retries", "3", "--port")
        nodes_of = [f'partition-id={number} glue-dir="{site}"' for number, site in enumerate(sites)]
        for name, node, own_port in zip(SITES, nodes_of, ports, strict=False):
            here.start(name, "site.sh", str(here.keys), name, node, *to, str(own_port))
        # FAB, run and node are the SuperLink's to give: both must end without a word from it but no.
        here.start("stranger", "site.sh", str(here.keys), "stranger", "partition-id=0", *to, str(ports[-2]))
        here.start("plain", "flower-supernode", "--insecure", *to, str(ports[-1]))
        # One thing after the other: a process that Flower starts has 30 seconds to sign on, on a busy machine too.
        for name in ("stranger", "plain"):
            here.wait_for_end(name)
        for name in SITES:
            here.wait(f"{name}'s start", lambda name=name: "SuperNode ID" in here.said(name), name)
        here.start("refused", "run.sh", "test", "--run-config", "rounds=0")
        here.wait_for_end("refused")
        out = folder / "results"
        here.start("run", "run.sh", "test", "--run-config", toml({**config, "out": str(out)}))
        nodes = json.loads(flwr(here, "supernode", "list", "test", "--format", "json"))["nodes"]
        killed = SITES[KILLED]
        here.wait("the third round", lambda: here.said(killed).count("Receiving: train") == 3, "run")
        here.processes[killed].kill()  # its client process has not even imported torch by now
        here.processes[killed].wait(30)
        here.wait_for_end("run")
        here.start("back", "site.sh", str(here.keys), killed, nodes_of[KILLED], *to, str(ports[KILLED]))
        here.wait("the killed site's return", lambda: "SuperNode ID" in here.said("back"), "back")
        stopped = here.run("stop.sh", str(here.keys))
        # A SuperExec ends once its SuperNode is no more, and until it is waited for it counts as being.
        codes = {name: process.wait(30) for name, process in here.processes.items()}
        deadline = time.monotonic() + 60
        while here.left() and time.monotonic() < deadline:
            time.sleep(0.5)
        said = {name: here.said(name) for name in here.processes}
        yield Ran(out, config, sites, said, codes, nodes, stopped, here.left())
    finally:
        here.kill()


def divide(glue: Path, folder: Path) -> tuple[Path, list[Path]]:
    """Write a folder with held-out examples for the server, and one of unequal training examples for each site."""
    header, *rows = (glue / "SST-2" / "train.tsv").read_text(encoding="utf-8").splitlines()
    sites = [folder / f"data {name}" for name in SITES]  # with a space, which must survive the node's configuration
    for site, own in zip(sites, (rows[:45], rows[45:75], rows[75:]), strict=True):
        write_tsv(site / "SST-2" / "train.tsv", [header], [[row] for row in own])
    (folder / "server" / "SST-2").mkdir(parents=True)
    shutil.copy(glue / "SST-2" / "dev.tsv", folder / "server" / "SST-2")
    return folder / "server", sites


def prepare(here: Deployment, port: int) -> None:
    """Make certificates and keys, and name the SuperLink in Flower's configuration."""
    for command in (["certificates.sh", str(here.keys), "localhost"], *(["key.sh", str(here.keys), n] for n in SITES)):
        made = here.run(*command)
        assert made.returncode == 0, made.stderr
    assert here.run("key.sh", str(here.keys), "stranger").returncode == 0
    configuration = Path(here.environment["FLWR_HOME"]) / "config.toml"
    configuration.parent.mkdir()
    configuration.write_text(
        f'[superlink.test]\naddress = "127.0.0.1:{port}"\nroot-certificates = "{here.keys / "ca.crt"}"\n'
    )


def answers(port: int, authority: Path) -> bool:
    """Say whether the SuperLink answers over TLS, its certificate signed by the authority."""
    context = ssl.create_default_context(cafile=str(authority))
    try:
        with urllib.request.urlopen(f"https://127.0.0.1:{port}/health", timeout=10, context=context) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError) as error:
        assert "CERTIFICATE" not in str(error), error
        return False


def toml(values: dict[str, Any]) -> str:
    return " ".join(f"{name}={json.dumps(value)}" for name, value in values.items())


def flwr(here: Deployment, *arguments: str) -> str:
    """Return what a command of Flower's says."""
    command = [str(Path(sys.executable).parent / "flwr"), *arguments]
    return subprocess.run(command, env=here.environment, capture_output=True, text=True, timeout=SLOW).stdout


@pytest.fixture(scope="module")
def in_process(ran: Ran, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the same run in this process, whose third client fails where the site was killed."""
    client_app._workers.clear()
    out = tmp_path_factory.mktemp("in-process") / "results"

    def client(message: Message, context: Context) -> Message:
        config = message.content.config_records["config"]
        if context.node_config["partition-id"] == KILLED and config.get("strategy") == "average":
            raise RuntimeError("gone")
        return client_app.app(message, context)

    folders = [{"glue-dir": str(site)} for site in ran.sites]
    grid = InProcessGrid(client, len(SITES), node_config=folders.__getitem__)
    config = {**ran.config, "out": str(out)}
    server_app.app(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config))
    return out


def assert_same_products(one: Path, two: Path) -> None:
    """Compare two adapters' folders: each module's product BA, each plain tensor, to 1e-6 of its norm."""
    states = [load_file(folder / "adapter_model.safetensors") for folder in (one, two)]
    assert states[0].keys() == states[1].keys()
    for layer in L.find_layers(states[0], "adapter").values():
        if layer.is_adapter:
            first, second = (L.read_adapter(layer, state, 1.0, "adapter").dense() for state in states)
            assert float((first - second).norm()) <= 1e-6 * float(first.norm()), layer.name
        else:
            for key in layer.keys.values():
                assert float((states[0][key] - states[1][key]).norm()) <= 1e-6 * float(states[0][key].norm()), key


def test_a_deployment_comes_to_what_a_run_in_one_process_does(ran: Ran, in_process: Path) -> None:
    assert ran.codes["run"] == 0, ran.said["run"]
    rounds = ran.strategies["from"]["rounds"]
    assert [sorted(entry["clients"]) for entry in rounds] == [[], ["0", "1", "2"], ["0", "1", "2"]]
    assert_same_products(ran.out / "from", in_process / "from")


def test_a_site_killed_in_mid_round_leaves_the_run_going(ran: Ran, in_process: Path) -> None:
    strategy = ran.strategies["average"]
    assert [sorted(entry["clients"]) for entry in strategy["rounds"]] == [[], ["0", "1"], ["0", "1"]]
    first, second = strategy["reports"]["1"], strategy["reports"]["2"]
    assert len(first["nodes"]) == 2 and not first["missing"]
    (reason,) = first["failed"].values()
    assert "Node Unavailable" in reason
    assert len(second["nodes"]) == 2 and not second["failed"] and not second["missing"]
    assert "a client failed" in ran.said["run"]
    assert_same_products(ran.out / "average", in_process / "average")


def test_a_site_that_was_killed_comes_back_as_the_same_node(ran: Ran) -> None:
    before, after = (re.findall(r"SuperNode ID: (\d+)", ran.said[name]) for name in (SITES[KILLED], "back"))
    assert before == after != []


def test_a_site_that_is_not_registered_gets_in_nowhere(ran: Ran) -> None:
    assert ran.codes["stranger"] != 0
    assert "Failed to activate SuperNode" in ran.said["stranger"]


def test_a_site_without_tls_gets_in_nowhere(ran: Ran) -> None:
    assert ran.codes["plain"] != 0
    assert "Connection attempt failed" in ran.said["plain"]


def test_only_registered_sites_are_known_and_serve(ran: Ran) -> None:
    assert len(ran.nodes) == len(SITES)
    for name in ("stranger", "plain"):
        assert "SuperNode ID" not in ran.said[name] and "Receiving" not in ran.said[name]
    for name in SITES:
        assert "SuperNode ID" in ran.said[name]


def test_a_run_that_fails_is_told_by_the_exit_code(ran: Ran) -> None:
    assert ran.codes["refused"] == 1, ran.said["refused"]
    assert "finished:failed" in ran.said["refused"] and "--rounds" in ran.said["refused"]


def test_stopping_leaves_nothing_behind(ran: Ran) -> None:
    assert ran.stopped.returncode == 0 and not ran.stopped.stderr
    assert not ran.left
    assert "SuperNode terminated gracefully" in ran.said[SITES[0]]
    assert "Application shutdown complete" in ran.said["link"]
