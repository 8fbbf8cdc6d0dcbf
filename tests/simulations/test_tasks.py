"""Tasks: GLUE's layouts, GLUE's numbers, and a held-out set that shares no film with the training set."""

import re
from pathlib import Path

import numpy as np
import pytest

from fedfrom.errors import BadInput
from simulations import glue, tasks
from simulations.options import GLUE_TASKS, GLUE_VARIABLE, NLI_TASKS, Options
from tests.simulations.conftest import write_tsv

PAIRS = {"mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli", *NLI_TASKS}
THREE = {"mnli", *NLI_TASKS}


def load(name: str, folder: str, **more) -> tasks.Task:
    return tasks.load(Options(task=(name,), glue_dir=folder, **more))[0]


@pytest.mark.parametrize("name", [*GLUE_TASKS, *NLI_TASKS])
def test_every_task_is_read_from_its_own_layout(name: str, tiny_glue: str) -> None:
    task = load(name, tiny_glue)
    assert (len(task.train), len(task.held_out)) == (90, 30)
    assert ("pair" in task.train.column_names) == (name in PAIRS)
    assert all(len(text.split()) == 5 for text in task.train["text"])
    assert task.regression == (name == "stsb")
    if task.regression:
        assert set(task.train["label"]) == {0.0, 2.5, 5.0}
    else:
        assert set(task.train["label"]) == set(range(task.num_labels))
        assert task.num_labels == (3 if name in THREE else 2)


def test_entailment_is_class_zero_wherever_there_is_entailment(tiny_glue: str) -> None:
    labels = [load(name, tiny_glue).train["label"] for name in ("qnli", "rte", "wnli")]
    assert list(labels[0]) == list(labels[1]) == list(labels[2])
    assert all(glue.LAYOUTS[name].names[0] == "entailment" for name in ("mnli", "qnli", "rte", "wnli", "snli", "sick"))


def test_quotation_marks_and_tabs_at_the_end_do_not_swallow_rows(tmp_path: Path) -> None:
    for part in ("train", "dev"):
        write_tsv(tmp_path / "SST-2" / f"{part}.tsv", ["sentence", "label"], [['"open', 1], ["plain", 0], ['" x', 1]])
    assert list(load("sst2", str(tmp_path)).train["text"]) == ['"open', "plain", '" x']


def test_broken_lines_are_left_out_and_said(tmp_path: Path) -> None:
    for part in ("train", "dev"):
        write_tsv(tmp_path / "SST-2" / f"{part}.tsv", ["sentence", "label"], [["one", 1], ["two"], ["three", 0]])
    task = load("sst2", str(tmp_path))
    assert list(task.train["text"]) == ["one", "three"]
    assert "1 broken lines left out" in task.source


def test_missing_things_are_named_with_what_to_do(tmp_path: Path, tiny_glue: str) -> None:
    with pytest.raises(BadInput, match="no such folder"):
        load("rte", str(tmp_path / "nowhere"))
    with pytest.raises(BadInput, match=r"task rte: found neither .*RTE.train\.tsv .*--glue-dir"):
        load("rte", str(tmp_path))
    write_tsv(tmp_path / "RTE" / "train.tsv", ["index", "premise", "label"], [[0, "x", "entailment"]])
    with pytest.raises(BadInput, match=r"expected a column 'sentence1', found index, premise, label"):
        load("rte", str(tmp_path))
    write_tsv(tmp_path / "WNLI" / "train.tsv", ["index", "sentence1", "sentence2", "label"], [[0, "x", "y", "maybe"]])
    with pytest.raises(BadInput, match=r"WNLI.train\.tsv: expected a label of 1, 0, found 'maybe'"):
        load("wnli", str(tmp_path))
    (tmp_path / "CoLA").mkdir()
    (tmp_path / "CoLA" / "train.tsv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="can't be read"):
        load("cola", str(tmp_path))


def test_without_a_folder_an_unreachable_hub_says_what_to_do(monkeypatch) -> None:
    monkeypatch.delenv(GLUE_VARIABLE, raising=False)
    with pytest.raises(BadInput, match=r"task rte: can't read nyu-mll/glue .*--glue-dir"):
        glue.from_hub("rte", "train")


def test_a_task_that_is_on_no_hub_asks_for_its_files(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"task sick: give a folder with SICK/train\.tsv \(--glue-dir\)"):
        glue.from_hub("sick", "train")
    write_tsv(tmp_path / "SICK" / "train.tsv", ["sentence1", "sentence2", "label"], [["a", "b", "neutral"]])
    with pytest.raises(BadInput, match=r"task sick: found no .*test\.tsv; put SICK's file there$"):
        load("sick", str(tmp_path))


def test_the_hub_and_the_files_give_the_same(monkeypatch, tiny_glue: str) -> None:
    """The Hub's copy differs in column names and in labels as numbers; both become one form."""
    import datasets

    for name in (*GLUE_TASKS, "snli"):
        expected, _ = glue.from_folder(name, Path(tiny_glue), "train")
        layout = glue.LAYOUTS[name]
        columns = dict(zip(layout.hub, [expected["text"], expected.get("pair")], strict=False))
        numbers = [float(label) for label in expected["label"]]
        if name == "wnli":  # 1 is entailment there
            numbers = [1 - number for number in numbers]
        columns["label"] = numbers if name == "stsb" else [int(number) for number in numbers]
        if name == "snli":  # a pair without a gold label
            columns = {key: [values[0], *values] for key, values in columns.items()}
            columns["label"][0] = -1
        hub = datasets.Dataset.from_dict(columns)
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, hub=hub, **kwargs: hub)
        found, _ = glue.from_hub(name, "train")
        assert {key: found[key] for key in found} == {key: expected[key] for key in found}


def test_tasks_of_one_head_need_equal_classes(tiny_glue: str) -> None:
    with pytest.raises(BadInput, match=re.escape("found rte 2, mnli 3")):
        tasks.load(Options(task=("rte", "mnli"), partition="tasks", glue_dir=tiny_glue))


def test_samples_are_seeded_and_of_the_size_asked_for(tiny_glue: str) -> None:
    first, again = (load("rte", tiny_glue, train_examples=20, eval_examples=7, seed=s) for s in (1, 1))
    other = load("rte", tiny_glue, train_examples=20, eval_examples=7, seed=2)
    assert (len(first.train), len(first.held_out)) == (20, 7)
    assert first.train["index"] == again.train["index"] != other.train["index"]


def test_no_film_is_on_both_sides_of_the_reviews() -> None:
    try:
        first, other = (load("reviews", "", eval_examples=0, seed=s) for s in (0, 1))
    except BadInput as missing:
        pytest.skip(str(missing))
    assert not set(first.train["movie"]) & set(first.held_out["movie"])
    assert len(first.train) + len(first.held_out) == 12_752
    assert len(first.held_out) / 12_752 == pytest.approx(0.2, abs=0.04)
    assert 0.5 < first.baseline < 0.65
    assert set(first.held_out["movie"]) != set(other.held_out["movie"])


SIZES = {
    "rte": (2490, 277),
    "wnli": (635, 71),
    "mrpc": (3668, 408),
    "cola": (8551, 1043),
    "sst2": (67349, 872),
    "stsb": (5749, 1500),
    "qnli": (9999, 5463),
    "mnli": (9999, 9815),
    "snli": (12099, 9829),
    "sick": (4440, 4927),
}


@pytest.mark.parametrize("name", SIZES)
def test_glue_itself_is_read_whole(name: str, glue_dir: Path) -> None:
    if not (glue_dir / glue.LAYOUTS[name].folder).is_dir():
        pytest.skip(f"{glue_dir} has no {glue.LAYOUTS[name].folder}")
    task = load(name, str(glue_dir), eval_examples=0)
    assert (len(task.train), len(task.held_out)) == SIZES[name]
    assert "broken" not in task.source
    assert np.isfinite(task.baseline)
