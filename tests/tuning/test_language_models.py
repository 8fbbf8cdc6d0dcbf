"""`fedfrom merge --tune` of causal language models: the score is the mean loss of a token."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedfrom import cli, merge
from fedfrom.tuning.halving import scales
from tests.folders import config_of, load
from tests.tuning.conftest import Trained


def token_loss(base: Path, adapter: Path | None, rows: Path) -> float:
    """Return PEFT's model's mean loss over the tokens of all texts, a text at a time."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    total = count = 0.0
    with torch.inference_mode():
        for line in rows.read_text().splitlines():
            ids = tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"]
            tokens = ids.shape[1] - 1
            total += float(model.eval()(input_ids=ids, labels=ids).loss) * tokens
            count += tokens
    return total / count


@pytest.fixture(scope="module")
def merged(language_models: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "out"
    assert cli.run(["merge", str(out), *language_models.inputs, *language_models.tune]) == 0
    return out


def test_shares_are_those_of_pefts_models(merged: Path, language_models: Trained) -> None:
    record = json.loads((merged / "tuning.json").read_text())
    shares = []
    for known, adapter, rows in zip(record["inputs"], language_models.adapters, language_models.rows, strict=True):
        base = token_loss(language_models.base, None, rows)
        own, found = (token_loss(language_models.base, path, rows) for path in (adapter, merged))
        assert own < base - 0.5, "the adapter learnt its texts"
        expected = {"own": -own, "constant": -base, "merged": -found}
        for name, loss in expected.items():
            assert known[name] == pytest.approx(loss, rel=1e-4)  # float32, another order of rows
        shares.append((base - found) / (base - own))
        assert known["share"] == pytest.approx(shares[-1], abs=1e-4)
    best = record["methods"][record["chosen"]]
    assert best["share"] == pytest.approx(np.mean(shares), abs=1e-4)
    assert not (merged / "heads").exists()


def test_the_scale_is_the_best_of_the_grid(merged: Path, language_models: Trained, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    record = json.loads((merged / "tuning.json").read_text())
    average = record["methods"][0]
    states = [load(path) for path in language_models.adapters]
    configs = [config_of(path) for path in language_models.adapters]
    by_scale = {}
    for scale in scales(9):
        body, report = merge(states, method="average", configs=configs, server_lr=scale)
        place = tmp_path / str(scale)
        place.mkdir()
        save_file(body, place / "adapter_model.safetensors", metadata={"format": "pt"})
        (place / "adapter_config.json").write_text(json.dumps(report.config))
        kept = [
            (token_loss(language_models.base, place, rows) + known["constant"]) / (known["constant"] - known["own"])
            for known, rows in zip(record["inputs"], language_models.rows, strict=True)
        ]
        by_scale[scale] = float(np.mean(kept))
    assert average["scale"] == max(by_scale, key=lambda scale: by_scale[scale])
    for trial in average["trials"]:
        assert trial["merit"] == pytest.approx(by_scale[trial["scale"]], abs=1e-3)


def test_one_file_of_plain_text_for_all(language_models: Trained, tmp_path: Path, capsys: Any) -> None:
    rows = tmp_path / "rows.txt"
    texts = [json.loads(line)["text"] for path in language_models.rows for line in path.read_text().splitlines()]
    rows.write_text("\n\n".join(texts) + "\n")
    arguments = ["merge", str(tmp_path / "out"), *language_models.inputs, "--tune", str(rows), "--method", "ties"]
    assert cli.run(arguments) == 0
    out = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "tuning.json").read_text())
    first, second = record["inputs"]
    assert first["count"] == second["count"] == len(texts) and first["merged"] == second["merged"]
    assert "base model" in out and "token loss" in out


def test_saved_modules_of_language_models_are_scored_as_they_are_merged(
    language_models: Trained, tmp_path: Path
) -> None:
    """An adapter that saved its final norm whole: with --base the norm moves with the scale, as the factors do."""
    from safetensors.torch import save_file

    base = load(language_models.base)
    inputs = []
    for place, path in enumerate(language_models.adapters):
        folder = tmp_path / path.name
        folder.mkdir()
        moved = base["transformer.ln_f.weight"] + 0.1 * (place + 1)
        bias = base["transformer.ln_f.bias"]
        saved = {"base_model.model.transformer.ln_f.weight": moved, "base_model.model.transformer.ln_f.bias": bias}
        state = {**load(path), **saved}
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps({**config_of(path), "modules_to_save": ["ln_f"]}))
        inputs.append(str(folder))
    out = tmp_path / "out"
    arguments = [*inputs, *language_models.tune, "--base", str(language_models.base), "--method", "average"]
    assert cli.run(["merge", str(out), *arguments, "--server-lr", "2"]) == 0
    record = json.loads((out / "tuning.json").read_text())
    norm = load(out)["base_model.model.transformer.ln_f.weight"]
    torch.testing.assert_close(norm, base["transformer.ln_f.weight"] + 2 * 0.15)
    for known, rows in zip(record["inputs"], language_models.rows, strict=True):
        assert known["merged"] == pytest.approx(-token_loss(language_models.base, out, rows), rel=1e-4)
