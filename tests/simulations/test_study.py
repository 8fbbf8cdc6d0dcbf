"""What studies stand on: cells kept one by one in a tidy frame, means with intervals, tables."""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fedfrom.errors import BadInput
from fedfrom.pages import intervals
from simulations.studies import running, tables
from simulations.studies.frame import COLUMNS, Frame
from simulations.studies.study import Cell, Done, Study
from simulations.tables import write_table

CELLS = tuple(Cell("part", "kind", seed, method, group=method) for method in ("one", "two", "three") for seed in (0, 1))


def nothing(cells: Sequence[Cell], rows: pd.DataFrame) -> Iterator[Done]:
    yield from (Done(cell, [scored(cell)]) for cell in cells)


def scored(cell: Cell, score: float = 0.5) -> dict[str, Any]:
    return {"setting": "", "task": "rte", "split": "reported", "n": 10, "score": score}


def study(cells: tuple[Cell, ...] = CELLS, run: Any = nothing, **budget: Any) -> Study:
    return Study("small", (0, 1), ("kind",), ("one", "two", "three"), ("rte",), budget, cells, run)


def test_a_study_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    calls: list[str] = []

    def stopped(cells: Sequence[Cell], rows: pd.DataFrame) -> Iterator[Done]:
        for cell in cells:
            calls.append(cell.name)
            if len(calls) == 4:
                raise KeyboardInterrupt
            yield Done(cell, [scored(cell)], {"norms": [1.0]})

    with pytest.raises(KeyboardInterrupt):
        running.run(Frame(tmp_path, study(run=stopped)), say=lambda line: None)
    again = Frame(tmp_path, study(run=stopped))
    assert [cell.name for cell in again.missing()] == [cell.name for cell in CELLS[3:]]
    running.run(again, say=lambda line: None)
    assert calls == [cell.name for cell in (*CELLS[:4], *CELLS[3:])]
    found = Frame(tmp_path, study()).rows()
    assert list(found.columns) == list(COLUMNS) and len(found) == 6
    assert list(found["method"]) == ["one", "one", "two", "two", "three", "three"]
    assert again.beside(CELLS[0]) == {"norms": [1.0]}


def test_cells_are_handed_the_rows_of_those_they_need(tmp_path: Path) -> None:
    def best(cells: Sequence[Cell], rows: pd.DataFrame) -> Iterator[Done]:
        yield from (Done(cell, [scored(cell, 0.1 * len(rows))]) for cell in cells)

    frame = Frame(tmp_path, study(run=best))
    running.run(frame, say=lambda line: None)
    assert frame.rows()["score"].tolist() == pytest.approx([0, 0, 0.2, 0.2, 0.4, 0.4])


def test_a_line_that_was_not_finished_is_no_cell(tmp_path: Path) -> None:
    frame = Frame(tmp_path, study())
    for cell in CELLS[:2]:
        frame.add(Done(cell, [scored(cell)]))
    path = tmp_path / "cells.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    again = Frame(tmp_path, study())
    assert CELLS[0] in again and CELLS[1] not in again
    again.add(Done(CELLS[1], [scored(CELLS[1])]))
    assert len(Frame(tmp_path, study()).rows()) == 2


def test_a_cell_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    frame = Frame(tmp_path, study())
    with pytest.raises(ValueError, match="JSON"):
        frame.add(Done(CELLS[0], [scored(CELLS[0]), scored(CELLS[0], math.nan)]))
    assert frame.missing() == list(CELLS) and Frame(tmp_path, study()).missing() == list(CELLS)


def test_a_frame_refuses_results_of_other_settings(tmp_path: Path) -> None:
    Frame(tmp_path, study(steps=3, lr=0.1))
    with pytest.raises(BadInput, match=r"steps is 3 there, 4 here"):
        Frame(tmp_path, study(steps=4, lr=0.1))
    with pytest.raises(BadInput, match="layers"):
        Frame(tmp_path, study(steps=3, lr=0.1, layers=2))


def test_settings_compare_as_json_does(tmp_path: Path) -> None:
    Frame(tmp_path, study(ks=(0.5, 1.0)))
    Frame(tmp_path, study(ks=(0.5, 1.0)))  # a tuple is a list on disk
    assert json.loads((tmp_path / "settings.json").read_text())["ks"] == [0.5, 1.0]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="file"):
        Frame(tmp_path / "file", study())


def test_the_time_left_goes_by_what_cells_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = [0.0], list[str]()
    monkeypatch.setattr(running.time, "perf_counter", lambda: clock[0])

    def slow(cells: Sequence[Cell], rows: pd.DataFrame) -> Iterator[Done]:
        clock[0] += 60.0
        yield Done(cells[0], [])

    one, two, three = (replace(cell, group="", cost=cost) for cell, cost in zip(CELLS, (1.0, 1.0, 8.0), strict=False))
    frame = Frame(tmp_path, study((one, two, three), slow))
    frame.add(Done(one, []))  # what was there before tells nothing of the speed now
    running.run(frame, say=said.append)
    assert said == [f"[2/3] {two.name} done; about 8 min left", f"[3/3] {three.name} done; about 0 min left"]


def test_views_are_paired_by_seed() -> None:
    scores = {"one": {0: 0.5, 1: 0.7, 2: 0.6}, "two": {0: 0.4, 1: 0.5}}
    rows = pd.DataFrame(
        [
            {"method": method, "seed": seed, "task": task, "score": score + shift}
            for method, seeds in scores.items()
            for seed, score in seeds.items()
            for task, shift in (("rte", 0.1), ("qnli", -0.1))
        ]
    )
    found = tables.by_seed(rows, "method", ("qnli", "rte"))
    assert list(found.columns) == ["qnli", "rte", "mean"]
    assert tables.interval(found, "one").mean == pytest.approx(0.6)
    ahead = tables.gain(found, "one", "two")  # of the seeds that both have
    assert ahead.mean == pytest.approx(0.15) and ahead.count == 2
    texts = tables.means(found)
    assert list(texts.index) == ["one", "two"] and texts.loc["two", "rte"].startswith("0.550 ±")
    with pytest.raises(ValueError, match="duplicate"):
        tables.by_seed(pd.concat([rows, rows]), "method", ("qnli", "rte"))


def test_mean_has_students_interval(seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=5).tolist()
    found = intervals.mean(values)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert found.mean - found.half_width == pytest.approx(low)
    assert found.mean + found.half_width == pytest.approx(high)
    assert found.count == 5


def test_one_value_has_no_interval() -> None:
    found = intervals.mean([0.25])
    assert found.mean == 0.25 and math.isnan(found.half_width) and str(found) == "0.250"
    assert str(intervals.mean([0.2, 0.2])) == "0.200 ± 0.000"
    assert not found.settled and found.signed == "+0.250"


def test_a_difference_is_settled_where_its_interval_excludes_0() -> None:
    above, below, neither = (intervals.mean(values) for values in ([0.2, 0.3], [-0.21, -0.2], [-0.1, 0.1]))
    assert not above.settled and below.settled and not neither.settled  # one degree of freedom: ± 12.7 standard errors
    assert below.signed == "-0.205 ± 0.064"


def test_paired_is_the_interval_of_differences(seed: int) -> None:
    generator = np.random.default_rng(seed)
    seeds = generator.normal(scale=10, size=6)
    one, other = seeds + 1 + generator.normal(scale=0.01, size=6), seeds
    found = intervals.paired(one.tolist(), other.tolist())
    low, high = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))
    assert found.half_width < 0.1 < intervals.mean(one.tolist()).half_width
    with pytest.raises(ValueError):
        intervals.paired([1.0], [1.0, 2.0])


@pytest.mark.parametrize(("correct", "total"), [(0, 36), (18, 36), (36, 36), (1, 1)])
def test_proportion_is_wilsons(correct: int, total: int) -> None:
    z, p = stats.norm.ppf(0.975), correct / total
    centre = (p + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
    assert intervals.proportion(correct, total) == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_a_table_says_the_same_as_csv_and_as_markdown(tmp_path: Path) -> None:
    table = pd.DataFrame([["from, scaled", 1, 0.123456]], columns=["method", "k", "score"])
    write_table(tmp_path / "new", "scores", table, "What it shows.")
    with (tmp_path / "new" / "scores.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["method", "k", "score"], ["from, scaled", "1", "0.1235"]]
    assert (tmp_path / "new" / "scores.md").read_text().splitlines() == [
        "What it shows.",
        "",
        "| method | k | score |",
        "| --- | --- | --- |",
        "| from, scaled | 1 | 0.1235 |",
    ]


# Two-sided 95 % quantiles of Student's t as tables print them, and Wilson's bounds by their closed form: scipy's change
# would move every interval that is published.
@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706205), (2, 4.302653), (4, 2.776445), (9, 2.262157)])
def test_students_t_is_that_of_the_tables(freedom: int, quantile: float) -> None:
    values = [0.0, 2.0 * math.sqrt(freedom)] + [math.sqrt(freedom)] * (freedom - 1)  # their deviation is √2
    half = quantile * math.sqrt(2 / (freedom + 1))
    assert intervals.mean(values).half_width == pytest.approx(half, rel=1e-6)
