"""`python -m simulations.studies paper` from end to end, tiny: what it writes, and going on after it was stopped."""

import csv
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer

from simulations import environment
from simulations.studies import __main__ as command
from simulations.studies.frame import Frame
from simulations.studies.paper import cells, summary
from simulations.studies.paper.grids import rows
from simulations.studies.paper.options import KINDS, PaperOptions
from simulations.studies.running import ready
from simulations.studies.study import Done


@pytest.fixture(scope="module")
def arguments(tiny_model: str, tiny_glue: str) -> dict[str, Any]:
    return {
        "model": tiny_model,
        "glue_dir": tiny_glue,
        "pooling": "mean",
        "seeds": 2,
        "base_steps": 2,
        "steps": "5,2,2",
        "batch_size": 8,
        "max_length": 16,
        "lora_r": 4,
        "candidates": 2,
        "statistics_batches": 1,
        "precision": "float32",
        "processes": 1,
        "quick": False,
        "report": False,
    }


@pytest.fixture(scope="module")
def done(arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run that was stopped on the way and started again."""
    out = tmp_path_factory.mktemp("paper") / "out"
    real, calls = cells.search, []

    def stopped(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "search", stopped)
        with pytest.raises(KeyboardInterrupt):
            command.paper(out=str(out), **arguments)
    kept = (out / "work" / "cells.jsonl").read_text()
    assert kept.count("\n") == 7  # the base, four trainings, two searches
    command.paper(out=str(out), **arguments)
    assert (out / "work" / "cells.jsonl").read_text().startswith(kept), "finished work was done again"
    return out


def lines(out: Path) -> dict[str, dict[str, Any]]:
    """Return every cell that is kept, by its name."""
    found = map(json.loads, (out / "work" / "cells.jsonl").read_text().splitlines())
    return {cell["cell"]: cell for cell in found}


def part(out: Path, kind: str, name: str, split: str = "reported") -> pd.DataFrame:
    """Return the rows of one part of the study."""
    every = pd.DataFrame([row for cell in lines(out).values() for row in cell["rows"]])
    return every[(every["kind"] == kind) & (every["part"] == name) & (every["split"] == split)]


def table(out: Path, name: str) -> list[dict[str, str]]:
    with (out / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_table_and_picture_is_there(done: Path) -> None:
    tables = ("table3", "table5-alpha", "table6-k", "figure5-k", "figure4-checkpoints", "wilson", "search", "scores")
    pictures = ("table3", "table5-alpha", "figure5-k", "figure4-checkpoints", "interference", "cosines", "layers")
    for kind in KINDS:
        for name in (*tables, "interference", "interference-correlation"):
            assert (done / f"{name}-{kind}.csv").is_file() and (done / f"{name}-{kind}.md").is_file()
        for name in pictures:
            assert (done / f"{name}-{kind}.png").stat().st_size > 5000
    page = (done / "results.md").read_text()
    assert "CPU minutes" in page and "python -m simulations.studies paper" in page and "seeds 2" in page
    assert str(done) not in page and "glue" not in page


def test_table_3_holds_what_the_cells_say(done: Path) -> None:
    for kind in KINDS:
        texts = {line["method"]: line for line in table(done, f"table3-{kind}")}
        scores = {(line["method"], line["seed"], line["task"]): line for line in table(done, f"scores-{kind}")}
        for row in part(done, kind, "search").itertuples():
            assert int(scores[row.method, str(row.seed), row.task]["right"]) == round(row.score * row.n)
        for (method, task), score in part(done, kind, "search").groupby(["method", "task"])["score"].mean().items():
            assert texts[method][task].startswith(f"{score:.3f} ±")
        bounds = part(done, kind, "bounds").set_index(["method", "seed", "task"])
        right = (bounds.score * bounds.n).round()
        assert int(scores["base head", "0", "rte"]["right"]) == right["base head", 0, "rte"]
        assert int(scores["each task by its own", "0", "wnli"]["right"]) == right["WNLI alone", 0, "wnli"]
        assert texts["each task by its own"]["mean"].count("±") == 1
        assert list(texts)[: len(bounds.index.unique(level=0))][0] == "constant answer"


def test_what_was_chosen_was_best_on_the_validation_half(done: Path) -> None:
    for kind in KINDS:
        tried, chosen = part(done, kind, "search", "validation"), part(done, kind, "search")
        assert set(chosen.method) == {row.label for row in rows(kind)}
        assert set(tried.n) == set(chosen.n) == {15}
        means = tried.groupby(["method", "seed", "setting"])["score"].mean()
        for (method, seed), setting in chosen.groupby(["method", "seed"])["setting"].first().items():
            assert len(means[method, seed]) == 2
            assert means[method, seed, setting] == pytest.approx(means[method, seed].max())


def test_the_sweeps_meet_the_search_where_the_settings_do(done: Path) -> None:
    """FroM at the k that the search chose has the sweep's scores, whoever computed them."""
    for kind in KINDS:
        sweep = part(done, kind, "k")
        assert sorted(set(sweep.value)) == [0.0, 0.125, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0, 4.0, 8.0]
        columns = ["seed", "setting", "task", "score"]
        found = part(done, kind, "search")[lambda every: every.method == "from"][columns]
        both = found.merge(sweep[columns], on=["seed", "setting", "task"])
        assert len(both) and (both.score_x == both.score_y).all()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the pictures out: they take longer than all else."""
    monkeypatch.setattr(summary.figures, "draw_all", lambda found, folder: None)
    monkeypatch.setattr(summary.heatmaps, "draw", lambda found, folder: None)


def untimed(cell: dict[str, Any]) -> dict[str, Any]:
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in cell["rows"]]
    return {**cell, "rows": rows, "seconds": 0, "cpu-seconds": 0}


@pytest.mark.usefixtures("undrawn")
def test_a_removed_cell_is_done_again_and_alone(done: Path, arguments: dict[str, Any], capsys: Any) -> None:
    name = "search/full/1/ties = knots-ties"
    before, path = lines(done), done / "work" / "cells.jsonl"
    kept = [line for line in path.read_text().splitlines(True) if json.loads(line)["cell"] != name]
    path.write_text("".join(kept))
    command.paper(out=str(done), **arguments)
    said = [line for line in capsys.readouterr().out.splitlines() if "done; about" in line]
    assert len(said) == 1 and name in said[0]
    assert untimed(lines(done)[name]) == untimed(before[name])


def test_other_settings_are_refused(done: Path, arguments: dict[str, Any], capsys: Any) -> None:
    with pytest.raises(typer.Exit) as stopped:
        command.paper(out=str(done), **{**arguments, "lora_lr": 0.5})
    assert stopped.value.exit_code == 2
    assert "lora_lr" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_a_report_is_of_whole_seeds_only(done: Path, arguments: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "settings.json").write_bytes((done / "work" / "settings.json").read_bytes())
    path = tmp_path / "work" / "cells.jsonl"
    left = [
        json.dumps(cell) + "\n"
        for name, cell in lines(done).items()
        if "/lora/" not in name and name != "k/full/1/from"
    ]
    path.write_text("".join(left))
    arguments = {**arguments, "report": True}
    command.paper(out=str(tmp_path), **arguments)
    assert not list(tmp_path.glob("*-lora.*"))
    assert {line["seed"] for line in table(tmp_path, "scores-full")} == {"0"}
    assert "±" not in (tmp_path / "table3-full.csv").read_text()
    path.write_text("".join(line for line in left if "/full/0/" not in line))
    with pytest.raises(typer.Exit):
        command.paper(out=str(tmp_path), **arguments)
    assert "no seed is finished" in capsys.readouterr().err


def test_the_command_line_that_is_named_is_of_no_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["studies", "paper", "--seeds", "2", "--glue-dir", "/data", "--report", "--out", "/tmp/x", "--model", "a b"]
    monkeypatch.setattr(environment.sys, "argv", line)
    assert environment.command("python -m x paper") == "python -m x paper --seeds 2 --model 'a b'"
    monkeypatch.setattr(environment.sys, "argv", ["full", "--mergekit", "/bin/python", "--out=/tmp/x", "--quick"])
    assert environment.command("python -m y") == "python -m y --mergekit PATH --quick"


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_several_processes_give_the_same(done: Path, arguments: dict[str, Any], tmp_path: Path) -> None:
    command.paper(out=str(tmp_path), **{**arguments, "processes": 2})
    mine, other = lines(tmp_path), lines(done)
    assert mine.keys() == other.keys()
    assert all(untimed(mine[name]) == untimed(other[name]) for name in mine)


def test_no_cell_starts_before_what_it_needs(tmp_path: Path) -> None:
    study = cells.study(PaperOptions(seeds=2), tmp_path)
    frame, left, seen = Frame(tmp_path, study), [[cell] for cell in study.cells], list[str]()
    while left:
        now = ready(left, frame)
        assert now, "nothing can start"
        for (cell,) in now:
            assert set(cell.needs) <= set(seen)
            left.remove([cell])
        for (cell,) in now:
            frame.add(Done(cell, []))
            seen.append(cell.name)
    assert seen[:2] == ["train/base/0/mnli", "train/base/1/mnli"]
