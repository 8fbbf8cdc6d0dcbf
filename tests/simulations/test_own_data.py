"""Sites with data folders of their own, as in a deployment: what is read where, and that nothing else changes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

from fedfrom.errors import BadInput
from simulations import client_app, partitions, running, server_app, tasks
from simulations.options import Options
from tests.inprocess import InProcessGrid
from tests.simulations.conftest import write_tsv


def run(values: dict[str, Any], glue_dirs: list[str] | None, **node: Any) -> Path:
    """Run both apps as `flwr run` does, each node with a folder of its own, and return the results folder."""
    client_app._workers.clear()
    config = {name.replace("_", "-"): value for name, value in values.items()}
    nodes = [{**({"glue-dir": glue_dirs[number]} if glue_dirs else {}), **node} for number in range(values["clients"])]
    grid = InProcessGrid(client_app.app, values["clients"], node_config=nodes.__getitem__)
    server_app.app(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config))
    return Path(values["out"])


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "from" / "adapter_model.safetensors")


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def divide(values: dict[str, Any], folder: Path) -> tuple[str, list[str]]:
    """Write a server's folder, held-out examples alone, and each site's, its share of the training examples alone."""
    options = Options.from_mapping(values)
    for number, share in enumerate(partitions.split(options, tasks.load(options))):
        rows = zip(share.examples["text"], share.examples["label"], strict=True)
        write_tsv(folder / f"site-{number}" / "SST-2" / "train.tsv", ["sentence", "label"], [list(row) for row in rows])
    (folder / "server" / "SST-2").mkdir(parents=True)
    shutil.copy(Path(values["glue_dir"]) / "SST-2" / "dev.tsv", folder / "server" / "SST-2")
    return str(folder / "server"), [str(folder / f"site-{number}") for number in range(options.clients)]


@pytest.mark.parametrize("more", [{}, {"federated_evaluation": True, "train_examples": 20}])
def test_sites_that_hold_the_shares_train_as_a_partition_does(tiny: dict, tmp_path: Path, more: dict) -> None:
    values = {**tiny, "strategies": "from", "clients": 3, "federated_evaluation": bool(more)}
    server, sites = divide(values, tmp_path)
    own = run({**values, "partition": "own", "glue_dir": server, "out": str(tmp_path / "own"), **more}, sites)
    found = json.loads((own / "results.json").read_text())
    assert found["partition"] == [] and found["tasks"][0]["training-examples"] is None
    assert not (own / "partition.png").exists() and (own / "comparison.png").exists()
    assert [sorted(entry["clients"]) for entry in found["strategies"]["from"]["rounds"][1:]] == [["0", "1", "2"]] * 2
    divided = adapter(run(values, None))
    assert equal(adapter(own), divided) is not bool(more)  # with --train-examples each site takes as many of its own


def test_a_node_reads_the_folder_that_its_machine_has(tiny: dict, tmp_path: Path) -> None:
    values = {**tiny, "strategies": "from"}
    expected = adapter(run(values, None))
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tiny["glue_dir"], elsewhere)
    train = elsewhere / "SST-2" / "train.tsv"
    header, *rows = train.read_text().splitlines()
    train.write_text("\n".join([header, *reversed(rows)]) + "\n")  # the server's, which nobody trains on
    values["glue_dir"] = str(elsewhere)
    assert equal(adapter(run(values, [tiny["glue_dir"]] * 3)), expected)
    assert not equal(adapter(run(values, None)), expected)


@pytest.mark.parametrize(
    ("node", "partition", "named"),
    [
        ({}, "own", "no data of its own"),
        ({"partition-id": 1}, "iid", "two nodes have partition-id=1"),
        ({"num-partitions": 4}, "iid", "1 of 4 shares, the run 3 clients"),
        ({"glue-dir": "/nowhere"}, "own", "/nowhere: no such folder"),
    ],
)
def test_a_node_that_is_set_up_wrongly_stops_the_run(tiny: dict, node: dict, partition: str, named: str) -> None:
    with pytest.raises(RuntimeError, match=named):
        run({**tiny, "strategies": "from", "partition": partition}, None, **node)
    assert not list(Path(tiny["out"]).parent.iterdir())


def test_own_data_are_refused_where_there_are_none(tiny: dict) -> None:
    with pytest.raises(BadInput, match="same on every machine"):
        Options(partition="own").validated()
    with pytest.raises(BadInput, match="deploy"):
        running.run(Options.from_mapping({**tiny, "partition": "own"}))
