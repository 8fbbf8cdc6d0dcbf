"""What `make simulate` promises: the default run learns, with both strategies, and leaves what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.simulation
def test_the_default_simulation_learns(tmp_path: Path) -> None:
    from simulations.results import load_model

    out = tmp_path / "run"
    command = [sys.executable, "-m", "simulations", "--out", str(out)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env={**os.environ}, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / "results.json").read_text())
    strategies = results["strategies"]
    assert results["seconds-before"].keys() == {"preparing", "starting-clients"}
    assert min(results["seconds-before"].values()) > 0 and "until the clients were ready" in done.stdout
    assert set(strategies) == {"from", "fedavg"}
    for name, history in strategies.items():
        assert history["final"] >= results["constant-answer"] + 0.08, name
        assert (out / name / "adapter_model.safetensors").is_file()
    assert (out / "comparison.png").stat().st_size > 10_000
    assert load_model(out, "from") is not None
