"""Hostile options, arguments and results folders: taken, or refused in one line."""

import contextlib
import dataclasses
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from hypothesis import given
from hypothesis import strategies as st

import simulations.__main__
from fedfrom import methods
from fedfrom.errors import BadInput
from simulations import environment, strategies
from simulations.options import Options
from simulations.results import Folder, load_model
from tests.conftest import ROOT
from tests.hostile.given import (
    FILE_STATE,
)
from tests.hostile.states import pickled
from tests.hostile.values import CONFIG, cases, json_values, numbers, texts
from tests.hostile.watch import harmless

pytestmark = pytest.mark.timeout(6 * 3600)  # thousands of cases, on a machine that has other work
OPTION_NAMES = [field.name for field in dataclasses.fields(Options)]


typed = st.one_of(
    numbers.map(str),
    texts.filter(lambda text: "\0" not in text and len(text) < 1000),
    st.sampled_from(
        ["reviews", "rte,wnli", "from:k=1", "4,8", "tasks", "true", "--", "-", "--k", "from,from", ",", "~"]
    ),
)


def assert_one_line(message: str) -> None:
    assert message.strip() and len(message.strip().splitlines()) == 1, message


@cases(100)
@given(
    values=st.dictionaries(
        st.one_of(st.sampled_from(OPTION_NAMES), st.sampled_from(OPTION_NAMES), texts),
        st.one_of(typed, json_values),
        max_size=3,
    )
)
def test_options_are_valid_or_refused_in_one_line(values: dict[str, Any]) -> None:
    with harmless():
        try:
            options = Options.from_mapping(values).validated()
        except BadInput as error:
            assert_one_line(str(error))
            return
        assert isinstance(options.needs_hub, bool)
    assert Options.from_mapping(json.loads(json.dumps(options.to_dict()))).validated() == options


flags = st.sampled_from([*OPTION_NAMES, "no_full", "quick", "colour"]).map(lambda name: "--" + name.replace("_", "-"))


@cases(60)
@given(arguments=st.lists(st.one_of(flags, typed), max_size=4))
def test_arguments_are_parsed_or_refused_in_one_line(arguments: list[str]) -> None:
    started: list[Options] = []
    said = io.StringIO()
    streams = contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO())
    with streams[0], streams[1], pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["simulations", *arguments])
        patch.setattr(environment, "prepare", lambda online: None)
        patch.setattr("simulations.running.run", started.append)
        simulations.__main__.main()
    assert ended.value.code in (0, 2)
    if ended.value.code == 2:
        assert not started
        assert_one_line(said.getvalue())
        assert said.getvalue().startswith("error: ")
    else:
        assert said.getvalue() == ""


settings_names = ["k", "rank", "seed", "density", "validate", "lora_config", "fraction_train", "method", "colour"]


settings_of_strategies = st.one_of(st.builds("{}={}".format, st.sampled_from(settings_names), typed), typed)


@cases(60)
@given(name=st.sampled_from(["from", "fedavg", *methods(), ""]), pairs=st.lists(settings_of_strategies, max_size=2))
def test_strategies_are_built_or_refused_in_one_line(name: str, pairs: list[str]) -> None:
    with harmless():
        try:
            strategies.build(":".join([name, *pairs]), Options(), CONFIG)
        except BadInput as error:
            assert_one_line(" ".join(str(error).split()))


@pytest.mark.parametrize("arguments", [["--no-such-option"], ["--k", "a\nb"], ["--clients", "9" * 5000], ["stray"]])
def test_the_command_itself_refuses_in_one_line(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "simulations", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 2 and done.stdout == ""
    assert_one_line(done.stderr)


def test_numbers_that_no_option_holds() -> None:
    for name in ("clients", "seed", "rank"):
        for value in (math.inf, -math.inf, math.nan, -(10**400)):
            with pytest.raises(BadInput, match=f"--{name}"):
                Options.from_mapping({name: value}).validated()
    for name in ("k", "seed", "alpha"):
        with pytest.raises(BadInput, match=f"--{name}"):
            Options.from_mapping({name: 10**400}).validated()


def test_names_that_are_no_files() -> None:
    for model in ("x" * 5000, "~nobody-has-this-name/model", "\0"):
        assert Options(model=model).validated().needs_hub
    for out in ("x" * 5000, "\0"):
        with pytest.raises(BadInput, match="--out"), Folder(out):
            pass


def test_results_never_lead_outside_their_folder(tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "results"
    for path in (elsewhere, folder, folder / "from"):
        path.mkdir()
    (elsewhere / "adapter_model.safetensors").write_bytes(safetensors.torch.save(FILE_STATE))
    (folder / "from" / "adapter_model.bin").write_bytes(pickled()[0])
    found = {"options": {}, "tasks": [{"labels": []}], "strategies": {"from": {"folder": "../elsewhere"}}}
    (folder / "results.json").write_text(json.dumps(found))
    with pytest.raises(BadInput, match=r"from: expected adapter_model\.safetensors"):
        load_model(folder, "from")
    for text in ("[]", "3", '{"strategies": 3}', "[" * 10**5):
        (folder / "results.json").write_text(text)
        with pytest.raises(BadInput, match="no results of strategy"):
            load_model(folder, "from")
