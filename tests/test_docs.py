"""The documentation: every link leads somewhere, every Python block runs, every command named is there."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from peft import LoraConfig, get_peft_model

from fedfrom import cli
from tests.conftest import ROOT

PAGES = sorted(
    path for pattern in ("*.md", "docs/*.md", "deployment/*.md", "results/*/README.md") for path in ROOT.glob(pattern)
)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def page(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", BLOCK.sub("", text))


def anchors(text: str) -> set[str]:
    """The names that GitHub gives headings."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"[*`]", "", heading)).strip().lower().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text(encoding="utf-8"))):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        found = (path.parent / name).resolve() if name else path
        assert found.exists() and found.is_relative_to(ROOT), f"{target}: no such file"
        if anchor:
            assert anchor in anchors(found.read_text(encoding="utf-8")), f"{target}: no such heading"


def blocks(path: Path, language: str) -> list[str]:
    return [code for kind, code in BLOCK.findall(path.read_text(encoding="utf-8")) if kind == language]


DOCS = [path for path in PAGES if path.parent.name == "docs"]
RUN = """
import json, os, pathlib, sys, traceback
outcomes = {}
for name, code in json.load(sys.stdin).items():
    pathlib.Path(name).mkdir(parents=True)
    os.chdir(name)
    try:
        exec(compile(code, name, "exec"), {"__name__": "__main__"})
        outcomes[name] = ""
    except BaseException:
        outcomes[name] = traceback.format_exc()
    os.chdir(pathlib.Path(sys.argv[1]))
(pathlib.Path(sys.argv[1]) / "outcomes.json").write_text(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of each page's Python blocks, in its order, the traceback they end in: in an empty folder, all in one process."""
    folder = tmp_path_factory.mktemp("docs")
    code = json.dumps({page(path): "\n".join(blocks(path, "python")) for path in DOCS})
    command = [sys.executable, "-c", RUN, str(folder)]
    done = subprocess.run(command, cwd=folder, input=code, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads((folder / "outcomes.json").read_text())
    return found


@pytest.mark.parametrize("path", DOCS, ids=page)
def test_python_blocks_run(path: Path, outcomes: dict[str, str]) -> None:
    assert outcomes[page(path)] == ""


def test_readmes_merge_of_folders_runs(tmp_path: Path) -> None:
    for seed, name in enumerate(("adapter-a", "adapter-b", "adapter-c")):
        torch.manual_seed(seed)
        model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6)), LoraConfig(r=2 + seed, target_modules=["0"]))
        torch.nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
        model.save_pretrained(str(tmp_path / name))
    (code,) = [code for code in blocks(ROOT / "README.md", "python") if "adapter-a" in code]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "merged-here" / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_commands_are_there(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)) | {"test", "test-all"}
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets, f"make {target}: no such target"
    for module in re.findall(r"python -m ((?:simulations|benchmarks)[\w.]*)", text):
        place = ROOT / Path(*module.split("."))
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), f"python -m {module}"


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_options_of_fedfrom_are_there(path: Path) -> None:
    group: Any = typer.main.get_command(cli.app)
    for line in "\n".join(blocks(path, "sh")).splitlines():
        words = line.partition("#")[0].split()
        if words[:1] == ["fedfrom"]:
            options = {option for parameter in group.commands[words[1]].params for option in parameter.opts}
            assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options, line


def test_the_page_on_the_command_line_has_every_command_and_option_and_no_others() -> None:
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    group: Any = typer.main.get_command(cli.app)
    top, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    pages = {name.removeprefix("fedfrom "): section for name, _, section in (s.partition("\n") for s in sections)}
    assert set(group.commands) == {name for name in pages if name != "Simulations"}
    for name, command in {"": group, **group.commands}.items():
        section = BLOCK.sub("", pages[name] if name else top)
        named = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]*)", section))
        options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        assert named - {"--help"} == options, name
        for row in re.findall(r"^\| `--([a-z-]+)` \| ([^|]+) \|", section, re.MULTILINE):
            (parameter,) = [p for p in command.params if f"--{row[0]}" in p.opts]
            known = parameter.default if isinstance(parameter.default, str) else None
            assert known is None or float_or(known) == float_or(row[1].strip("` ")), row


def float_or(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


@pytest.mark.slow
@pytest.mark.simulation
@pytest.mark.timeout(900)
def test_a_simulations_adapters_merged_on_disk_score_what_its_report_says(tmp_path: Path) -> None:
    """The quick start's own commands, on MiniLM and Ray; `make` and the environment apart, which are here already."""
    (block,) = [code for code in blocks(ROOT / "docs" / "quick-start.md", "sh") if "--save-clients" in code]
    simulate, activate, merge, evaluate = block.splitlines()
    assert activate == ". .venv/bin/activate"
    arguments = shlex.split(simulate.removeprefix("make simulate ARGS=").strip('"'))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*words: str) -> str:
        command = [sys.executable, "-m", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("simulations", *arguments)
    words = shlex.split(merge)
    clients = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob(words[3]))
    assert len(clients) == 2 and words[0] == "fedfrom"
    run(*words[:3], *clients, *words[4:])
    lines = run(*shlex.split(evaluate)[2:]).splitlines()
    (history,) = json.loads((tmp_path / "runs/first/results.json").read_text())["strategies"].values()
    assert [line.split()[0] for line in lines] == [f"{history['final']:.6f}"] * 2
    assert lines[1].split()[1] == "runs/merged"
