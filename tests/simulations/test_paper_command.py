"""`python -m simulations.paper` from end to end, tiny: what it writes, and going on after it was stopped."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import typer

from simulations.paper import __main__ as command
from simulations.paper import pieces, report, running
from simulations.paper.grids import rows
from simulations.paper.options import KINDS, TASKS
from simulations.study import Study


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
    }


@pytest.fixture(scope="module")
def done(arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run that was stopped on the way and started again."""
    out = tmp_path_factory.mktemp("paper") / "out"
    real, calls = pieces.search, []

    def stopped(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "search", stopped)
        with pytest.raises(KeyboardInterrupt):
            command.run(out=str(out), **arguments)
    kept = {path: path.stat().st_mtime_ns for path in (out / "work" / "pieces").iterdir()}
    assert len(kept) == 7  # the base, four trainings, two searches
    command.run(out=str(out), **arguments)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items()), "finished work was done again"
    return out


def piece(out: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "work" / "pieces" / f"{name}.json").read_text())
    return found


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
    assert "CPU minutes" in page and "python -m simulations.paper" in page and "seeds 2" in page
    assert str(done) not in page and "glue" not in page


def test_table_3_holds_what_the_pieces_say(done: Path) -> None:
    for kind in KINDS:
        lines = {line["method"]: line for line in table(done, f"table3-{kind}")}
        scores = {(line["method"], line["seed"], line["task"]): line for line in table(done, f"scores-{kind}")}
        for row in rows(kind):
            found = [piece(done, f"{kind}-s{s}-search-{row.name.replace(', ', '-')}") for s in range(2)]
            for task in TASKS:
                shares = [one["reported"][task]["correct"] / one["reported"][task]["total"] for one in found]
                assert lines[row.label][task].startswith(f"{sum(shares) / 2:.3f} ±")
                for seed, one in enumerate(found):
                    assert int(scores[row.label, str(seed), task]["right"]) == one["reported"][task]["correct"]
        bounds = piece(done, f"{kind}-s0-bounds")
        assert int(scores["base head", "0", "rte"]["right"]) == bounds["base"]["rte"]["correct"]
        own = scores["each task by its own", "0", "wnli"]["right"]
        assert int(own) == bounds["wnli"]["wnli"]["correct"]
        assert lines["each task by its own"]["mean"].count("±") == 1


def test_what_was_chosen_was_best_on_the_validation_half(done: Path) -> None:
    for kind in KINDS:
        for row in rows(kind):
            for seed in range(2):
                found = piece(done, f"{kind}-s{seed}-search-{row.name.replace(', ', '-')}")
                assert len(found["candidates"]) == 2
                means = {
                    json.dumps(one["setting"]): sum(s["correct"] / s["total"] for s in one["scores"].values())
                    for one in found["candidates"]
                }
                assert means[json.dumps(found["chosen"])] == pytest.approx(max(means.values()))
                halves = {tuple(s["total"] for s in one["scores"].values()) for one in found["candidates"]}
                assert halves == {(15, 15, 15)}
                assert [found["reported"][task]["total"] for task in TASKS] == [15, 15, 15]


def test_the_sweeps_meet_the_search_where_the_settings_do(done: Path) -> None:
    """FroM at k = 0 is the average, and Task Arithmetic at 1.0 three times it, whoever computed them."""
    for kind in KINDS:
        ks = {point["k"]: point["reported"] for point in piece(done, f"{kind}-s0-k")["points"]}
        assert sorted(ks) == [0.0, 0.125, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0, 4.0, 8.0]
        found = piece(done, f"{kind}-s0-search-from")
        if found["chosen"]["k"] in ks:
            assert found["reported"] == ks[found["chosen"]["k"]]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the pictures out: they take longer than all else."""
    monkeypatch.setattr(report.figures, "draw_all", lambda found, folder: None)
    monkeypatch.setattr(report.heatmaps, "draw", lambda found, folder: None)


@pytest.mark.usefixtures("undrawn")
def test_a_removed_piece_is_done_again_and_alone(done: Path, arguments: dict[str, Any], capsys: Any) -> None:
    name = "full-s1-search-ties"
    before = piece(done, name)
    (done / "work" / "pieces" / f"{name}.json").unlink()
    command.run(out=str(done), **arguments)
    said = [line for line in capsys.readouterr().out.splitlines() if "done; about" in line]
    assert len(said) == 1 and name in said[0]
    after = piece(done, name)
    assert {**after, "took": 0, "seconds": 0} == {**before, "took": 0, "seconds": 0}


def test_other_settings_are_refused(done: Path, arguments: dict[str, Any], capsys: Any) -> None:
    with pytest.raises(typer.Exit) as stopped:
        command.run(out=str(done), **{**arguments, "lora_lr": 0.5})
    assert stopped.value.exit_code == 2
    assert "lora_lr" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_a_report_is_of_whole_seeds_only(done: Path, arguments: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "work" / "pieces").mkdir(parents=True)
    for path in [*(done / "work").glob("*.json"), *(done / "work" / "pieces").iterdir()]:
        if not path.name.startswith(("full-s1-k", "lora-")):
            (tmp_path / path.relative_to(done)).write_bytes(path.read_bytes())
    command.run(out=str(tmp_path), report=True, **arguments)
    assert not list(tmp_path.glob("*-lora.*"))
    assert {line["seed"] for line in table(tmp_path, "scores-full")} == {"0"}
    assert "±" not in (tmp_path / "table3-full.csv").read_text()
    for path in (tmp_path / "work" / "pieces").glob("full-s0-*.json"):
        path.unlink()
    with pytest.raises(typer.Exit):
        command.run(out=str(tmp_path), report=True, **arguments)
    assert "no seed is finished" in capsys.readouterr().err


def test_the_command_line_that_is_named_is_of_no_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["paper", "--seeds", "2", "--glue-dir", "/data", "--report", "--out", "/tmp/x", "--model", "a b"]
    monkeypatch.setattr(report.sys, "argv", line)
    assert report.command() == "python -m simulations.paper --seeds 2 --model 'a b'"


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_several_processes_give_the_same(done: Path, arguments: dict[str, Any], tmp_path: Path) -> None:
    command.run(out=str(tmp_path), **{**arguments, "processes": 2})
    for path in sorted((tmp_path / "work" / "pieces").iterdir()):
        mine, other = (json.loads(where.read_text()) for where in (path, done / path.relative_to(tmp_path)))
        assert {**mine, "took": 0, "seconds": 0} == {**other, "took": 0, "seconds": 0}, path.name


def test_no_piece_starts_before_what_it_needs(arguments: dict[str, Any], tmp_path: Path) -> None:
    options = command.PaperOptions(seeds=2)
    work = {one.name: one for one in pieces.pieces(options)}
    study = Study(tmp_path, {}, list(work), say=lambda line: None)
    seen: list[str] = []
    left = dict(work)
    while left:
        ready = running._ready(left, study)
        assert ready, "nothing can start"
        for one in ready:
            assert set(one.needs) <= set(seen)
            del left[one.name]
        for one in ready:
            study.put(one.name, {})
            seen.append(one.name)
    assert seen[:2] == ["base-s0", "base-s1"]
