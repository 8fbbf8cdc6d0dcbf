"""No full disk, missing right or kill spoils a checkpoint."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord

from fedfrom import FedFroM
from tests import killed
from tests.checkpoints import contents, errors, names, start
from tests.conftest import ROOT
from tests.inprocess import InProcessGrid
from tests.models import mixed_state, noisy, record_of, same_bits
from tests.simulated import NAP

# --- What the disk refuses -------------------------------------------------------------------------------------------


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Let the kernel fail every write that makes a file larger: as a full disk does, in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


LARGE = {"w": np.ones((100, 200), np.float32)}  # 80 kB: the arrays' file is the largest by far


def test_no_room_ends_the_run_before_training(tmp_path: Path) -> None:
    for size, file in ((20_000, "arrays"), (200, "state")):
        grid = InProcessGrid(noisy, 3)
        state = LARGE if file == "arrays" else {"w": np.ones(1, np.float32)}
        with files_up_to(size), pytest.raises(OSError, match=r"expected a folder with room.*File too large") as error:
            FedFroM(checkpoint=tmp_path).start(grid, record_of(state), num_rounds=1)
        assert str(tmp_path) in str(error.value)
        assert not grid.traffic and names(tmp_path) == [".lock"]


def test_no_room_on_a_resume_ends_the_run_before_training(tmp_path: Path) -> None:
    start(tmp_path, rounds=1, state=LARGE)
    before = contents(tmp_path)
    grid = InProcessGrid(noisy, 3)
    with files_up_to(20_000), pytest.raises(OSError, match="expected a folder with room"):
        FedFroM(checkpoint=tmp_path).start(grid, record_of(LARGE), num_rounds=2)
    assert not grid.traffic and contents(tmp_path) == before
    with files_up_to(20_000):
        start(tmp_path, rounds=1, state=LARGE)  # nothing to write


def test_no_room_in_mid_run_costs_checkpoints_but_no_training(
    tmp_path: Path, flower_log: pytest.LogCaptureFixture
) -> None:
    """The one before stays, and the next that fits is written."""
    expected = start(None, rounds=4, state=LARGE)
    seen = {}
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)

    def evaluated(server_round: int, arrays: ArrayRecord) -> None:
        seen[server_round] = contents(tmp_path)
        size = 20_000 if server_round in (2, 3) else previous[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, previous[1]))

    strategy = FedFroM(checkpoint=tmp_path)
    try:
        result = strategy.start(InProcessGrid(noisy, 3), record_of(LARGE), num_rounds=4, evaluate_fn=evaluated)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
    assert same_bits(result.arrays, expected.arrays)
    assert seen[2] == seen[3] == seen[4] != seen[1]
    assert names(tmp_path) == [".lock", "round-0001", "round-0004"]
    assert [message.split(":")[0] for message in errors(flower_log)] == [f"checkpoint of round {n}" for n in (2, 3)]
    assert same_bits(start(tmp_path, rounds=4, state=LARGE).arrays, expected.arrays)


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Lay down the rights of root, whom no file system refuses anything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_folder_is_refused_before_training() -> None:
    parent = Path(tempfile.mkdtemp(prefix="fedfrom-"))  # pytest's own folders can't even be entered by others
    try:
        for path, mode in ((parent, 0o555), (parent / "made", 0o555)):
            path.mkdir(exist_ok=True)
            path.chmod(mode)
            for folder in (path, path / "new"):
                grid = InProcessGrid(noisy, 3)
                with ordinary_user(), pytest.raises(PermissionError, match="the right to write to it"):
                    FedFroM(checkpoint=folder).start(grid, record_of(mixed_state()), num_rounds=1)
                assert not grid.traffic
    finally:
        shutil.rmtree(parent)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="expected a folder"):
            start(path)


# --- Killed ----------------------------------------------------------------------------------------------------------


def killed_runs(folder: Path, *options: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.killed", str(folder), *options]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.mark.parametrize("instants", [3, pytest.param(24, marks=pytest.mark.slow)])
def test_killed_at_a_random_instant_a_run_ends_with_the_same_bits(instants: int, tmp_path: Path) -> None:
    runs = killed_runs(tmp_path, "--instants", str(instants))
    assert len(runs) == instants and all(run["same"] for run in runs), runs
    if instants > 20:  # what they hit is chance, but not that they hit many things
        assert len({run["left"][-1] for run in runs if run["left"]}) >= 3, runs


@pytest.mark.slow
def test_killed_before_any_step_on_the_disk_a_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Every instant that matters: before each open, mkdir, rename and removal of two rounds."""
    runs = killed_runs(tmp_path, "--rounds", "2", "--every", "1")
    assert all(run["same"] for run in runs), runs
    left = {name for run in runs for name in run["left"]}
    assert {".round-0002.partial", ".round-0001.removed", "round-0002"} <= left


@pytest.mark.slow
@pytest.mark.simulation
def test_killed_twice_in_a_real_simulation_a_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    """The server's process is killed, with Ray's driver in it; the next starts while Ray's agents still linger."""
    rounds, draw = 6, random.Random(0)
    strategy = FedFroM()  # on the in-process Grid: the clients are the same functions
    grid, arrays = InProcessGrid(noisy, 2), record_of(mixed_state())
    result = strategy.start(grid, arrays, num_rounds=rounds, evaluate_fn=killed.score)
    expected = killed.outcome(strategy, result)
    folder, out = tmp_path / "run", tmp_path / "out.json"
    ray = tempfile.mkdtemp(prefix="ray-")  # the names of Ray's sockets must be short
    command = [sys.executable, "-m", "tests.simulated", str(folder), str(out), str(rounds), ray]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # for Ray's workers
    started: list[subprocess.Popen] = []

    def run() -> subprocess.Popen:
        with open(tmp_path / f"log-{len(started)}", "w") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        started.append(process)
        return process

    try:
        for whole in (1, 3):
            process, since = run(), time.monotonic()
            while not any(path.name >= f"round-{whole:04d}" for path in folder.glob("round-*")):
                assert process.poll() is None, (tmp_path / f"log-{len(started) - 1}").read_text()
                assert time.monotonic() - since < 400
                time.sleep(0.02)
            time.sleep(draw.uniform(0, 2 * NAP))  # of the next round, for which two clients nap one after the other
            process.kill()
            assert process.wait() == -signal.SIGKILL and not out.exists()
        process = run()
        assert process.wait(400) == 0, (tmp_path / "log-2").read_text()
        assert json.loads(out.read_text()) == expected
        said = (tmp_path / "log-2").read_text()
        assert "Going on after round" in said and "[ROUND 3/6]" not in said
    finally:
        for process in started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # Ray's agents, which would linger a minute
            process.wait()
        shutil.rmtree(ray, ignore_errors=True)
