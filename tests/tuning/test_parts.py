"""Files of rows, scores and their standard errors, names of folders: each part by itself."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from fedfrom.files.heads import folder_names
from fedfrom.tuning.answers import ACCURACY, LOSS, SPEARMAN, Answers
from fedfrom.tuning.choice import Difference, Input, difference, mean_share
from fedfrom.tuning.refit import bias_key
from fedfrom.tuning.rows import class_numbers, read_rows, real_numbers

GLUE = {
    "SST-2": ("sentence\tlabel", 'a "fine film\t1', ('a "fine film', None, "1")),
    "MRPC": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "0\t7\t8\tone\ttwo", ("one", "two", "0")),
    "QQP": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "0\t1\t2\tone\ttwo\t1", ("one", "two", "1")),
    "QNLI": ("index\tquestion\tsentence\tlabel", "0\tone\ttwo\tentailment", ("one", "two", "entailment")),
    "RTE": ("index\tsentence1\tsentence2\tlabel", "0\tone\ttwo\tentailment", ("one", "two", "entailment")),
    "STS-B": ("index\tsentence1\tsentence2\tscore", "0\tone\ttwo\t3.25", ("one", "two", "3.25")),
}


@pytest.mark.parametrize("task", GLUE)
def test_glues_files_are_read_as_they_are(task: str, tmp_path: Path) -> None:
    header, line, expected = GLUE[task]
    (tmp_path / "dev.tsv").write_text(f"\ufeff{header}\n{line}\n{line}\n")
    rows = read_rows(str(tmp_path / "dev.tsv"))
    assert rows.labels is not None and len(rows) == 2 and rows.lines == [2, 3]
    assert (rows.texts[0], None if rows.pairs is None else rows.pairs[0], rows.labels[0]) == expected


def test_csv_and_json_lines_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,text_pair,label\n"one, or\ntwo",three,1\nfour,five,0\n')
    (tmp_path / "a.jsonl").write_text(
        '{"text": "one, or\\ntwo", "text_pair": "three", "label": 1}\n\n'
        '{"text": "four", "text_pair": "five", "label": 0}\n'
    )
    one, other = read_rows(str(tmp_path / "a.csv")), read_rows(str(tmp_path / "a.jsonl"))
    assert one.texts == other.texts == ["one, or\ntwo", "four"] and one.pairs == other.pairs == ["three", "five"]
    assert class_numbers(one, 2, {}) == class_numbers(other, 2, {}) == [1, 0]
    assert one.lines == [3, 4] and other.lines == [1, 3]


def test_labels_are_numbers_or_names_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,No\nb,2.0\nc,1\n")
    assert class_numbers(read_rows(str(tmp_path / "a.csv")), 3, {"no": 0, "yes": 1, "maybe": 2}) == [0, 2, 1]
    (tmp_path / "b.csv").write_text("text,score\na,0.5\nb,-2\n")
    assert real_numbers(read_rows(str(tmp_path / "b.csv"))) == [0.5, -2.0]
    (tmp_path / "c.csv").write_text("text,score\na,0.5\nb,inf\n")
    with pytest.raises(ValueError, match=r"c\.csv, line 3: expected a number as label, found 'inf'"):
        real_numbers(read_rows(str(tmp_path / "c.csv")))


def answers(metric: str, seed: int, n: int = 40) -> Answers:
    generator = np.random.default_rng(seed)
    labels: np.ndarray = np.random.default_rng(0).integers(0, 3, n)
    if metric == SPEARMAN:
        return Answers(metric, generator.normal(size=(n, 1)) + labels[:, None], labels.astype(float))
    if metric == LOSS:
        tokens = np.random.default_rng(1).integers(1, 9, n)
        return Answers(metric, np.stack([generator.random(n) * tokens, tokens], 1).astype(float), labels)
    return Answers(metric, generator.normal(size=(n, 3)) + 2 * np.eye(3)[labels], labels)


@pytest.mark.parametrize("metric", [ACCURACY, SPEARMAN, LOSS])
def test_scores_without_each_row_are_scores_of_the_others(metric: str) -> None:
    whole = answers(metric, 1)
    for row, found in enumerate(whole.without_each()):
        kept = np.delete(np.arange(len(whole.labels)), row)
        assert found == pytest.approx(Answers(metric, whole.outputs[kept], whole.labels[kept]).score())
    halves = [Answers(metric, whole.outputs[part], whole.labels[part]) for part in (slice(15), slice(15, None))]
    assert halves[0].followed_by(halves[1]).score() == whole.score()
    spoilt = whole.outputs.copy()
    spoilt[3] = np.nan
    assert Answers(metric, spoilt, whole.labels).score() == -np.inf


def test_scores_are_what_they_are_called() -> None:
    found = answers(SPEARMAN, 1)
    assert found.score() == pytest.approx(spearmanr(found.outputs[:, 0], found.labels)[0]) and found.constant() == 0
    found = answers(LOSS, 1)
    assert found.score() == pytest.approx(-found.outputs[:, 0].sum() / found.outputs[:, 1].sum())
    found = answers(ACCURACY, 1)
    assert found.score() == (found.outputs.argmax(1) == found.labels).mean()
    assert found.constant() == np.bincount(found.labels).max() / 40
    assert Answers(ACCURACY, found.outputs * 0, found.labels).score(np.array([0, 1, 0])) == (found.labels == 1).mean()


def known(rows: str, own: float = 0.9, constant: float = 0.4) -> Input:
    return Input("a", rows, 40, ACCURACY, own, constant)


def test_the_standard_error_is_that_of_the_rows_paired_differences() -> None:
    one, other = answers(ACCURACY, 1), answers(ACCURACY, 2)
    rows = ((one.outputs.argmax(1) == one.labels) * 1.0 - (other.outputs.argmax(1) == other.labels)) / 0.5
    found = difference([known("a")], [one], [other], refit=False)
    assert found.value == pytest.approx(rows.mean()) and found.error == pytest.approx(rows.std(ddof=1) / 40**0.5)
    # two files are independent; two inputs of one file lose their rows together
    two = difference([known("a"), known("b")], [one, one], [other, other], refit=False)
    same = difference([known("a"), known("a")], [one, one], [other, other], refit=False)
    assert two.error == pytest.approx(found.error / 2**0.5) and same.error == pytest.approx(found.error)
    assert difference([known("a")], [one], [one], refit=False) == Difference(0.0, 0.0)
    assert Difference(0.0, 0.0).is_within_error and not Difference(-0.2, 0.1).is_within_error


def test_an_input_no_better_than_a_constant_answer_is_left_out() -> None:
    one, other = answers(ACCURACY, 1), answers(ACCURACY, 2)
    poor = known("b", own=0.4)
    assert not poor.is_counted
    assert mean_share([known("a"), poor], [one, other], refit=False) == pytest.approx((one.score() - 0.4) / 0.5)
    both = difference([known("a"), poor], [one, one], [other, other], refit=False)
    assert both == difference([known("a")], [one], [other], refit=False)


def test_the_bias_is_the_one_beside_the_outputs() -> None:
    head = {
        "classifier.dense.bias": torch.zeros(8),
        "classifier.dense.weight": torch.zeros(8, 8),
        "classifier.out_proj.bias": torch.zeros(3),
        "classifier.out_proj.weight": torch.zeros(3, 8),
    }
    assert bias_key(head, 3) == "classifier.out_proj.bias"
    assert bias_key({"score.weight": torch.zeros(3, 8)}, 3) is None and bias_key({}, 0) is None


def test_folders_have_names_of_their_own() -> None:
    names = ["runs/a", "other/a", "owner/A@v2", "b.c/", "..", "x/a-2"]
    models: list[Any] = [SimpleNamespace(name=name, folder=Path("/f/inner")) for name in names]
    found = folder_names(models)
    assert found[:4] == ["a", "a-2", "A-3", "b-c"] and len({name.lower() for name in found}) == len(names)
    assert all(Path(name).name == name and name not in (".", "..", "") for name in found)


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from fedfrom import cli; cli.run(['merge', '--help']); "
        "print([name for name in ('torch', 'transformers', 'peft', 'rich.table') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--tune" in done.stdout and done.stdout.splitlines()[-1] == "[]"
