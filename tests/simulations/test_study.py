"""What long studies stand on: work kept piece by piece, means with intervals, tables."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fedfrom.pages import intervals
from simulations import study
from simulations.errors import BadInput
from simulations.study import Study
from simulations.tables import write_table

PIECES = ["one", "two", "three"]


def test_a_study_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    first = Study(tmp_path, {"steps": 3}, PIECES)
    assert first.missing() == PIECES and first.get("two") is None
    first.put("two", {"score": 0.5})
    again = Study(tmp_path, {"steps": 3}, PIECES)
    assert again.missing() == ["one", "three"]
    assert again.get("two") == {"score": 0.5}
    assert again.get("one") is None


def test_a_study_refuses_results_of_other_settings(tmp_path: Path) -> None:
    Study(tmp_path, {"steps": 3, "lr": 0.1}, PIECES)
    with pytest.raises(BadInput, match=r"steps is 3 there, 4 here"):
        Study(tmp_path, {"steps": 4, "lr": 0.1}, PIECES)
    with pytest.raises(BadInput, match="layers"):
        Study(tmp_path, {"steps": 3, "lr": 0.1, "layers": 2}, PIECES)


def test_settings_compare_as_json_does(tmp_path: Path) -> None:
    Study(tmp_path, {"ks": (0.5, 1.0)}, PIECES)
    Study(tmp_path, {"ks": (0.5, 1.0)}, PIECES)  # a tuple is a list on disk


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="file"):
        Study(tmp_path / "file", {}, PIECES)


def test_a_piece_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    kept = Study(tmp_path, {}, PIECES)
    with pytest.raises(ValueError, match="JSON"):
        kept.put("one", {"score": math.nan})
    assert kept.missing() == PIECES


def test_the_time_left_goes_by_what_pieces_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = [0.0], []
    monkeypatch.setattr(study.time, "perf_counter", lambda: clock[0])
    costs = {"one": 1.0, "two": 1.0, "three": 8.0}
    kept = Study(tmp_path, {}, PIECES, said.append, costs)
    clock[0] = 60.0
    kept.put("one", {})
    clock[0] = 120.0
    kept.put("two", {})
    assert said == ["[1/3] one done; about 9 min left", "[2/3] two done; about 8 min left"]
    # what was there before tells nothing of the speed now
    later = Study(tmp_path, {}, PIECES, said.append, costs)
    clock[0] = 180.0
    later.put("three", {})
    assert said[-1] == "[3/3] three done; about 0 min left"
    plain: list[str] = []
    even = Study(tmp_path / "even", {}, PIECES, plain.append)
    clock[0] = 240.0
    even.put("one", {})
    assert plain == ["[1/3] one done; about 2 min left"]


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
    write_table(tmp_path / "new", "scores", ["method", "k", "score"], [["from, scaled", 1, 0.123456]], "What it shows.")
    with (tmp_path / "new" / "scores.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["method", "k", "score"], ["from, scaled", "1", "0.1235"]]
    assert (tmp_path / "new" / "scores.md").read_text().splitlines() == [
        "What it shows.",
        "",
        "| method | k | score |",
        "| --- | --- | --- |",
        "| from, scaled | 1 | 0.1235 |",
    ]


def test_settings_file_is_readable(tmp_path: Path) -> None:
    Study(tmp_path, {"steps": 3}, PIECES)
    assert json.loads((tmp_path / "settings.json").read_text()) == {"steps": 3}


# Two-sided 95 % quantiles of Student's t as tables print them, and Wilson's bounds by their closed form: scipy's change
# would move every interval that is published.
@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706205), (2, 4.302653), (4, 2.776445), (9, 2.262157)])
def test_students_t_is_that_of_the_tables(freedom: int, quantile: float) -> None:
    values = [0.0, 2.0 * math.sqrt(freedom)] + [math.sqrt(freedom)] * (freedom - 1)  # their deviation is √2
    half = quantile * math.sqrt(2 / (freedom + 1))
    assert intervals.mean(values).half_width == pytest.approx(half, rel=1e-6)
