"""Whatever is wrong with rows, adapters or options: one sentence on stderr, exit code 2, and no folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from fedfrom import cli
from tests.folders import config_of, load, write_checkpoint
from tests.tuning.conftest import Trained, write_csv

Arguments = list[str]


def refused(capsys: Any, out: Path, arguments: Arguments) -> str:
    """Run a merge that has to end in one line; return it."""
    capsys.readouterr()
    before = sorted(out.parent.iterdir())
    code = cli.run(["merge", str(out), *arguments])
    printed, err = capsys.readouterr()
    lines = err.splitlines()
    assert code == 2 and printed == "" and len(lines) == 1 and lines[0].startswith("error: "), (code, printed, err)
    assert sorted(out.parent.iterdir()) == before, "nothing is left behind"
    return lines[0]


def _file(name: str, text: str) -> Callable[[Path], str]:
    def made(folder: Path) -> str:
        (folder / name).write_text(text)
        return str(folder / name)

    return made


# each in place of the first input's rows: two classes
FILES = {
    "no file": (lambda folder: str(folder / "gone.csv"), "gone.csv: expected a readable file of UTF-8 text, found: No"),
    "another format": (
        _file("rows.xlsx", ""),
        "expected a file of rows, .csv, .tsv, .jsonl or .txt, found 'rows.xlsx'",
    ),
    "no column of text": (
        _file("a.csv", "txet,label\ngood,1\nbad,0\n"),
        "found columns txet, label: did you mean 'text'",
    ),
    "no label": (_file("a.csv", "text\ngood\nbad\n"), "expected a column label beside the text, found none"),
    "a text file": (_file("a.txt", "good\nbad\n"), "expected a column label beside the text, found none"),
    "one row": (_file("a.csv", "text,label\ngood,1\n"), "expected at least two rows, found 1"),
    "an empty file": (_file("a.csv", ""), "expected at least two rows, found 0"),
    "a class too many": (_file("a.csv", "text,label\ngood,1\nbad,2\n"), "line 3: expected a class from 0 to 1"),
    "half a class": (_file("a.csv", "text,label\ngood,1\nbad,0.5\n"), "line 3: expected a class from 0 to 1"),
    "a class by name": (
        _file("a.csv", "text,label\ngood,yes\nbad,no\n"),
        "found 'yes': number the classes as the head",
    ),
    "a blank label": (_file("a.csv", "text,label\ngood,1\nbad,\n"), "line 3: expected a value in column 'label'"),
    "a blank text": (_file("a.csv", "text,label\ngood,1\n ,1\n"), "line 3: expected text in column 'text'"),
    "a cell too many": (_file("a.csv", "text,label\ngood,1\nbad,0,0\n"), "line 3: expected 2 columns"),
    "an open quote": (_file("a.csv", 'text,label\ngood,1\n"bad,0\n'), "expected CSV, found: unexpected end of data"),
    "no JSON": (_file("a.jsonl", '{"text": "good", "label": 1}\n{"text"\n'), "line 2: expected a JSON object"),
    "a JSON list": (_file("a.jsonl", "[1]\n[2]\n"), "line 1: expected a JSON object, found list"),
    "a number for text": (_file("a.jsonl", '{"text": 1, "label": 1}\n' * 2), "line 1: expected text in column 'text'"),
    "one class alone": (_file("a.csv", "text,label\ngood,1\nbad,1\n"), None),
}


@pytest.mark.parametrize("fault", FILES)
def test_a_bad_file(fault: str, classifiers: Trained, tmp_path: Path, capsys: Any) -> None:
    make, expected = FILES[fault]
    name = make(tmp_path)
    arguments = [*classifiers.inputs[:1], "--tune", name]
    if expected is None:  # nothing is better than a constant answer
        expected = "expected an input whose own adapter is better than a constant answer on its rows, found none"
        arguments += ["--method", "average", "--server-lr", "1"]
    assert expected in refused(capsys, tmp_path / "out", arguments)


def _changed(source: str, folder: Path, state: Any = None, **config: Any) -> str:
    """Write a copy of an adapter with other tensors or another config."""
    folder.mkdir()
    save_file(load(source) if state is None else state, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({**config_of(source), **config}))
    return str(folder)


def test_bad_options(classifiers: Trained, tmp_path: Path, capsys: Any) -> None:
    inputs, tune = classifiers.inputs, classifiers.tune
    cases: list[tuple[Arguments, str]] = [
        ([*inputs, *tune[:4]], "expected one file for all inputs, or one an input, 3, found 2"),
        ([*inputs, *tune, "--k", "2"], "--k: expected with --method alone"),
        ([*inputs, *tune, "--server-lr", "safe"], "expected a number with --tune"),
        ([*inputs, *tune, "--max-length", "1"], "--max-length: expected at least 2 tokens, found 1"),
        ([*inputs, *tune, "--method", "factor-average"], "expected a method that merges products"),
        ([*inputs, *tune, "--method", "tise"], "did you mean 'ties'"),
        ([*inputs, *tune, "--method", "regmean"], "needs statistics"),
        ([*inputs, *tune, "--base", str(tmp_path / "gone")], "no such folder"),
        ([*inputs, "--refit-bias"], "--refit-bias: expected with --tune DATA alone"),
        ([*inputs, "--max-length", "9"], "--max-length: expected with --tune DATA alone"),
    ]
    for arguments, expected in cases:
        assert expected in refused(capsys, tmp_path / "out", arguments), arguments
    (tmp_path / "there").mkdir()
    assert "already there" in refused(capsys, tmp_path / "there", [*inputs, *tune])


def test_bad_adapters(classifiers: Trained, language_models: Trained, tmp_path: Path, capsys: Any) -> None:
    first, tune = classifiers.inputs[0], classifiers.tune[:2]
    factors = {key: tensor for key, tensor in load(first).items() if "lora_" in key}
    other = {key.replace("encoder.layer", "encoder.block"): tensor for key, tensor in load(first).items()}
    no_task = _changed(first, tmp_path / "no-task", task_type=None)
    no_base = _changed(first, tmp_path / "no-base", base_model_name_or_path=None)
    gone = _changed(first, tmp_path / "gone", base_model_name_or_path=str(tmp_path / "moved-away"))
    headless = _changed(first, tmp_path / "headless", factors)
    elsewhere = _changed(first, tmp_path / "elsewhere", other)
    model = write_checkpoint(tmp_path / "model", load(classifiers.base))
    texts, labels = str(language_models.rows[0]), str(classifiers.rows[0])
    pairs = str(write_csv(tmp_path / "pairs.csv", ["text", "pair"], [["good", "bad"], ["film", "plot"]]))
    short = str(write_csv(tmp_path / "short.csv", ["text"], [["good"], ["film"]]))
    causal = language_models.inputs[0]
    cases: list[tuple[Arguments, str]] = [
        ([no_task, *tune], "expected task_type SEQ_CLS or CAUSAL_LM in adapter_config.json with --tune, found None"),
        ([no_base, *tune], "--base: expected the model that the adapters were trained on"),
        ([gone, *tune], "moved-away: no such folder; another folder or name can be given as --base"),
        ([headless, *tune], "expected 'classifier.bias', which base model"),
        ([elsewhere, *tune], "encoder.block.0.attention.self.query', which it lacks: give the model that"),
        ([first, *tune, "--base", str(language_models.base)], "expected"),
        ([model, *tune], "expected adapters, found a checkpoint"),
        ([first, causal, "--tune", labels], "expected task_type 'SEQ_CLS'"),
        ([causal, "--tune", texts, "--refit-bias"], "expected a classifier's head with a bias"),
        ([causal, "--tune", pairs], "expected one column of texts for a language model, found pairs"),
        ([causal, "--tune", short], "expected at least two rows of two tokens or more, found 0"),
    ]
    for arguments, expected in cases:
        assert expected in refused(capsys, tmp_path / "out", arguments), arguments


def test_a_failure_while_scoring_leaves_nothing(
    classifiers: Trained, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise RuntimeError("out of memory\nmore")

    monkeypatch.setattr("fedfrom.tuning.network.Network.answer", full)
    code = cli.run(["merge", str(tmp_path / "out"), *classifiers.inputs, *classifiers.tune])
    assert code == 1 and capsys.readouterr().err == "error: out of memory\n"
    assert list(tmp_path.iterdir()) == []


def test_options_from_a_file(classifiers: Trained, tmp_path: Path, capsys: Any) -> None:
    """A list of files under tune is one file an input."""
    config = tmp_path / "merge.yaml"
    rows = "".join(f"  - {path}\n" for path in classifiers.rows[:2])
    config.write_text(f"method: average\nserver-lr: 1\ntune:\n{rows}")
    out = tmp_path / "out"
    assert cli.run(["merge", str(out), *classifiers.inputs[:2], "--config", str(config)]) == 0
    record = json.loads((out / "tuning.json").read_text())
    assert [known["rows"] for known in record["inputs"]] == [str(path) for path in classifiers.rows[:2]]
    command = (out / "README.md").read_text().split("```sh\n")[1].split("\n```")[0]
    shutil.rmtree(out)
    config.unlink()  # the card's command spells the options out
    import shlex

    assert cli.run(shlex.split(command)[1:]) == 0 and (out / "tuning.json").is_file()
