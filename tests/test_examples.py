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


@pytest.mark.slow
def test_unequal_ranks(task_identity):
    from examples import unequal_ranks
    from fedfrom.merging.layers import find_layers, ranks
    from tests.inprocess import InProcessGrid

    grid = InProcessGrid(unequal_ranks.client_app, len(unequal_ranks.RANKS), record=True)
    result = unequal_ranks.run(grid)
    assert not grid.errors
    before, after = (dict(result.evaluate_metrics_serverapp[number]) for number in (0, 4))
    assert min(after.values()) > 0.8 > max(before.values())
    sent = set()
    for traffic in grid.traffic:
        if traffic.direction == "up":
            state = traffic.message.content["arrays"].to_torch_state_dict()
            sent |= set(ranks(find_layers(state, "a reply"), state).values())
    assert sent == set(unequal_ranks.RANKS), "each client trained at its own rank"
