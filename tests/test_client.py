"""fedfrom.client: clients of other ranks, alphas and scalings than the server's, end to end."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from peft import PeftModel

from fedfrom import FedFroM, FedMerge, client
from fedfrom.merging.peft import layers as L
from fedfrom.wire.adapter_configs import ADAPTER_KEY
from tests.inprocess import InProcessGrid
from tests.models import (
    FEDFROM,
    PREFIX,
    Arrays,
    adapted,
    adapter,
    arrays_of,
    crossed,
    factors,
    far_apart,
    net,
    oracle,
    products,
    record_of,
    same_bits,
    train,
    truncated,
)

QUERY, WORDS = f"{PREFIX}query", f"{PREFIX}words"
BOTH = {"target_modules": ["query", "words"]}

# the global config, and the clients'
FEDERATIONS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "ranks": ({"r": 8, "lora_alpha": 16}, [{"r": r, "lora_alpha": 16} for r in (4, 8, 16)]),
    "ranks and embeddings": (
        {"r": 8, "lora_alpha": 16, **BOTH},
        [{"r": r, "lora_alpha": 2 * r, **BOTH} for r in (4, 8, 16)],
    ),
    "alphas": ({"r": 4, "lora_alpha": 8}, [{"r": 4, "lora_alpha": alpha} for alpha in (2, 8, 20)]),
    "rsLoRA": (
        {"r": 8, "lora_alpha": 4, "use_rslora": True, **BOTH},
        [
            {"r": 4, "lora_alpha": 4, "use_rslora": True, **BOTH},
            {"r": 8, "lora_alpha": 16, "use_rslora": False, **BOTH},
            {"r": 12, "lora_alpha": 4, "use_rslora": True, **BOTH},
        ],
    ),
    "patterns": (
        {"r": 8, "lora_alpha": 16, "rank_pattern": {"words": 5}, "alpha_pattern": {"query": 10}, **BOTH},
        [
            {"r": 6, "lora_alpha": 12, "rank_pattern": {"query": 3, "words": 9}, **BOTH},
            {"r": 8, "lora_alpha": 16, "alpha_pattern": {".*ords": 7.5}, **BOTH},
            {"r": 2, "lora_alpha": 1, "rank_pattern": {"query": 12}, "alpha_pattern": {"words": 3}, **BOTH},
        ],
    ),
}
federations = pytest.mark.parametrize("name", FEDERATIONS)


def scaling_of(model: PeftModel) -> Callable[[str], float]:
    """PEFT's own scaling of each module: what the oracle goes by."""
    return lambda module: model.get_submodule(module).scaling["default"]


def effects(model: PeftModel) -> dict[str, np.ndarray]:
    """What PEFT itself adds to each base weight; an embedding's as (d, vocabulary), like `products`."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            weight = module.get_delta_weight("default").detach().numpy().astype(np.float64)
            found[name] = weight.T if name == WORDS else weight
    return found


class Federation:
    """Clients with PEFT models of their own configs, that use fedfrom.client, and the server's model."""

    def __init__(self, name: str, trains: Callable[[int], bool] = lambda i: True) -> None:
        config, configs = FEDERATIONS[name]
        self.server = adapted(seed=100, **config)
        torch.manual_seed(7)
        with torch.no_grad():
            for key, value in self.server.named_parameters():
                if "lora_" in key:
                    value.copy_(0.3 * torch.randn_like(value))
        self.models = [adapted(seed=i, **own) for i, own in enumerate(configs)]
        self.configs, self.trains = configs, trains
        self.loaded: list[dict[int, dict[str, np.ndarray]]] = []
        self.grid = InProcessGrid(self, len(configs), record=True)

    def __call__(self, message: Message, context: Context) -> Message:
        i, server_round = int(context.node_config["partition-id"]), int(message.content["config"]["server-round"])
        model = adapted(seed=i, **self.configs[i])
        client.load(model, message)
        if message.metadata.message_type == "evaluate":
            return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)
        while len(self.loaded) < server_round:
            self.loaded.append({})
        self.loaded[server_round - 1][i] = effects(model)
        loss = train(model, i, server_round) if self.trains(i) else 0.0
        return client.reply(model, message, {"num-examples": 10 * (i + 1), "loss": loss})

    def run(self, rounds: int, **options: Any) -> tuple[list[Arrays], FedFroM]:
        """Return the global arrays of every round, the initial ones first."""
        strategy, arrays = FedFroM(lora_config=self.server.peft_config["default"], **options), list[Arrays]()
        strategy.start(
            self.grid,
            adapter(self.server),
            num_rounds=rounds,
            evaluate_fn=lambda server_round, record: arrays.append(arrays_of(record)),  # type: ignore[func-returns-value]
        )
        assert not self.grid.errors and not any(report.rejected for report in strategy.reports.values())
        return arrays, strategy


@federations
def test_clients_that_train_nothing_change_nothing(name: str) -> None:
    federation = Federation(name, trains=lambda i: False)
    arrays, strategy = federation.run(rounds=4)
    scaling = scaling_of(federation.server)
    for server_round, after in enumerate(arrays[1:], 1):
        assert far_apart(products(after, scaling), products(arrays[0], scaling)) < 1e-6
        # to the bit, whatever their ranks and alphas: client.load's rounding is no update
        layers = strategy.reports[server_round].merge.layers
        assert all(norm == 0 for layer in layers if layer.kind == "adapter" for norm in layer.norms)


@federations
def test_clients_that_train_nothing_do_not_clip_the_one_that_does(name: str) -> None:
    """Their rounding was the median norm that its update was clipped to: the layer then stopped learning."""
    federation = Federation(name, trains=lambda i: i == 0)
    _, strategy = federation.run(rounds=3)
    for report in strategy.reports.values():
        place = next(i for i, node in enumerate(report.nodes) if federation.grid.partition_of[node] == 0)
        for layer in report.merge.layers:
            if layer.kind == "adapter":
                assert layer.norms[place] > 0 and sum(norm > 0 for norm in layer.norms) == 1
                assert not layer.clipped


@federations
@pytest.mark.parametrize("options", [{}, {"k": 1.0, "server_lr": 0.5}, {"scope": "model", "rank": 2}], ids=str)
def test_every_round_is_the_oracles(name: str, options: dict[str, Any]) -> None:
    federation = Federation(name)
    arrays, _ = federation.run(rounds=3, **options)
    up = crossed(federation.grid, "up")
    for server_round, sent in enumerate(arrays[:-1]):
        expected = oracle(
            sent,
            [arrays_of(up[server_round][i]["arrays"]) for i in range(3)],
            [10, 20, 30],
            scaling=scaling_of(federation.server),
            scalings=[scaling_of(model) for model in federation.models],
            **{**FEDFROM, **options},
        )
        after = arrays[server_round + 1]
        assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in sent.items()}
        assert far_apart(products(after, scaling_of(federation.server)), expected) < 1e-5
        # not vacuous: the clients did train
        assert far_apart(expected, products(sent, scaling_of(federation.server))) > 1e-3


@federations
def test_each_client_loads_the_best_approximation_of_its_rank(name: str) -> None:
    """The gauge: from the second round the leading rows and columns are it, by PEFT's own get_delta_weight."""
    federation = Federation(name)
    arrays, _ = federation.run(rounds=3)
    for server_round in (1, 2):
        whole = products(arrays[server_round], scaling_of(federation.server))
        for i, model in enumerate(federation.models):
            for module, found in federation.loaded[server_round][i].items():
                rank = model.get_submodule(module).r["default"]
                best = truncated(whole[module], rank)
                assert np.linalg.norm(found - best) < 1e-5 * np.linalg.norm(whole[module])


def test_rank_caps_the_product_and_not_the_arrays() -> None:
    federation = Federation("ranks and embeddings")
    arrays, strategy = federation.run(rounds=2, rank=3)
    for after in arrays[1:]:
        for module in (QUERY, WORDS):
            B, A = factors(after, module)
            assert A.shape[0] == B.shape[1] == 8
            assert np.linalg.matrix_rank(B @ A, tol=1e-5 * np.linalg.norm(B @ A)) == 3
            inside, outside = (A, B) if module == QUERY else (B.T, A.T)
            assert (np.linalg.norm(outside, axis=0)[3:] == 0).all()
            assert (np.linalg.norm(inside, axis=1) > 0.5).all()  # no direction is dead for the next gradient
    assert strategy.reports[1].merge.method["rank"] == 3


def test_a_client_of_the_largest_rank_keeps_its_own_directions() -> None:
    model, state = adapted(r=8, lora_alpha=16, seed=3), arrays_of(adapter(adapted(r=4, lora_alpha=8, seed=1)))
    B, A = f"{QUERY}.lora_B.weight", f"{QUERY}.lora_A.weight"
    state[B] = np.random.default_rng(0).normal(size=state[B].shape).astype(np.float32)
    with torch.no_grad():  # trained before, as a client that keeps its model between rounds
        model.get_submodule(QUERY).lora_B["default"].weight.normal_()
    own = arrays_of(adapter(model))
    client.load(model, message(state, {"r": 4, "lora_alpha": 8}))
    loaded = arrays_of(adapter(model))
    np.testing.assert_array_equal(loaded[A], np.vstack([state[A], own[A][4:]]))
    np.testing.assert_array_equal(loaded[B], np.hstack([state[B], np.zeros((20, 4))]))


def message(state: Arrays, config: dict[str, Any] | None = None, arrays: str = "arrays") -> Message:
    """Return what a strategy would send."""
    from fedfrom.wire.adapter_configs import config_to_record

    grid = InProcessGrid(lambda message, context: message, 1)
    content = RecordDict({arrays: record_of(state), "config": ConfigRecord({"server-round": 1})})
    if config is not None:
        content[ADAPTER_KEY] = config_to_record(config, list(L.find_layers(state, "state")))
    return Message(content, next(iter(grid.partition_of)), "train")


def test_loading_gives_the_servers_outputs_at_any_alpha() -> None:
    server = Federation("rsLoRA").server.eval()
    state, config = arrays_of(adapter(server)), server.peft_config["default"].to_dict()
    tokens = torch.arange(20).reshape(4, 5)
    for own in ({"r": 8, "lora_alpha": 3}, {"r": 11, "lora_alpha": 30, "use_rslora": True}):
        model = adapted(seed=5, **BOTH, **own).eval()
        assert not torch.allclose(model(tokens), server(tokens), atol=1e-3)
        client.load(model, message(state, config))
        torch.testing.assert_close(model(tokens), server(tokens), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*invalid shape.*lora_B.bias")  # PEFT's word for its own lora_bias
def test_lora_bias_acts_by_its_scaling() -> None:
    """lora_B.bias adds s * bias: merged as such, loaded as such."""
    own = [{"r": 4, "lora_alpha": alpha, "lora_bias": True} for alpha in (2, 8, 20)]
    scalings = [alpha / 4 for alpha in (2, 8, 20)]
    key = f"{QUERY}.lora_B.bias"

    def app(msg: Message, context: Context) -> Message:
        i = int(context.node_config["partition-id"])
        model = adapted(seed=i, **own[i])
        client.load(model, msg)
        loaded.append((scalings[i], arrays_of(adapter(model))[key]))
        train(model, i, 1)
        return client.reply(model, msg, {"num-examples": i + 1})

    loaded: list[tuple[float, np.ndarray]] = []
    server = adapted(r=4, lora_alpha=6, lora_bias=True)
    state = arrays_of(adapter(server))
    state[key] = np.linspace(-1, 1, 20, dtype=np.float32)
    grid = InProcessGrid(app, 3, record=True)
    strategy = FedFroM(
        k=0, examples_power=1, clip=None, lora_config=server.peft_config["default"], fraction_evaluate=0.0
    )
    result = strategy.start(grid, record_of(state), num_rounds=1)
    assert not grid.errors and not strategy.reports[1].rejected
    for s, bias in loaded:
        np.testing.assert_allclose(s * bias, 1.5 * state[key], rtol=1e-6)
    biases = [arrays_of(crossed(grid, "up")[0][i]["arrays"])[key].astype(np.float64) for i in range(3)]
    mean = sum((i + 1) / 6 * scalings[i] * biases[i] for i in range(3))
    np.testing.assert_allclose(1.5 * arrays_of(result.arrays)[key], mean, rtol=1e-5, atol=1e-7)


# --- Without lora_config ---------------------------------------------------------------------------------------------


def trainer(configs: Sequence[dict[str, Any]], says: Sequence[bool]) -> Callable[[Message, Context], Message]:
    """Return an app whose clients train adapters of their own configs, and say so or don't; none uses `load`."""

    def app(msg: Message, context: Context) -> Message:
        i = int(context.node_config["partition-id"])
        model = adapted(**configs[i])
        train(model, i, 1)
        if says[i]:
            return client.reply(model, msg, {"num-examples": 5})
        metrics = MetricRecord({"num-examples": 5})
        return Message(RecordDict({"arrays": adapter(model), "metrics": metrics}), reply_to=msg)

    return app


def rejections(strategy: FedMerge, app: Any, server: PeftModel) -> dict[int, str]:
    grid = InProcessGrid(app, 3)
    strategy.start(grid, adapter(server), num_rounds=1)
    assert not grid.errors
    return {grid.partition_of[node]: reason for node, reason in strategy.reports[1].rejected.items()}


@pytest.mark.parametrize("says", [True, False])
def test_another_rank_is_rejected_with_what_to_do(says: bool) -> None:
    configs = [{"r": 4, "lora_alpha": 8}, {"r": 8, "lora_alpha": 8}, {"r": 4, "lora_alpha": 8}]
    found = rejections(FedFroM(fraction_evaluate=0.0), trainer(configs, [says] * 3), adapted())
    assert list(found) == [1]
    assert "(4, 18)" in found[1] and "(8, 18)" in found[1]
    assert "lora_config" in found[1] and "fedfrom.client" in found[1]


def test_another_rank_without_a_word_is_rejected_with_what_to_do() -> None:
    """The strategy knows its config, but not the client's: its scaling could be anything."""
    configs = [{"r": 4, "lora_alpha": 8}, {"r": 8, "lora_alpha": 8}, {"r": 4, "lora_alpha": 8}]
    strategy = FedFroM(lora_config={"r": 4, "lora_alpha": 8}, fraction_evaluate=0.0)
    found = rejections(strategy, trainer(configs, [False] * 3), adapted())
    assert list(found) == [1] and "fedfrom.client" in found[1]


def test_another_alpha_is_rejected_with_what_to_do() -> None:
    configs = [{"r": 4, "lora_alpha": 8}, {"r": 4, "lora_alpha": 8}, {"r": 4, "lora_alpha": 9}]
    found = rejections(FedFroM(fraction_evaluate=0.0), trainer(configs, [True] * 3), adapted())
    assert list(found) == [2] and "lora_config" in found[2] and "9" in found[2]


def test_clients_that_say_their_config_and_clients_that_do_not_go_together() -> None:
    configs = [{"r": 4, "lora_alpha": 8}] * 3
    for says in ([True, False, False], [True, True, False]):
        assert rejections(FedFroM(fraction_evaluate=0.0), trainer(configs, says), adapted()) == {}


def test_a_config_that_does_not_fit_the_arrays_is_rejected() -> None:
    def app(msg: Message, context: Context) -> Message:
        reply = trainer([{"r": 4, "lora_alpha": 8}] * 3, [True] * 3)(msg, context)
        if context.node_config["partition-id"] == 1:
            reply.content[ADAPTER_KEY]["r"] = 8
        return reply

    found = rejections(FedFroM(lora_config={"r": 4, "lora_alpha": 8}, fraction_evaluate=0.0), app, adapted())
    assert list(found) == [1] and "expected rank 8" in found[1] and "{4}" in found[1]


def test_factors_are_never_averaged_over_unequal_ranks() -> None:
    configs = [{"r": 4, "lora_alpha": 8}, {"r": 8, "lora_alpha": 8}, {"r": 4, "lora_alpha": 8}]
    strategy = FedMerge("factor-average", lora_config={"r": 4, "lora_alpha": 8}, fraction_evaluate=0.0)
    assert list(rejections(strategy, trainer(configs, [True] * 3), adapted())) == [1]


def test_initial_arrays_of_another_rank_than_lora_config_end_the_run_before_it_starts() -> None:
    grid = InProcessGrid(lambda message, context: message, 2)
    with pytest.raises(ValueError, match=r"query.*expected rank 8.*lora_config.*found 4"):
        FedFroM(lora_config={"r": 8, "lora_alpha": 8}).start(grid, adapter(adapted(r=4)), num_rounds=1)
    assert not grid.traffic


def test_dora_is_refused_before_anything_is_trained_unless_asked_for() -> None:
    def app(msg: Message, context: Context) -> Message:
        model = adapted(use_dora=True)
        client.load(model, msg)
        train(model, int(context.node_config["partition-id"]), 1)
        return client.reply(model, msg, {"num-examples": 1})

    grid, initial = InProcessGrid(app, 2), adapter(adapted(use_dora=True))
    with pytest.raises(ValueError, match="magnitude.*dora=True"):
        FedFroM().start(grid, initial, num_rounds=1)
    assert not grid.traffic
    strategy = FedFroM(dora=True, fraction_evaluate=0.0)
    result = strategy.start(grid, initial, num_rounds=2)
    assert not grid.errors and not strategy.reports[2].rejected
    assert {k: a.shape for k, a in result.arrays.items()} == {k: a.shape for k, a in initial.items()}


# --- load and reply --------------------------------------------------------------------------------------------------


def test_a_client_of_the_same_config_loads_what_peft_loads() -> None:
    from peft import set_peft_model_state_dict

    state = arrays_of(adapter(Federation("alphas").server))
    ours, pefts = adapted(seed=1), adapted(seed=2)
    client.load(ours, message(state))
    set_peft_model_state_dict(pefts, record_of(state).to_torch_state_dict())
    assert same_bits(adapter(ours), adapter(pefts))
    assert same_bits(adapter(ours), record_of(state))


def test_a_model_without_adapters_goes_both_ways() -> None:
    state = ArrayRecord(net(seed=4).state_dict())
    model = net(seed=5)
    sent = message(arrays_of(state))
    client.load(model, sent)
    assert same_bits(ArrayRecord(model.state_dict()), state)
    reply = client.reply(model, sent, {"num-examples": 3, "loss": 0.5})
    assert set(reply.content) == {"arrays", "metrics"}
    assert same_bits(reply.content["arrays"], state)
    assert dict(reply.content["metrics"]) == {"num-examples": 3, "loss": 0.5}


def test_the_reply_says_rank_and_alpha() -> None:
    model = adapted(**BOTH, r=6, lora_alpha=9, use_rslora=True, rank_pattern={"quer.": 3})
    reply = client.reply(model, message(arrays_of(adapter(model))), {"num-examples": 3})
    assert set(reply.content) == {"arrays", "metrics", ADAPTER_KEY}
    said = dict(reply.content[ADAPTER_KEY])
    ranks = json.loads(str(said.pop("rank_pattern")))
    assert said == {"r": 6, "lora_alpha": 9, "use_rslora": True, "alpha_pattern": "{}"}
    # spelled out: a full name for every module, and no expression
    modules = {
        name
        for name in dict(model.base_model.model.named_modules())
        if hasattr(model.base_model.model.get_submodule(name), "lora_A")
    }
    assert ranks == {name: 3 if name.endswith("query") else 6 for name in modules} and len(set(ranks.values())) == 2


def test_other_names_of_records_and_adapters() -> None:
    server = adapted(seed=3)
    model = adapted(seed=1)
    model.add_adapter("mine", model.peft_config["default"])
    model.set_adapter("mine")
    before = arrays_of(adapter(model))
    sent = message(arrays_of(adapter(server)), arrays="model")
    client.load(model, sent, arrayrecord_key="model", adapter_name="mine")
    reply = client.reply(model, sent, {"num-examples": 1}, arrayrecord_key="model", adapter_name="mine")
    assert same_bits(reply.content["model"], adapter(server))
    after = arrays_of(adapter(model))
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value)


def test_what_does_not_fit_the_model_is_a_clear_error() -> None:
    state = arrays_of(adapter(adapted(r=4)))
    with pytest.raises(ValueError, match=r"query.*expected rank 8, found 4.*lora_config"):
        client.load(adapted(r=8), message(state))
    with pytest.raises(ValueError, match=r"2 missing.*words"):
        client.load(adapted(r=4, **BOTH), message(state))
    wider = {**state, f"{QUERY}.lora_A.weight": np.zeros((4, 19), np.float32)}
    with pytest.raises(ValueError, match=r"lora_A.*\(4, 18\).*\(4, 19\)"):
        client.load(adapted(r=4), message(wider))
    head = {**state, f"{PREFIX}head.weight": np.zeros((5, 20), np.float32)}
    with pytest.raises(ValueError, match=r"head\.weight.*\(3, 20\).*\(5, 20\)"):
        client.load(adapted(r=4), message(head))
    with pytest.raises(ValueError, match="global arrays.*head"):
        client.load(net(), message({"head.weight": np.zeros((3, 20), np.float32)}))
    with pytest.raises(ValueError, match="'arrays'"):
        client.load(net(), Message(RecordDict(), 1, "train"))


def test_a_failed_load_leaves_the_model_alone() -> None:
    model = adapted(r=4)
    state = arrays_of(adapter(adapted(r=4, seed=9)))
    before = adapter(model)
    with pytest.raises(ValueError):
        client.load(model, message({**state, f"{PREFIX}head.weight": np.zeros((5, 20), np.float32)}))
    assert same_bits(adapter(model), before)
