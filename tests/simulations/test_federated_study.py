"""The study of p and k in rounds: what is run, what the grid chooses, and what the tables say of it."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from fedfrom.errors import BadInput
from simulations.fields import read
from simulations.options import Options
from simulations.studies.federated import plan, tables
from simulations.studies.federated.options import FederatedOptions
from simulations.studies.glue.options import GlueOptions
from simulations.studies.paper.options import PaperOptions
from simulations.studies.study import Cell


def rounds(part: str, kind: str, method: str, seed: int, last: float) -> list[dict[str, Any]]:
    """The rows of four rounds that go from one half to `last`, where they stay for three."""
    same = {"part": part, "kind": kind, "method": method, "seed": seed, "setting": method, "bytes_up": 1e6}
    measured: dict[str, Any] = {"distance_from_mean": 0.25, "lambda_max": None, "k": None}
    scores = [0.5, 0.5, last, last, last]
    return [{**same, **measured, "round": number, "score": score} for number, score in enumerate(scores)]


def test_no_seed_is_in_the_grid_and_in_the_comparison() -> None:
    study = plan.study(FederatedOptions(grid_seeds=2, seeds=3))
    seeds = {part: {cell.seed for cell in study.cells if cell.part == part} for part in ("grid", "comparison")}
    assert seeds == {"grid": {0, 1}, "comparison": {2, 3, 4}}
    names = [cell.name for cell in study.cells]
    assert len(set(names)) == len(names) == 2 * 12 + 3 * 15
    grid = {cell.name for cell in study.cells if cell.part == "grid"}
    assert all(set(cell.needs) == (grid if cell.part == "comparison" else set()) for cell in study.cells)
    # one simulation a kind of clients and seed
    assert len({cell.group for cell in study.cells}) == 2 * (2 + 3)


def test_the_best_of_the_grid_is_the_mean_over_both_kinds_of_clients() -> None:
    found = []
    for seed, (setting, powers) in product((0, 1), plan.GRID.items()):
        for k, p in powers:
            good = {"dirichlet": (k, p) in ((1, 0), (0.5, 1)), "equal": k == 0.5}[setting]
            found += rounds("grid", setting, plan.from_spec(k, p), seed, 0.8 if good else 0.6 + 0.01 * seed)
    known = pd.DataFrame(found)
    assert plan.best(known) == plan.from_spec(0.5, 1)
    chosen = Cell("comparison", "dirichlet", 2, plan.BEST)
    assert plan.spec_of(chosen, known) == plan.from_spec(0.5, 1)
    # p changes nothing where all hold equally much: what differs in it alone runs once
    assert plan.spec_of(Cell("comparison", "equal", 2, plan.BEST), known) == plan.from_spec(0.5, 0)
    table = tables.grid(known)
    assert len(table) == 12 and set(table["seeds"]) == {2}
    line = table[(table["clients"] == "dirichlet") & (table["p"] == 1) & (table["k"] == 0.5)].iloc[0]
    assert line["accuracy"] == "0.800 ± 0.000" and line["stuck"] == 0


def test_strategies_are_compared_with_fedavg_on_the_seeds_that_both_have() -> None:
    ends = {plan.BASELINE: (0.6, 0.7, 0.8), "k=auto": (0.7, 0.8), "the paper's FroM": (0.51, 0.9, 0.9)}
    found = [
        row
        for method, values in ends.items()
        for seed, last in enumerate(values)
        for row in rounds("comparison", "dirichlet", method, seed, last)
    ]
    table = tables.comparison(pd.DataFrame(found), 0.7).set_index("strategy")
    assert table.loc[plan.BASELINE, "ahead of FedAvg"] == ""
    assert table.loc["k=auto", "ahead of FedAvg"] == "+0.100 ± 0.000"
    assert table.loc["k=auto", "rounds to 0.7"] == "2 2" and table.loc[plan.BASELINE, "rounds to 0.7"] == "- 2 2"
    assert table.loc["the paper's FroM", "stuck"] == 1 and table.loc["k=auto", "stuck"] == 0
    assert table.loc["k=auto", "MB up"] == "5.0" and table.loc["k=auto", "λ_max"] == ""
    assert table.loc["k=auto", "distance from the mean"] == "0.25"


def test_a_history_is_a_row_a_round() -> None:
    entry = SimpleNamespace(
        number=1,
        scores={"score": 0.75, "loss": 0.5},
        seconds=2.0,
        server_seconds=0.1,
        bytes_up=10,
        bytes_down=20,
        distance_from_mean=None,
        train_metrics={"lambda-max": 1.5},
    )
    (row,) = plan.rows_of(SimpleNamespace(label="from", scored=[entry]), 400)
    assert (
        row["setting"] == "from" and row["task"] == "sst2" and (row["n"], row["score"], row["round"]) == (400, 0.75, 1)
    )
    assert row["lambda_max"] == 1.5 and row["k"] is None


@pytest.mark.parametrize(("wrong", "named"), [({"seeds": 0}, "--seeds"), ({"rounds": 0}, "--rounds")])
def test_bad_options_are_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(BadInput, match=named):
        read(FederatedOptions, wrong).simulation()


@pytest.mark.parametrize("kind", [PaperOptions, FederatedOptions, GlueOptions])
def test_an_option_of_a_study_is_read_and_explained_as_the_simulations_is(kind: type) -> None:
    shared = kind.__dataclass_fields__.keys() & Options.__dataclass_fields__.keys() - {
        "out",
        "steps",
        "target",
        "verbose",
    }
    assert {"model", "layers", "glue_dir", "batch_size", "processes"} <= shared
    for name in shared - {"processes", "validation_examples"}:
        own, simulations = kind.__dataclass_fields__[name], Options.__dataclass_fields__[name]
        assert own.metadata == simulations.metadata and own.type == simulations.type
    with pytest.raises(BadInput, match="--batch-size: can't read 'many'"):
        read(kind, {"batch-size": "many"})
