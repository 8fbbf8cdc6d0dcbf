"""The command line: one clear line and exit code 2 for bad input; and one real simulation."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import simulations.__main__
from simulations import commands
from simulations.options import Options
from tests.conftest import ROOT


def command(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "simulations", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


BAD_INPUT = [
    (["--task", "sst3"], "sst3"),
    (["--k=-inf"], "--k"),
    (["--k", "nan"], "--k"),
    (["--rank", "0"], "--rank"),
    (["--lora-r", "0"], "--lora-r"),
    (["--task", "rte", "--glue-dir", "/nowhere/glue"], "/nowhere/glue"),
    (["--out", "/dev/null/results"], "/dev/null/results"),
    (["--task", "rte", "--model", "/nowhere/model", "--glue-dir", "GLUE"], "/nowhere/model"),
]


def assert_one_line(stderr: str, named: str) -> None:
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0]


@pytest.mark.parametrize(("arguments", "named"), BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    tiny_glue: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    given = [tiny_glue if argument == "GLUE" else argument for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["simulations", *given, *out])
    with pytest.raises(SystemExit) as ended:
        simulations.__main__.main()
    assert ended.value.code == 2
    assert_one_line(capsys.readouterr().err, named)
    assert not list(tmp_path.iterdir())


def test_bad_input_that_is_found_last_is_one_line_of_a_real_process(tmp_path: Path, tiny_glue: str) -> None:
    """When everything has been imported, whose warnings would be lines too."""
    arguments, named = BAD_INPUT[-1]
    done = command(*[tiny_glue if argument == "GLUE" else argument for argument in arguments], "--out", str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert_one_line(done.stderr, named)


def test_help_names_every_option_without_loading_torch() -> None:
    code = (
        "import sys; sys.argv = ['x', '--help']\n"
        "from simulations.__main__ import main\n"
        "try:\n main()\n"
        "finally:\n assert not {'torch', 'flwr', 'ray', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in Options.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in done.stdout
    assert "--quick" in done.stdout


def test_an_option_that_is_given_comes_before_the_preset() -> None:
    seen: list[tuple[Options, bool]] = []

    @commands.takes(Options, {"steps": 3, "rounds": 2}, quick="", report="")
    def run(options: Options, report: bool) -> None:
        seen.append((options, report))

    run(steps=5, rounds=None, quick=True, report=True)
    run(rounds=None)
    (quick, reported), (plain, not_reported) = seen
    assert (quick.steps, quick.rounds, reported) == (5, 2, True)
    assert (plain, not_reported) == (Options(), False)


@pytest.mark.simulation
def test_a_real_simulation(tiny_model: str, tiny_glue: str, tmp_path: Path) -> None:
    out = tmp_path / "results"
    done = command(
        *("--quick", "--model", tiny_model, "--pooling", "mean", "--task", "sst2", "--glue-dir", tiny_glue),
        *("--ranks", "2,4", "--strategies", "from,average", "--train-examples", "0", "--out", str(out)),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "results.json").read_text())
    assert set(found["strategies"]) == {"from", "average"}
    for strategy in found["strategies"].values():
        assert [entry["number"] for entry in strategy["rounds"]] == [0, 1, 2]
        assert set(strategy["rounds"][2]["clients"]) == {"0", "1"}
        down, up = ([entry[f"bytes-{way}"] for entry in strategy["rounds"][1:]] for way in ("down", "up"))
        assert down[1] == up[1] == up[0] < down[0], "the client of rank 2 is sent two ranks once it has said so"
        assert (out / strategy["folder"] / "adapter_model.safetensors").is_file()
    assert f"Report in {out / 'report.html'}" in done.stdout and (out / "report.html").is_file()
    assert done.stderr.strip() == "", "a quiet run says nothing on stderr"
    assert "DeprecationWarning" not in done.stdout
