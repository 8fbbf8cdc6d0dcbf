"""The examples run, and show what they say."""

import json

import pytest

from tests.folders import config_of, done, load, same_bits


@pytest.mark.slow
def test_task_adapters(tmp_path, capsys):
    from examples import task_adapters

    found = task_adapters.main(tmp_path)
    tasks = range(task_adapters.TASKS)
    for task in tasks:
        assert found[f"task-{task}"][task] > 0.9
    worst_of_one = max(min(found[f"task-{task}"]) for task in tasks)
    for method in ("average", "from", "task-arithmetic"):
        assert min(found[method]) > 0.8 > worst_of_one, "the merged adapter does all tasks, none of its parts does"
    names = [str(tmp_path / f"task-{task}") for task in tasks]
    done(capsys, "merge", str(tmp_path / "by-command"), *names, "--rank", "0.999")
    assert same_bits(load(tmp_path / "by-command"), load(tmp_path / "from"))
    assert config_of(tmp_path / "by-command") == config_of(tmp_path / "from")
    seen = json.loads(done(capsys, "inspect", *names, "--json"))
    assert [layer["ranks"] for layer in seen["layers"]] == [list(task_adapters.RANKS)] * 2
