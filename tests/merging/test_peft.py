"""Adapters of real PEFT models: merged, loaded into a fresh model with the config that came out, compared by deltas."""

import copy
import json

import pytest
import torch

from fedfrom import merge
from tests.merging import oracle
from tests.merging.samples import generator

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict  # noqa: E402


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q = torch.nn.Linear(10, 10)
        self.v = torch.nn.Linear(10, 14)


class Net(torch.nn.Module):
    """One of each kind of module; `q` and `v` are also the ends of longer names."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(23, 10)
        self.q = torch.nn.Linear(10, 9)
        self.layers = torch.nn.ModuleList([Attention(), Attention()])
        self.c_fc = transformers.pytorch_utils.Conv1D(12, 10)  # weight (10, 12): fan_in_fan_out
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.norm = torch.nn.BatchNorm1d(10)
        self.head = torch.nn.Linear(10, 2)

    def forward(self, x):
        return self.head(self.embed(x)).sum()


TARGETS = ["embed", "q", "v", "c_fc", "conv"]
BASE = Net().double()


def client(seed, size=1.0, **config):
    """A client's PEFT model with every adapter tensor and saved module perturbed."""
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(BASE), LoraConfig(**{"target_modules": TARGETS, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(size * torch.randn(parameter.shape, dtype=parameter.dtype))
    return model


def state_of(model):
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def adapted(model):
    """Module path -> module, of those with a LoRA adapter."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}


def matrix(module):
    """PEFT's own delta of the effective weight, flattened to two dimensions as the adapter is low-rank in them."""
    delta = module.get_delta_weight("default").detach().double()
    return delta.flatten(1)


def fresh(merged, config):
    """A new model from the base and the report's config, as the written files would give it."""
    read = json.loads(json.dumps(config))
    model = get_peft_model(copy.deepcopy(BASE), LoraConfig(**read))
    result = set_peft_model_state_dict(model, merged)
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora_" in key]
    return model


def assert_merges_to_the_oracle(models, rank=None, k=1.0, limit=1e-6, **options):
    configs = [model.peft_config["default"] for model in models]
    states = [state_of(model) for model in models]
    merged, report = merge(states, configs=configs, rank=rank, k=k, **options)
    model = fresh(merged, report.config)
    by_name = {layer.name: layer for layer in report.layers}
    for name, module in adapted(model).items():
        sent = [matrix(adapted(each)[name]) for each in models]
        zeros = torch.zeros_like(sent[0])
        layer = oracle.Layer(sent, [zeros] * len(sent), zeros)
        w = layer.weights(k)
        assert by_name[name].weights == pytest.approx(w, rel=1e-9), name
        r = by_name[name].rank_out
        T = layer.target(w)
        assert oracle.relative_error(matrix(module), oracle.truncated(T, r)) <= limit, name
        if rank is not None and isinstance(rank, int):
            assert r == rank
    assert adapted(model).keys() == adapted(models[0]).keys()
    return model, merged, report


def test_plain_config_with_alpha_other_than_r():
    assert_merges_to_the_oracle([client(i, r=3, lora_alpha=5) for i in range(3)])


def test_equal_ranks_need_no_configs():
    models = [client(i, r=3, lora_alpha=3) for i in range(2)]
    merged, report = merge([state_of(model) for model in models])
    assert report.config is None
    with_configs, _ = merge([state_of(model) for model in models], configs=[m.peft_config["default"] for m in models])
    assert all(torch.equal(merged[key], with_configs[key]) for key in merged)


@pytest.mark.parametrize("rank", [None, 2, 8])
def test_ranks_alphas_and_rslora_of_their_own(rank):
    models = [
        client(0, r=2, lora_alpha=16),
        client(1, r=5, lora_alpha=3, use_rslora=True),
        client(2, size=0.5, r=4, lora_alpha=1, use_rslora=False),
    ]
    model, _, report = assert_merges_to_the_oracle(models, rank=rank, k=2.0)
    assert report.config["r"] == (rank or 5)


def test_patterns_going_in():
    patterns = {"rank_pattern": {"layers.0.q": 6, "^q": 2, "v": 4}, "alpha_pattern": {"layers.1.q": 9, "conv": 1}}
    models = [client(i, r=3, lora_alpha=5, use_rslora=bool(i % 2), **patterns) for i in range(3)]
    _, _, report = assert_merges_to_the_oracle(models)
    assert report.config["rank_pattern"]["layers.0.q"] == 6


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_patterns_coming_out(share):
    """A fraction gives each layer its own rank; `q` is the end of `layers.0.q`, and PEFT takes the first match."""
    models = [client(i, r=4, lora_alpha=7) for i in range(4)]
    _, _, report = assert_merges_to_the_oracle(models, rank=share)
    assert len(set(report.config["rank_pattern"].values())) > 1


def test_alternating_and_model_scope_load_too():
    models = [client(i, r=2, lora_alpha=5) for i in range(2)]
    merged, report = merge(
        [state_of(m) for m in models], configs=[m.peft_config["default"] for m in models], solver="alternating", rank=4
    )
    exact, _ = merge([state_of(m) for m in models], configs=[m.peft_config["default"] for m in models], rank=4)
    ours, theirs = adapted(fresh(merged, report.config)), adapted(fresh(exact, report.config))
    for name in ours:
        assert oracle.relative_error(matrix(ours[name]), matrix(theirs[name])) <= 1e-6


def test_modules_to_save_and_their_reference():
    models = [client(i, r=2, modules_to_save=["head", "norm"]) for i in range(3)]
    reference = {f"base_model.model.head.{part}": getattr(BASE.head, part).detach() for part in ("weight", "bias")}
    configs = [model.peft_config["default"] for model in models]
    merged, report = merge([state_of(model) for model in models], reference, configs=configs, k=2.0)
    model = fresh(merged, report.config)
    for part in ("weight", "bias"):
        saved = [getattr(m.base_model.model.head.modules_to_save["default"], part).detach() for m in models]
        W = getattr(BASE.head, part).detach()
        layer = oracle.Layer(saved, [W] * 3, W)
        found = getattr(model.base_model.model.head.modules_to_save["default"], part)
        assert oracle.relative_error(found.detach(), layer.target(layer.weights(2.0))) <= 1e-12
    # what the reference lacks is averaged, and the report says so
    norm = {layer.name: layer for layer in report.layers}["base_model.model.norm.weight"]
    assert not norm.has_reference and norm.weights == pytest.approx([1 / 3] * 3)


def test_bias_of_lora_B():
    models = [client(i, r=2, lora_alpha=5 + i, lora_bias=True, target_modules=["q", "v"]) for i in range(3)]
    model, _, report = assert_merges_to_the_oracle(models, rank=5, k=2.0)
    x = torch.randn(4, 10, dtype=torch.float64, generator=generator(0))
    for layer in report.layers:
        name = layer.name.removeprefix("base_model.model.")

        def update(m, name=name):  # what the adapter adds to the module's output, bias included
            module = m.base_model.model.get_submodule(name)
            return (module(x) - module.base_layer(x)).detach()

        # q has 9 or 10 outputs and v 14, from rank 5 of a stack of 6: the weight is cut, the bias is not
        bias = sum(
            w
            * m.base_model.model.get_submodule(name).scaling["default"]
            * m.base_model.model.get_submodule(name).lora_B["default"].bias.detach()
            for w, m in zip(layer.weights, models, strict=True)
        )
        expected = x @ matrix(adapted(model)[layer.name]).T + bias
        assert oracle.relative_error(update(model), expected) <= 1e-12


def test_running_clients_take_the_merged_state_as_it_is():
    """as_reference: the shapes, keys and scaling that the clients have, over two rounds."""
    config = {"r": 3, "lora_alpha": 12, "rank_pattern": {"v": 2}}
    reference = client(9, size=0.3, **config)
    models = [client(i, **config) for i in range(2)]
    given = reference.peft_config["default"]
    arguments = {"configs": [given] * 2, "reference_config": given, "as_reference": True}
    merged, report = merge([state_of(m) for m in models], state_of(reference), server_lr=0.5, **arguments)
    result = client(5, **config)
    set_peft_model_state_dict(result, merged)
    assert report.config["lora_alpha"] == 12 and report.config["rank_pattern"] == {"v": 2}
    for name, module in adapted(result).items():
        W = matrix(adapted(reference)[name])
        layer = oracle.Layer([matrix(adapted(m)[name]) for m in models], [W] * 2, W)
        r = module.r["default"]
        expected = oracle.truncated(layer.target(layer.weights(1.0), 0.5), r)
        assert oracle.relative_error(matrix(module), expected) <= 1e-6, name


def test_adapter_names_in_the_keys():
    """Raw keys of a model's own state dict, the adapter's name in them."""
    models = [client(i, r=2, lora_alpha=5) for i in range(2)]
    raw = [{k: v for k, v in m.state_dict().items() if "lora_" in k} for m in models]
    assert any(".default" in key for key in raw[0])
    configs = [m.peft_config["default"] for m in models]
    merged, _ = merge(raw, configs=configs)
    expected, _ = merge([state_of(m) for m in models], configs=configs)
    assert len(merged) == len(expected)
    for key, value in merged.items():
        assert torch.equal(value, expected[key.replace(".default", "")])


def test_multihead_attention():
    class WithAttention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = torch.nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return self.attn(x, x, x)[0]

    base = WithAttention().double()
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["attn"], alpha_pattern={"attn": 10})
    states, models = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(base), config)
        state = {key: torch.randn_like(value) for key, value in state_of(model).items()}
        set_peft_model_state_dict(model, state)
        states.append(state)
        models.append(model)
    merged, report = merge(states, configs=[config] * 2, rank=4)
    result = get_peft_model(copy.deepcopy(base), LoraConfig(**report.config))
    set_peft_model_state_dict(result, merged)
    names = [layer.name for layer in report.layers]
    assert len(names) == 2
    for name in names:
        deltas = []
        for model in (*models, result):
            module = model.get_submodule(name)
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            deltas.append((module.scaling["default"] * B @ A).detach())
        zeros = torch.zeros_like(deltas[0])
        layer = oracle.Layer(deltas[:2], [zeros] * 2, zeros)
        T = layer.target(layer.weights(1.0))
        assert oracle.relative_error(deltas[2], oracle.truncated(T, 4)) <= 1e-6


def test_peft_model_from_files(tmp_path):
    """adapter_model.safetensors and adapter_config.json as `PeftModel.from_pretrained` reads them."""
    from safetensors.torch import save_file

    models = [client(i, r=3, lora_alpha=7) for i in range(3)]
    configs = [m.peft_config["default"] for m in models]
    merged, report = merge([state_of(m) for m in models], configs=configs, rank=0.8)
    save_file(merged, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(report.config))
    loaded = PeftModel.from_pretrained(copy.deepcopy(BASE), str(tmp_path))
    expected = adapted(fresh(merged, report.config))
    for name, module in adapted(loaded).items():
        assert oracle.relative_error(matrix(module), matrix(expected[name])) <= 1e-6


def test_dora_only_when_asked_for():
    models = [client(i, r=2, use_dora=True, target_modules=["v"]) for i in range(2)]
    states, configs = [state_of(m) for m in models], [m.peft_config["default"] for m in models]
    with pytest.raises(ValueError, match="client 0.*DoRA"):
        merge(states, configs=configs)
    merged, report = merge(states, configs=configs, dora=True)
    fresh(merged, report.config)
