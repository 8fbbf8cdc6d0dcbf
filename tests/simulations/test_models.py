"""The model: cut, pooled, adapted at a client's rank, the same in every process."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fedfrom.errors import BadInput
from simulations import models
from simulations.options import Options
from tests.hostile.watch import harmless

TWO = models.Head(2, False)


def options(folder: str, **more) -> Options:
    return Options(model=folder, **{"pooling": "mean", "lora_r": 4, **more})


@pytest.mark.parametrize("pooling", ["mean", "head"])
@pytest.mark.parametrize("full", [False, True])
def test_the_same_options_give_the_same_weights(tiny_model: str, pooling: str, full: bool) -> None:
    asked = options(tiny_model, pooling=pooling, full=full)
    torch.manual_seed(1)
    first = models.build(asked, TWO).state_dict()
    torch.manual_seed(2)
    again = models.build(asked, TWO).state_dict()
    other = models.build(options(tiny_model, pooling=pooling, full=full, seed=5), TWO).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_building_leaves_the_global_generator_alone(tiny_model: str) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    models.build(options(tiny_model), TWO)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("layers", [1, 2])
def test_layers_are_cut_from_the_top(tiny_model: str, layers: int) -> None:
    whole = models.base_model(options(tiny_model), TWO).state_dict()
    cut = models.base_model(options(tiny_model, layers=layers), TWO).state_dict()
    assert {name.split(".")[3] for name in cut if "encoder.layer" in name.replace("encoder.encoder", "encoder")} == {
        str(layer) for layer in range(layers)
    }
    assert all(torch.equal(whole[name], cut[name]) for name in cut)


def test_more_layers_than_there_are_is_an_error(tiny_model: str) -> None:
    with pytest.raises(BadInput, match="--layers 4: .* has 3 layers"):
        models.base_model(options(tiny_model, layers=4), TWO)


def test_padding_changes_no_logit(tiny_model: str) -> None:
    model = models.build(options(tiny_model), TWO).eval()
    ids = torch.tensor([[2, 5, 11, 3]])
    short = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    padded = {name: torch.nn.functional.pad(tensor, (0, 3)) for name, tensor in short.items()}
    torch.testing.assert_close(models.logits(model, short), models.logits(model, padded), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "head"])
def test_adapter_and_head_travel_and_nothing_else(tiny_model: str, pooling: str) -> None:
    state = models.trained_state(models.build(options(tiny_model, pooling=pooling), TWO))
    assert {name.split(".")[-2] for name in state} == {"lora_A", "lora_B", "classifier"}
    assert all(tensor.shape[0] == 4 for name, tensor in state.items() if "lora_A" in name)


def test_full_fine_tuning_sends_every_weight(tiny_model: str) -> None:
    model = models.build(options(tiny_model, full=True), TWO)
    assert models.trained_state(model).keys() == model.state_dict().keys()
    assert not any("pooler" in name for name in model.state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("rslora", [False, True])
def test_clients_of_every_rank_have_one_scaling(tiny_model: str, rslora: bool) -> None:
    asked = options(tiny_model, ranks=(2, 8), rslora=rslora)
    scalings = set()
    for rank in (2, 8):
        model = models.build(asked, TWO, rank)
        layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
        assert layer.r["default"] == rank
        scalings.add(round(layer.scaling["default"], 9))
    assert len(scalings) == 1


def test_dora_and_targets_reach_peft(tiny_model: str) -> None:
    state = models.trained_state(models.build(options(tiny_model, dora=True, lora_targets=("key",)), TWO))
    assert any("lora_magnitude_vector" in name for name in state)
    assert all("key" in name or "classifier" in name for name in state)
    with pytest.raises(BadInput, match="--lora-targets"):
        models.build(options(tiny_model, lora_targets=("nothing",)), TWO)


def test_regression_has_one_output(tiny_model: str) -> None:
    for pooling in ("mean", "head"):
        model = models.build(options(tiny_model, pooling=pooling), models.Head(1, True))
        ids = torch.tensor([[2, 5, 3]])
        assert models.logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).shape == (1, 1)


def test_pooling_follows_the_model(tiny_model: str, tmp_path: Path) -> None:
    assert models.pooling(Options(model=tiny_model)) == "head"
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Pooling"}]))
    assert models.pooling(Options(model=str(tmp_path))) == "mean"
    assert models.pooling(Options(model=str(tmp_path), pooling="head")) == "head"


def test_an_unreadable_model_is_named(tmp_path: Path) -> None:
    for load in (models.tokenizer, lambda asked: models.base_model(asked, TWO)):
        with pytest.raises(BadInput, match="--model") as caught:
            load(options(str(tmp_path)))
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_no_pickle_is_loaded_in_place_of_safetensors(tiny_model: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with harmless(str(folder)), pytest.raises(BadInput, match=r"can't load its model .*model\.safetensors"):
        models.build(options(str(folder)), TWO)


@pytest.mark.parametrize("text", ["[1]", "3", "{", "[" * 100_000, '{"type": "x"}'])
def test_a_list_of_modules_that_is_none(tiny_model: str, tmp_path: Path, text: str) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(BadInput, match=r"modules\.json"):
        models.pooling(Options(model=str(tmp_path)))
