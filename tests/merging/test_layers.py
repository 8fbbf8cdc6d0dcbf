"""PEFT's state dicts and configs, read without PEFT: keys, biases, magnitudes, the config that comes out."""

from collections.abc import Mapping

import pytest
import torch

from fedfrom import merge
from fedfrom.merging.peft.configs import output_config, rank_and_scaling
from fedfrom.merging.peft.layers import check_same, cut_to_ranks, find_layers
from tests.merging import oracle
from tests.merging.samples import A_KEY, B_KEY, MODULE, adapter_case, dense, generator, normal

BIAS, MAGNITUDE = f"{MODULE}.lora_B.bias", f"{MODULE}.lora_magnitude_vector"


@pytest.mark.parametrize("name", ["default", "weight_2", "client-7"])
def test_adapter_names_in_the_keys(name):
    case = adapter_case(0)
    renamed = {A_KEY: f"{MODULE}.lora_A.{name}.weight", B_KEY: f"{MODULE}.lora_B.{name}.weight"}
    expected, _ = merge(case.states)
    merged, report = merge([{renamed[key]: value for key, value in state.items()} for state in case.states])
    assert report.layers[0].name == MODULE
    assert set(merged) == set(renamed.values())
    assert all(torch.equal(merged[renamed[key]], expected[key]) for key in expected)
    # the same modules under two names: the reference's keys come out
    merged, _ = merge([case.states[0], {renamed[key]: value for key, value in case.states[1].items()}])
    assert set(merged) == {A_KEY, B_KEY}


def test_modules_to_save_with_and_without_the_adapters_name():
    saved = "base_model.model.head.modules_to_save.default.weight"
    plain = "base_model.model.head.weight"
    merged, report = merge([{saved: torch.ones(2)}, {plain: 3 * torch.ones(2)}], {plain: torch.zeros(2)}, k=1.0)
    assert torch.allclose(merged[plain], torch.full((2,), 2.5)) and report.layers[0].name == plain


def test_any_mapping_that_reads_when_asked():
    class Lazy(Mapping):
        """Reads anew each time it is asked, as from a file."""

        def __init__(self, state):
            self.state = state

        def __getitem__(self, key):
            return self.state[key].clone()

        def __iter__(self):
            return iter(self.state)

        def __len__(self):
            return len(self.state)

    case = adapter_case(0, start="trained", dtype=torch.float32)
    expected, _ = merge(case.states, case.reference)
    lazy = [Lazy(state) for state in case.states]
    merged, _ = merge(lazy, Lazy(case.reference))
    assert oracle.relative_error(dense(merged), dense(expected)) <= 1e-6


@pytest.mark.parametrize("as_reference", [False, True])
def test_bias_of_lora_B_acts_as_s_times_bias(as_reference):
    """Averaged as s_i b_i with the module's weights, and divided by the s that it goes out with."""
    g = generator(0)
    case = adapter_case(0, start="configs", r=3)
    biases = [normal(12, g=g) for _ in case.states]
    states = [{**state, BIAS: bias} for state, bias in zip(case.states, biases, strict=True)]
    s = [oracle.scaling(c["r"], c["lora_alpha"], c["use_rslora"]) for c in case.configs]
    w = case.layer.weights(2.0)
    if not as_reference:
        merged, report = merge(states, configs=case.configs, k=2.0)
        expected = sum(w_i * s_i * b for w_i, s_i, b in zip(w, s, biases, strict=True))
        assert report.config["lora_alpha"] == report.config["r"]
    else:
        config = {"r": 5, "lora_alpha": 20}
        reference = {A_KEY: normal(5, 9, g=g), B_KEY: torch.zeros(12, 5, dtype=torch.float64), BIAS: normal(12, g=g)}
        arguments = {"configs": case.configs, "reference_config": config, "server_lr": 0.5}
        merged, report = merge(states, reference, k=2.0, as_reference=True, **arguments)
        W = 4.0 * reference[BIAS]
        expected = W + 0.5 * sum(w_i * (s_i * b - W) for w_i, s_i, b in zip(w, s, biases, strict=True))
        expected = expected / 4.0
        assert report.config == config
    assert oracle.relative_error(merged[BIAS], expected) <= 1e-12
    assert report.layers[0].weights == pytest.approx(w)  # the bias is outside the norm


@pytest.mark.parametrize("server_lr", [1.0, 0.25])
def test_magnitudes_take_the_modules_weights_when_dora_is_asked_for(server_lr):
    g = generator(0)
    case = adapter_case(0)
    states = [{**state, MAGNITUDE: normal(12, g=g).abs()} for state in case.states]
    merged, report = merge(states, k=2.0, dora=True, server_lr=server_lr)
    w = case.layer.weights(2.0)
    # without a reference a magnitude is no update, which the server could scale
    expected = sum(w_i * state[MAGNITUDE] for w_i, state in zip(w, states, strict=True))
    assert oracle.relative_error(merged[MAGNITUDE], expected) <= 1e-12
    assert report.layers[0].weights == pytest.approx(w)


CONFIGS = [
    ({"r": 8, "lora_alpha": 16}, "model.layers.0.q_proj", (8, 2.0)),
    ({"r": 4, "lora_alpha": 16, "use_rslora": True}, "model.layers.0.q_proj", (4, 8.0)),
    ({"r": 4, "lora_alpha": 16, "use_rslora": True, "rank_pattern": {"q_proj": 16}}, "x.q_proj", (16, 4.0)),
    ({"r": 8, "lora_alpha": 16, "rank_pattern": {"proj": 2}}, "model.q_proj", (8, 2.0)),  # not a whole part
    ({"r": 8, "lora_alpha": 16, "rank_pattern": {"v": 2, "a.v": 4}}, "a.v", (2, 8.0)),  # the first match
    ({"r": 8, "lora_alpha": 16, "rank_pattern": {"a.v": 4, "v": 2}}, "a.v", (4, 4.0)),
    ({"r": 8, "lora_alpha": 16, "alpha_pattern": {r"layers\.[01]\.q": 4}}, "m.layers.1.q", (8, 0.5)),
    ({"r": 8, "lora_alpha": 16, "alpha_pattern": {"^q": 4}}, "q", (8, 0.5)),
    ({"r": 8, "lora_alpha": 16, "alpha_pattern": {"attn": 4}}, "attn.base_layer.out_proj", (8, 0.5)),
]


@pytest.mark.parametrize(("config", "module", "expected"), CONFIGS)
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_rank_and_scaling(config, module, expected, prefix):
    assert rank_and_scaling(config, prefix + module) == pytest.approx(expected)


@pytest.mark.parametrize(
    "ranks",
    [
        {"q": 2, "a.q": 4, "b.a.q": 8},
        {"layer_1.q": 2, "layer.1.q": 3},
        {"layer.1.q": 2, "layer.11.q": 3, "1.q": 4},
        {"aXq": 2, "a.q": 3},
        {"m": 5},
        {"m": 5, "n": 5},
    ],
)
def test_output_patterns_give_every_module_its_rank_and_scaling_1(ranks):
    """With names that are the ends of others, in any order: PEFT takes the first pattern that matches."""
    given = {"r": 64, "lora_alpha": 3, "use_rslora": True, "rank_pattern": {".*": 7}, "target_modules": ["q"]}
    for names in (list(ranks), list(reversed(ranks))):
        config = output_config(given, {f"base_model.model.{name}": ranks[name] for name in names})
        assert config["r"] == config["lora_alpha"] == max(ranks.values())
        assert config["use_rslora"] is False and config["target_modules"] == ["q"]
        for name, rank in ranks.items():
            assert rank_and_scaling(config, f"base_model.model.{name}") == (rank, 1.0)
    assert given["r"] == 64 and given["rank_pattern"] == {".*": 7}


def test_multihead_attentions_projections_need_one_rank():
    with pytest.raises(ValueError, match="attn.*found 2 and 3"):
        output_config({"r": 2, "lora_alpha": 2}, {"attn": 2, "attn.base_layer.out_proj": 3})


def test_leading_parts():
    case = adapter_case(0, start="trained", r=4)
    state = {**case.reference, "head": torch.ones(2)}
    layers = find_layers(state, "global")
    cut = cut_to_ranks(state, layers, {MODULE: 2})
    assert torch.equal(cut[A_KEY], state[A_KEY][:2]) and torch.equal(cut[B_KEY], state[B_KEY][:, :2])
    assert cut["head"] is state["head"] and state[A_KEY].shape[0] == 4
    assert cut_to_ranks(state, layers, {MODULE: 9})[A_KEY].shape[0] == 4


def test_convolutions_are_flattened_from_the_input_channels_on():
    g = generator(0)
    states = [{A_KEY: normal(2, 3, 5, 5, g=g), B_KEY: normal(4, 2, 1, 1, g=g)} for _ in range(3)]
    merged, _ = merge(states)
    assert merged[A_KEY].shape == (2, 3, 5, 5) and merged[B_KEY].shape == (4, 2, 1, 1)

    def kernel(state):  # PEFT's: conv2d(A.permute(1, 0, 2, 3), B).permute(1, 0, 2, 3)
        A, B = state[A_KEY].permute(1, 0, 2, 3), state[B_KEY]
        return torch.nn.functional.conv2d(A, B).permute(1, 0, 2, 3).reshape(4, -1)

    zeros = torch.zeros(4, 75, dtype=torch.float64)
    layer = oracle.Layer([kernel(state) for state in states], [zeros] * 3, zeros)
    T = layer.target(layer.weights(1.0))
    assert oracle.relative_error(kernel(merged), oracle.truncated(T, 2)) <= 1e-12


@pytest.mark.parametrize(
    ("shape", "dtype", "rank", "words"),
    [
        ((4, 32), torch.float16, None, "expected dtype float32, found float16"),
        ((4, 16), torch.float32, None, "expected shape (4, 32), found (4, 16)"),
        ((4, 16), torch.float16, None, "expected shape (4, 32) float32, found (4, 16) float16"),
        ((2, 32), torch.float16, 0, "expected dtype float32, found float16"),
        ((2, 16), torch.float32, 0, "expected shape (4, 32), found (2, 16)"),
    ],
)
def test_only_what_differs_is_named(shape, dtype, rank, words):
    with pytest.raises(ValueError) as caught:
        check_same(torch.zeros(shape, dtype=dtype), torch.zeros(4, 32), "client 3", "w", rank)
    assert str(caught.value) == f"client 3, 'w': {words}"


def test_a_deltas_dtype_is_no_fault():
    with pytest.raises(ValueError, match=r"expected shape \(3,\), found \(2,\)$"):
        check_same(torch.zeros(2, dtype=torch.bfloat16), torch.zeros(3), "client 3", "w", is_delta=True)
    check_same(torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3), "client 3", "w", is_delta=True)
