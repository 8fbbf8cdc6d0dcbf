"""`fedfrom merge --tune` of sequence classifiers, against PEFT and against every scale of the grid."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedfrom import cli, merge
from fedfrom.tuning.halving import scales
from tests.folders import config_of, load
from tests.tuning.conftest import Trained, read_csv, words_of, write_csv

PREFIX = "base_model.model."


def tuned(capsys: Any, *arguments: str) -> str:
    """Run a command that has to succeed; return what it printed, without the lines of progress."""
    capsys.readouterr()
    code = cli.run(["merge", *arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def logits(base: Path, adapter: Path, classes: int, rows: Path) -> np.ndarray:
    """Return what PEFT's model says of each row, one by one."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=classes)
    model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.inference_mode():
        found = [model(**tokenizer(row["text"], return_tensors="pt")).logits[0] for row in read_csv(rows)]
    return torch.stack(found).double().numpy()


def labels(rows: Path) -> np.ndarray:
    return np.array([int(row["label"]) for row in read_csv(rows)])


def accuracy(outputs: np.ndarray, right: np.ndarray) -> float:
    return float((outputs.argmax(1) == right).mean())


def constant(right: np.ndarray) -> float:
    return float(np.bincount(right).max() / len(right))


@pytest.fixture(scope="module")
def merged(classifiers: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "out"
    assert cli.run(["merge", str(out), *classifiers.inputs, *classifiers.tune]) == 0
    return out


def test_shares_are_those_of_pefts_models(merged: Path, classifiers: Trained) -> None:
    record = json.loads((merged / "tuning.json").read_text())
    shares = []
    for place, known in enumerate(record["inputs"]):
        name, rows, classes = classifiers.adapters[place].name, classifiers.rows[place], classifiers.classes[place]
        right = labels(rows)
        own = accuracy(logits(classifiers.base, classifiers.adapters[place], classes, rows), right)
        found = accuracy(logits(classifiers.base, merged / "heads" / name, classes, rows), right)
        assert known["own"] == own > constant(right) + 0.1, "the adapter learnt its task"
        assert known["constant"] == constant(right) and known["merged"] == found
        shares.append((found - constant(right)) / (own - constant(right)))
        assert known["share"] == pytest.approx(shares[-1])
    best = record["methods"][record["chosen"]]
    assert best["share"] == pytest.approx(np.mean(shares))
    assert best["share"] == max(method["share"] for method in record["methods"])


def test_the_scale_is_the_best_of_the_grid(merged: Path, classifiers: Trained, tmp_path: Path) -> None:
    """The rows are few enough that every scale is tried on all: see `Data.first`."""
    from peft import PeftModel  # noqa: F401 - needed by `logits`
    from safetensors.torch import save_file

    record = json.loads((merged / "tuning.json").read_text())
    average = record["methods"][0]
    assert average["method"] == "average"
    states = [{k: t for k, t in load(path).items() if "lora_" in k} for path in classifiers.adapters]
    configs = [config_of(path) for path in classifiers.adapters]
    by_scale = {}
    for scale in scales(9):
        body, report = merge(states, method="average", configs=configs, server_lr=scale)
        kept = []
        for known, path, rows, classes in zip(
            record["inputs"], classifiers.adapters, classifiers.rows, classifiers.classes, strict=True
        ):
            place = tmp_path / f"{scale}-{path.name}"
            place.mkdir()
            head = {k: t for k, t in load(path).items() if "lora_" not in k}
            save_file({**body, **head}, place / "adapter_model.safetensors", metadata={"format": "pt"})
            (place / "adapter_config.json").write_text(json.dumps(report.config))
            score = accuracy(logits(classifiers.base, place, classes, rows), labels(rows))
            kept.append((score - known["constant"]) / (known["own"] - known["constant"]))
        by_scale[scale] = float(np.mean(kept))
    best = max(by_scale, key=lambda scale: (by_scale[scale], -scale))
    assert average["scale"] == best and average["share"] == pytest.approx(by_scale[best])
    assert {trial["scale"]: pytest.approx(trial["merit"]) for trial in average["trials"]} == by_scale


def test_the_folder_is_what_merging_with_the_chosen_method_and_scale_gives(merged: Path, classifiers: Trained) -> None:
    record = json.loads((merged / "tuning.json").read_text())
    best = record["methods"][record["chosen"]]
    states = [{k: t for k, t in load(path).items() if "lora_" in k} for path in classifiers.adapters]
    configs = [config_of(path) for path in classifiers.adapters]
    expected, report = merge(states, method=best["method"], configs=configs, server_lr=best["scale"], **best["options"])
    found = load(merged)
    assert found.keys() == expected.keys(), "no head: they differ in shape"
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert config_of(merged) == report.config
    for path in classifiers.adapters:
        inner = load(merged / "heads" / path.name)
        own = {k: t for k, t in load(path).items() if "lora_" not in k}
        assert own and all(torch.equal(inner[key], tensor) for key, tensor in own.items())
        assert all(torch.equal(inner[key], tensor) for key, tensor in expected.items())
    card = (merged / "README.md").read_text()
    assert "rows that were tuned on" in card and "## Tuned" in card and "heads/topic/" in card


def test_what_is_printed(classifiers: Trained, tmp_path: Path, capsys: Any) -> None:
    arguments = [*classifiers.inputs, *classifiers.tune, "--method", "tsv"]
    out = tuned(capsys, str(tmp_path / "out"), *arguments)
    record = json.loads((tmp_path / "out" / "tuning.json").read_text())
    assert [method["method"] for method in record["methods"]] == ["average", "tsv"] and record["chosen"] == 1
    gain, average = record["less the average"], record["methods"][0]
    if abs(gain["difference"]) <= gain["standard error"]:
        assert f"The scaled average is as good: it keeps {average['share']:.3f}" in out
    else:
        assert f"at scale {average['scale']:g}; the difference's standard error" in out
    assert "The heads differ in names or shapes, so OUT itself has the merged body alone" in out
    assert "Scores are on the rows that were tuned on" in out
    for known in record["inputs"]:
        assert f"{known['own']:.3f}" in out and f"{known['share']:.3f}" in out
    # a second run replaces it, and refuses where a file was added under heads/
    again = [str(tmp_path / "out"), *arguments, "--server-lr", "2"]
    tuned(capsys, *again, "--force")
    record = json.loads((tmp_path / "out" / "tuning.json").read_text())
    assert {trial["scale"] for method in record["methods"] for trial in method["trials"]} == {2.0}
    (tmp_path / "out" / "heads" / "mine.txt").write_text("x")
    assert cli.run(["merge", *again, "--force"]) == 2
    assert "heads/mine.txt" in capsys.readouterr().err


def test_many_rows_are_halved_and_end_where_all_of_them_would(
    classifiers: Trained, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedfrom.tuning.scoring._FIRST", 30)
    tuned(capsys, str(tmp_path / "out"), *classifiers.inputs, *classifiers.tune, "--method", "average")
    (average,) = json.loads((tmp_path / "out" / "tuning.json").read_text())["methods"]
    rungs = [trial["rows"] for trial in average["trials"]]
    assert rungs == ["first"] * 9 + ["all"] * 4
    last = [trial for trial in average["trials"] if trial["rows"] == "all"]
    assert average["share"] == max(trial["merit"] for trial in last)
    tuned(
        capsys,
        str(tmp_path / "one"),
        *classifiers.inputs,
        *classifiers.tune,
        "--method",
        "average",
        "--server-lr",
        str(average["scale"]),
    )
    (one,) = json.loads((tmp_path / "one" / "tuning.json").read_text())["methods"]
    assert one["share"] == pytest.approx(average["share"]), "first rows and the others are all rows"


def cross_entropy(outputs: np.ndarray, right: np.ndarray) -> float:
    shifted = outputs - outputs.max(1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(right)), right]).mean())


def test_a_refitted_bias_lowers_cross_entropy(classifiers: Trained, tmp_path: Path, capsys: Any) -> None:
    fixed = [*classifiers.inputs, *classifiers.tune, "--method", "average", "--server-lr", "1"]
    tuned(capsys, str(tmp_path / "plain"), *fixed)
    out = tuned(capsys, str(tmp_path / "refit"), *fixed, "--refit-bias")
    assert "bias refitted" in out
    record = json.loads((tmp_path / "refit" / "tuning.json").read_text())
    for place, path in enumerate(classifiers.adapters):
        right = labels(classifiers.rows[place])
        found: dict[str, np.ndarray] = {}
        states: dict[str, dict[str, Tensor]] = {}
        for kind in ("plain", "refit"):
            folder = tmp_path / kind / "heads" / path.name
            found[kind] = logits(classifiers.base, folder, classifiers.classes[place], classifiers.rows[place])
            states[kind] = load(folder)
        moved = {key for key in states["plain"] if not torch.equal(states["plain"][key], states["refit"][key])}
        assert moved == {PREFIX + "classifier.bias"}
        assert cross_entropy(found["refit"], right) < cross_entropy(found["plain"], right)
        assert record["inputs"][place]["merged"] == accuracy(found["refit"], right)


def test_a_regression_head_is_scored_by_rank(classifiers: Trained, tmp_path: Path, capsys: Any) -> None:
    from peft import LoraConfig, get_peft_model
    from scipy.stats import spearmanr
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer, generator = AutoTokenizer.from_pretrained(classifiers.base), random.Random(0)
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(classifiers.base, num_labels=1)
    lora = LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=["query", "value"])
    model = get_peft_model(model, lora)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-2)
    for _ in range(30):
        words = [words_of(generator) for _ in range(32)]
        tokens = tokenizer([" ".join(each) for each in words], padding=True, return_tensors="pt")
        right = torch.tensor([float(len(each)) for each in words])
        model(**tokens, labels=(right - 5.5) / 2).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(tmp_path / "rank")
    words = [words_of(generator) for _ in range(40)]
    rows = write_csv(tmp_path / "rank.csv", ["text", "score"], [[" ".join(each), len(each) / 2] for each in words])
    out = tuned(
        capsys, str(tmp_path / "out"), str(tmp_path / "rank"), classifiers.inputs[0], "--tune", str(rows),
        *classifiers.tune[:2], "--method", "average", "--refit-bias",
    )  # fmt: skip
    record = json.loads((tmp_path / "out" / "tuning.json").read_text())
    right = [len(each) for each in words]
    for kind, folder in {"own": tmp_path / "rank", "merged": tmp_path / "out" / "heads" / "rank"}.items():
        found = spearmanr(logits(classifiers.base, folder, 1, rows)[:, 0], right)[0]
        assert record["inputs"][0][kind] == pytest.approx(found, abs=0.01)  # float32's order of near ties
    assert record["inputs"][0]["constant"] == 0 and "Spearman" in out
    key = PREFIX + "classifier.bias"
    same = [load(tmp_path / name)[key] for name in ("rank", "out/heads/rank")]
    assert torch.equal(*same), "there is no class to fit a bias to"


def test_heads_that_agree_are_merged_too(classifiers: Trained, tmp_path: Path, capsys: Any) -> None:
    """One file for both, of the first one's task: the other's adapter is no better than a constant answer there."""
    first, last = classifiers.inputs[0], classifiers.inputs[2]
    out = tuned(capsys, str(tmp_path / "out"), first, last, "--tune", str(classifiers.rows[0]), "--method", "average")
    assert f"Left out of the mean: {last}, whose own adapter is not better than a constant answer" in out
    assert "OUT itself has the inputs' heads merged into one" in out
    state, one, other = load(tmp_path / "out"), load(first), load(last)
    key = PREFIX + "classifier.weight"
    torch.testing.assert_close(state[key], (one[key] + other[key]) / 2)
    assert torch.equal(load(tmp_path / "out" / "heads" / "length")[key], other[key])
    record = json.loads((tmp_path / "out" / "tuning.json").read_text())
    assert record["inputs"][1]["share"] is None
    # scored as PEFT's model of OUT is
    found = accuracy(logits(classifiers.base, tmp_path / "out", 2, classifiers.rows[0]), labels(classifiers.rows[0]))
    assert record["merged head"] == found and f"and scores {found:.3f} on these rows" in out
    # the merged head is what fedfrom merge alone gives
    scale = record["methods"][0]["scale"]
    tuned(capsys, str(tmp_path / "alone"), first, last, "--method", "average", "--server-lr", str(scale))
    alone = load(tmp_path / "alone")
    assert alone.keys() == state.keys() and all(torch.equal(alone[key], state[key]) for key in alone)
