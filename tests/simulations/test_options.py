"""Options: bounds, the three ways they travel, and what they work out."""

import math

import pytest

from fedfrom.errors import BadInput
from simulations.options import Options

CHANGED = {
    "strategies": ("from:k=1", "average"),
    "task": ("qnli", "rte"),
    "partition": "tasks",
    "ranks": (4, 8),
    "k": math.inf,
    "full": False,
    "lr": 3e-4,
    "layers": 2,
    "rank": 4,
    "target": None,
    "seed": 7,
    "lora_targets": ("query",),
}


@pytest.mark.parametrize("options", [Options(), Options(**CHANGED)])
def test_options_survive_each_way_of_travelling(options: Options) -> None:
    assert Options.from_mapping(options.to_dict()) == options
    assert Options.from_record(options.to_record()) == options
    flat = {
        name.replace("_", "-"): ",".join(map(str, value)) if isinstance(value, list) else value
        for name, value in options.to_dict().items()
        if value is not None  # pyproject.toml has no null
    }
    assert Options.from_mapping(flat) == options


def test_defaults_are_valid() -> None:
    assert Options().validated() == Options()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"task": "sst3"}, "sst3"),
        ({"task": ""}, "--task"),
        ({"task": "rte,wnli"}, "--partition tasks"),
        ({"partition": "tasks"}, "two tasks"),
        ({"partition": "even"}, "even"),
        ({"k": "-inf"}, "--k"),
        ({"k": "nan"}, "--k"),
        ({"examples_power": -0.5}, "--examples-power"),
        ({"rank": 0}, "--rank"),
        ({"rank": 9}, "--rank 9"),
        ({"lora_r": 0}, "--lora-r"),
        ({"ranks": "4,0"}, "--ranks"),
        ({"ranks": "4,x"}, "--ranks"),
        ({"ranks": "4,8"}, "fedavg"),
        ({"full": True, "dora": True}, "--full"),
        ({"alpha": 0}, "--alpha"),
        ({"lr": -1}, "--lr"),
        ({"clients": 1}, "--clients"),
        ({"clients": 2.5}, "--clients"),
        ({"rounds": 0}, "--rounds"),
        ({"solver": "qr"}, "qr"),
        ({"scope": "tensor"}, "tensor"),
        ({"server_lr": 0}, "--server-lr"),
        ({"lora_dropout": 1.0}, "--lora-dropout"),
        ({"seed": -1}, "--seed: expected 0 or more"),
        ({"seed": 2**32}, "--seed: expected 4294967295 or less"),
        ({"strategies": ""}, "--strategies"),
        ({"strategies": "from,from"}, "twice"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_bad_options_are_named(values: dict, named: str) -> None:
    with pytest.raises(BadInput, match=named) as caught:
        Options.from_mapping(values).validated()
    assert "\n" not in str(caught.value)


def test_tasks_set_the_number_of_clients() -> None:
    assert Options(task=("qnli", "rte", "wnli"), partition="tasks", clients=9).validated().clients == 3


def test_ranks_go_round_the_clients_and_the_server_holds_the_largest() -> None:
    options = Options(ranks=(4, 16, 8))
    assert [options.client_rank(client) for client in range(5)] == [4, 16, 8, 4, 16]
    assert options.server_rank == 16


def test_only_what_is_not_at_hand_needs_the_hub(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("FEDFROM_GLUE_DIR", raising=False)
    assert not Options().needs_hub
    assert not Options(model=str(tmp_path)).needs_hub
    assert Options(model="bert-base-uncased").needs_hub
    assert Options(task=("rte",)).needs_hub
    monkeypatch.setenv("FEDFROM_GLUE_DIR", str(tmp_path))
    assert not Options(task=("rte",)).needs_hub
