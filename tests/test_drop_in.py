"""FedFroM in the place of FedAvg: existing client apps and server apps run, and the degenerate setting is FedAvg."""

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp.strategy import FedAvg, Result
from flwr.supercore.differential_privacy import KEY_CLIPPING_NORM
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from fedfrom import FedFroM, FedMerge
from tests.inprocess import InProcessGrid
from tests.models import (
    FEDFROM,
    adapted,
    arrays_of,
    crossed,
    far_apart,
    faulty,
    mixed_state,
    net,
    noisy,
    oracle,
    products,
    record_of,
    same_bits,
    train,
)

# --- Flower's own client pattern for PEFT (flowertune-llm), word for word where it counts ----------------------------

peft_app = ClientApp()


@peft_app.train()
def train_adapter(msg: Message, context: Context) -> Message:
    model = adapted(lora_dropout=0.0)
    set_peft_model_state_dict(model, msg.content["arrays"].to_torch_state_dict())
    partition, server_round = int(context.node_config["partition-id"]), int(msg.content["config"]["server-round"])
    loss = train(model, partition, server_round)
    model_record = ArrayRecord(get_peft_model_state_dict(model))
    metrics = {"train_loss": loss, "num-examples": 8 * (partition + 1)}
    return Message(content=RecordDict({"arrays": model_record, "metrics": MetricRecord(metrics)}), reply_to=msg)


@peft_app.evaluate()
def evaluate_adapter(msg: Message, context: Context) -> Message:
    model = adapted()
    set_peft_model_state_dict(model, msg.content["arrays"].to_torch_state_dict())
    size = float(sum(p.detach().abs().sum() for p in model.parameters()))
    metrics = {"size": size, "num-examples": 3}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)


full_app = ClientApp()


@full_app.train()
def train_model(msg: Message, context: Context) -> Message:
    model = net(seed=1)
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    partition, server_round = int(context.node_config["partition-id"]), int(msg.content["config"]["server-round"])
    loss = train(model, partition, server_round)
    metrics = {"train_loss": loss, "num-examples": 8 * (partition + 1)}
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=msg)


SERVER = """
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict
from tests.models import adapted

def main(grid):
    init_model = adapted()
    arrays = ArrayRecord(get_peft_model_state_dict(init_model))
    strategy = FedAvg(
        fraction_train=1.0,
        fraction_evaluate=0.5,
    )
    return strategy.start(
        grid=grid, initial_arrays=arrays, train_config=ConfigRecord({"save_path": "/tmp"}), num_rounds=3
    )
"""
DIFF = {"from flwr.serverapp.strategy import FedAvg": "from fedfrom import FedFroM", "= FedAvg(": "= FedFroM("}


def run(server: str) -> Result:
    names: dict = {}
    exec(server, names)
    return names["main"](InProcessGrid(peft_app, 3))


def test_a_diff_of_two_lines_puts_fedfrom_into_a_server_app() -> None:
    changed = SERVER
    for old, new in DIFF.items():
        assert changed.count(old) == 1
        changed = changed.replace(old, new)
    assert sum(a != b for a, b in zip(SERVER.splitlines(), changed.splitlines(), strict=True)) <= 3
    before, after = run(SERVER), run(changed)
    assert list(after.arrays) == list(before.arrays)
    for key, array in after.arrays.items():
        assert array.shape == before.arrays[key].shape
        if not key.endswith("num_batches_tracked"):  # FedAvg makes floats of integers, fedfrom keeps them
            assert array.dtype == before.arrays[key].dtype
    assert after.train_metrics_clientapp.keys() == before.train_metrics_clientapp.keys() == {1, 2, 3}
    for server_round, metrics in before.train_metrics_clientapp.items():
        assert metrics.keys() < after.train_metrics_clientapp[server_round].keys()
    # round 1 starts from the same arrays: the clients' metrics are averaged alike
    first = after.train_metrics_clientapp[1]["train_loss"]
    assert first == pytest.approx(before.train_metrics_clientapp[1]["train_loss"], rel=1e-12)
    assert {r: set(m) for r, m in after.evaluate_metrics_clientapp.items()} == {r: {"size"} for r in (1, 2, 3)}
    model = adapted()
    set_peft_model_state_dict(model, after.arrays.to_torch_state_dict())


def test_a_subclass_written_for_fedavg_works_over_fedfrom() -> None:
    """flowertune-llm's strategy: FedAvg with configure_train and aggregate_train extended through super()."""

    class FlowerTune(FedFroM):
        megabytes = 0.0

        def configure_train(self, server_round, arrays, config, grid):
            messages = super().configure_train(server_round, arrays, config, grid)
            self.megabytes += sum(m.content["arrays"].count_bytes() for m in messages) / 1024**2
            return messages

        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            self.megabytes += arrays.count_bytes() / 1024**2
            return arrays, metrics

    strategy = FlowerTune(fraction_evaluate=0.0)
    result = strategy.start(InProcessGrid(peft_app, 2), ArrayRecord(get_peft_model_state_dict(adapted())), num_rounds=2)
    assert strategy.megabytes > 0 and len(result.train_metrics_clientapp) == 2
    assert result.evaluate_metrics_clientapp == {}


def test_a_full_state_dict_with_buffers_and_integers_comes_back_loadable() -> None:
    initial = ArrayRecord(net(seed=1).state_dict())
    result = FedFroM(fraction_evaluate=0.0).start(InProcessGrid(full_app, 3), initial, num_rounds=3)
    assert {k: (a.shape, a.dtype) for k, a in result.arrays.items()} == {
        k: (a.shape, a.dtype) for k, a in initial.items()
    }
    assert not same_bits(result.arrays, initial)
    net().load_state_dict(result.arrays.to_torch_state_dict(), strict=True)
    losses = [result.train_metrics_clientapp[i]["train_loss"] for i in (1, 2, 3)]
    assert all(np.isfinite(losses))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtypes_are_kept(dtype: type) -> None:
    state = mixed_state(dtype=dtype)
    result = FedFroM(fraction_evaluate=0.0).start(InProcessGrid(noisy, 3), record_of(state), num_rounds=2)
    assert {k: v.dtype for k, v in arrays_of(result.arrays).items()} == {k: v.dtype for k, v in state.items()}


# --- The degenerate setting ------------------------------------------------------------------------------------------


def test_k_0_and_p_1_is_fedavg_on_full_models_through_real_rounds() -> None:
    initial = ArrayRecord(net(seed=1).state_dict())
    ends = [
        strategy.start(InProcessGrid(full_app, 3), initial, num_rounds=3).arrays
        for strategy in (
            FedAvg(fraction_evaluate=0.0),
            FedFroM(k=0, examples_power=1, clip=None, fraction_evaluate=0.0),
        )
    ]
    fedavg, fedfrom = (arrays_of(record) for record in ends)
    for key in fedavg:
        if not key.endswith("num_batches_tracked"):
            # float32 training in between: rounding of one round is trained on in the next
            np.testing.assert_allclose(fedfrom[key], fedavg[key], rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("strategy", ["from", "average"])
def test_k_0_and_p_1_is_fedavg_of_the_products(strategy: str) -> None:
    """Rank permitting: three clients' noise of rank 1 around a W of rank 1 fits the rank 4 of the adapters."""
    draw = np.random.default_rng(0)
    key_A, key_B = "m.q.lora_A.weight", "m.q.lora_B.weight"
    A = np.vstack([draw.normal(size=(1, 12)), np.zeros((3, 12))])
    B = np.hstack([draw.normal(size=(10, 1)), np.zeros((10, 3))])
    state = {key_A: A, key_B: B, "m.head.weight": draw.normal(size=(3, 10))}

    def client(message: Message, context: Context) -> Message:
        i = int(context.node_config["partition-id"])
        sent = arrays_of(message.content["arrays"])
        noise = np.random.default_rng(i + 1)
        row, column = noise.normal(size=(1, 12)), noise.normal(size=(10, 1))
        # W + column row, in rank 4: the leading column of W and one more
        moved = {
            key_A: np.vstack([sent[key_A][:1], row, np.zeros((2, 12))]),
            key_B: np.hstack([sent[key_B][:, :1], column, np.zeros((10, 2))]),
            "m.head.weight": sent["m.head.weight"] + noise.normal(size=(3, 10)),
        }
        metrics = MetricRecord({"num-examples": i + 1})
        return Message(RecordDict({"arrays": record_of(moved), "metrics": metrics}), reply_to=message)

    options = {"k": 0} if strategy == "from" else {}
    grid = InProcessGrid(client, 3, record=True)
    result = FedMerge(strategy, examples_power=1, fraction_evaluate=0.0, **options).start(
        grid, record_of(state), num_rounds=1
    )
    replies = [products(arrays_of(crossed(grid, "up")[0][i]["arrays"])) for i in range(3)]
    mean = {name: sum((i + 1) / 6 * replies[i][name] for i in range(3)) for name in replies[0]}
    assert np.linalg.matrix_rank(mean["m.q"]) == 4  # so nothing was truncated
    assert far_apart(products(arrays_of(result.arrays)), mean) < 1e-12


def test_k_0_and_p_1_is_the_truncated_mean_of_the_products_over_rounds() -> None:
    grid = InProcessGrid(peft_app, 3, record=True)
    strategy = FedFroM(k=0, examples_power=1, clip=None, fraction_evaluate=0.0)
    strategy.start(grid, ArrayRecord(get_peft_model_state_dict(adapted())), num_rounds=3)
    down, up = crossed(grid, "down"), crossed(grid, "up")
    for server_round in (0, 1):
        replies = [products(arrays_of(up[server_round][i]["arrays"])) for i in range(3)]
        mean = {name: sum((i + 1) / 6 * replies[i][name] for i in range(3)) for name in replies[0]}
        U, S, Vh = np.linalg.svd(mean["base_model.model.query"], full_matrices=False)
        mean["base_model.model.query"] = U[:, :4] * S[:4] @ Vh[:4]
        found = products(arrays_of(down[server_round + 1][0]["arrays"]))
        tracked = "base_model.model.norm.num_batches_tracked"
        found.pop(tracked), mean.pop(tracked)
        assert far_apart(found, mean) < 1e-6


def test_factor_average_is_what_fedavg_does_to_adapters() -> None:
    initial = ArrayRecord(get_peft_model_state_dict(adapted()))
    ends = [
        strategy.start(InProcessGrid(peft_app, 3), initial, num_rounds=1).arrays
        for strategy in (
            FedAvg(fraction_evaluate=0.0),
            FedMerge("factor-average", examples_power=1, fraction_evaluate=0.0),
        )
    ]
    fedavg, factor_average = (arrays_of(record) for record in ends)
    for key in fedavg:
        if not key.endswith("num_batches_tracked"):
            np.testing.assert_allclose(factor_average[key], fedavg[key], rtol=2e-6, atol=1e-7, err_msg=key)


def test_it_is_not_fedavg_on_adapters() -> None:
    """mean(B) mean(A) is not mean(BA): the test above must not pass for the wrong reason."""
    initial = record_of(mixed_state())
    ends = [
        strategy.start(InProcessGrid(noisy, 3), initial, num_rounds=1).arrays
        for strategy in (FedAvg(), FedFroM(k=0, examples_power=1))
    ]
    fedavg, fedfrom = (products(arrays_of(record))["base_model.model.q"] for record in ends)
    assert np.linalg.norm(fedfrom - fedavg) > 0.01 * np.linalg.norm(fedavg)


# --- FedAvg's arguments ----------------------------------------------------------------------------------------------


def test_fedavgs_arguments_pass_through() -> None:
    def sums(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
        assert weighted_by_key == "n"
        return MetricRecord({"seen": len(contents)})

    options = {
        "fraction_train": 0.5,
        "fraction_evaluate": 0.25,
        "min_train_nodes": 3,
        "min_evaluate_nodes": 1,
        "min_available_nodes": 4,
        "weighted_by_key": "n",
        "arrayrecord_key": "model",
        "configrecord_key": "settings",
        "train_metrics_aggr_fn": sums,
        "evaluate_metrics_aggr_fn": sums,
    }
    strategy = FedFroM(k=2, **options)
    assert {name: getattr(strategy, name) for name in options} == options

    def client(message: Message, context: Context) -> Message:
        assert set(message.content) == {"model", "settings"}
        metrics = MetricRecord({"n": 2})
        if message.metadata.message_type == "evaluate":
            return Message(RecordDict({"m": metrics}), reply_to=message)
        value = arrays_of(message.content["model"])["w"]
        moved = record_of({"w": value + int(context.node_config["partition-id"])})
        return Message(RecordDict({"model": moved, "m": metrics}), reply_to=message)

    grid = InProcessGrid(client, 4, record=True)
    result = strategy.start(grid, record_of({"w": np.zeros(3)}), num_rounds=1)
    assert not grid.errors
    asked = [t.message_type for t in grid.traffic if t.direction == "down"]
    assert asked == ["train"] * 3 + ["evaluate"]
    assert result.train_metrics_clientapp[1]["seen"] == 3
    assert result.evaluate_metrics_clientapp[1] == {"seen": 1}


def test_the_model_is_the_named_record_or_the_only_one() -> None:
    """A client that calls its ArrayRecord otherwise works under FedAvg; statistics may travel beside the named one."""

    def rename(content: RecordDict) -> None:
        content["my-own-name"] = content.pop("arrays")

    def add(content: RecordDict) -> None:
        content["statistics"] = record_of({"anything": np.ones(2)})

    ends = []
    for faults in ({}, {0: rename, 2: add}):
        strategy = FedFroM()
        ends.append(strategy.start(InProcessGrid(faulty(faults), 3), record_of(mixed_state()), num_rounds=2).arrays)
        assert strategy.reports[1].rejected == {}
    assert same_bits(*ends)


def test_flowers_client_side_clipping_composes_with_full_models() -> None:
    """fixedclipping_mod reads the message's only ArrayRecord and only ConfigRecord, and clips the whole update."""

    class Clipped:
        def __call__(self, message: Message, context: Context) -> Message:
            if message.metadata.message_type == "evaluate":
                return noisy(message, context)
            return fixedclipping_mod(message, context, noisy)

    state = {key: value for key, value in mixed_state().items() if value.dtype.kind == "f" and "lora" not in key}
    grid = InProcessGrid(Clipped(), 3, record=True)
    strategy = FedFroM()
    result = strategy.start(grid, record_of(state), num_rounds=2, train_config=ConfigRecord({KEY_CLIPPING_NORM: 0.05}))
    assert not grid.errors and not strategy.reports[2].rejected and not strategy.reports[2].failed
    for down, up in zip(crossed(grid, "down"), crossed(grid, "up"), strict=True):
        for i in range(3):
            sent, found = (arrays_of(content[i]["arrays"]) for content in (down, up))
            norm = np.sqrt(sum(np.linalg.norm(found[key] - sent[key]) ** 2 for key in sent))
            assert norm == pytest.approx(0.05, rel=1e-3)
    replies = [arrays_of(up[i]["arrays"]) for i in range(3)]
    expected = oracle(sent, replies, [10, 20, 30], **FEDFROM)
    assert far_apart(products(arrays_of(result.arrays)), expected) < 1e-6


def test_the_global_generators_are_left_alone(seed: int) -> None:
    """A user's own seeding must mean what it means under FedAvg or without fedfrom."""
    before = torch.get_rng_state().clone(), str(np.random.get_state())  # noqa: NPY002
    strategy = FedFroM(solver="alternating", fraction_train=0.5, min_train_nodes=1)
    strategy.start(InProcessGrid(noisy, 4), record_of(mixed_state()), num_rounds=2)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == str(np.random.get_state())  # noqa: NPY002
