"""bfloat16 and float16 from end to end, and replies that are what was changed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedfrom import FedFroM, FedMerge, FroM, client, merge, to_record, to_state_dict
from fedfrom.merging.clients import Client, Round
from fedfrom.merging.merge import merge_clients
from fedfrom.merging.methods.registry import make_method
from fedfrom.wire.digests import digests
from fedfrom.wire.records import DELTA, delta_array
from tests.inprocess import InProcessGrid
from tests.merging import oracle
from tests.models import adapted, crossed, mixed_state, net, record_of, same_bits

HEAD = "base_model.model.head.weight"
State = dict[str, torch.Tensor]


def state_of(dtype: torch.dtype, seed: int = 0) -> State:
    tensors = {key: torch.from_numpy(np.asarray(value)) for key, value in mixed_state(seed=seed).items()}
    tensors["large"] = torch.from_numpy(np.random.default_rng(seed).normal(size=(400, 500)))
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}


def moving(message: Message, context: Context) -> Message:
    """Answer with numbers of the dtype that came, each moved by noise of the partition's own."""
    partition = int(context.node_config["partition-id"])
    content = RecordDict({"metrics": MetricRecord({"num-examples": 10 * (partition + 1)})})
    if message.metadata.message_type == "train":
        g = torch.Generator().manual_seed(partition)
        state = to_state_dict(message.content["arrays"])
        for key, value in state.items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=g, dtype=torch.float64)
                state[key] = (value.double() + 0.3 * (partition + 1) * noise).to(value.dtype)
        content["arrays"] = to_record(state)
    return Message(content, reply_to=message)


@pytest.mark.parametrize("memory_budget", [None, 0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_are_the_oracles_but_for_one_rounding(dtype: torch.dtype, memory_budget: Any, tmp_path: Path) -> None:
    initial = to_record(state_of(dtype))
    grid = InProcessGrid(moving, 3, record=True)
    strategy = FedFroM(memory_budget=memory_budget, spool=tmp_path)
    result = strategy.start(grid, initial, num_rounds=1)
    assert not grid.errors and strategy.reports[1].valid == 3
    sent = to_state_dict(crossed(grid, "down")[0][0]["arrays"])
    replies = [to_state_dict(crossed(grid, "up")[0][i]["arrays"]) for i in range(3)]
    found = to_state_dict(result.arrays)
    for key in (HEAD, "large"):
        layer = oracle.Layer([state[key] for state in replies], [sent[key]] * 3, sent[key])
        median = sorted(layer.norms)[1]
        shorter = [min(1.0, median / norm) for norm in layer.norms]
        w = oracle.weights([n * c for n, c in zip(layer.norms, shorter, strict=True)], 0.5, [10, 20, 30], 0.5)
        expected = layer.target([a * c for a, c in zip(w, shorter, strict=True)])
        assert found[key].dtype == dtype
        assert torch.allclose(found[key].double(), expected, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-5)
    wide = sum(len(array.data) for array in to_record(state_of(torch.float32)).values())
    assert sum(len(array.data) for array in result.arrays.values()) < 0.51 * wide


def test_checkpoints_keep_bfloat16(tmp_path: Path) -> None:
    initial, folder = to_record(state_of(torch.bfloat16)), tmp_path / "run"
    expected = FedFroM().start(InProcessGrid(moving, 3), initial, num_rounds=3).arrays
    FedFroM(checkpoint=folder).start(InProcessGrid(moving, 3), initial, num_rounds=2)
    found = FedFroM(checkpoint=folder).start(InProcessGrid(moving, 3), initial, num_rounds=3).arrays
    assert same_bits(found, expected) and {array.stype for array in found.values()} >= {"fedfrom.bf16"}
    from safetensors.torch import load_file

    assert load_file(folder / "round-0003" / "arrays.safetensors")["large"].dtype == torch.bfloat16


def test_digests_are_of_the_numbers() -> None:
    states = [state_of(dtype, seed) for dtype in (torch.bfloat16, torch.float32) for seed in (0, 1)]
    found = [digests(to_record(state)) for state in states]
    for key in states[0]:
        same = key.endswith("num_batches_tracked")  # 7 in all of them
        assert len({each[key] for each in found}) == (1 if same else len(found))
    assert found[0] == digests(to_record(states[0]))


def test_clients_load_and_reply_in_bfloat16() -> None:
    initial = net().to(torch.bfloat16)
    message = next(iter(asked(to_record(initial.state_dict()))))
    model = net(seed=1).to(torch.bfloat16)
    client.load(model, message)
    assert all(torch.equal(value, initial.state_dict()[key]) for key, value in model.state_dict().items())
    reply = client.reply(model, message, {"num-examples": 1})
    assert same_bits(reply.content["arrays"], message.content["arrays"])


def reading(message: Message, context: Context) -> Message:
    """Read what came as Flower's own examples do."""
    state = message.content["arrays"].to_torch_state_dict()
    return Message(RecordDict({"arrays": ArrayRecord(state)}), reply_to=message)


def listing(message: Message, context: Context) -> Message:
    """Read what came as Flower's own examples of other frameworks do."""
    return Message(RecordDict({"arrays": ArrayRecord(message.content["arrays"].to_numpy_ndarrays())}), reply_to=message)


def sending(message: Message, context: Context) -> Message:
    """Send what came as Flower's own examples do."""
    state = to_state_dict(message.content["arrays"])
    return Message(RecordDict({"arrays": ArrayRecord(state)}), reply_to=message)


@pytest.mark.parametrize(
    ("app", "remedies"),
    [
        (reading, ["fedfrom.to_state_dict", "fedfrom.client.load"]),
        (listing, ["fedfrom.to_state_dict", "fedfrom.client.load"]),
        (sending, ["fedfrom.to_record", "fedfrom.client.reply"]),
    ],
)
def test_a_client_with_flowers_own_conversions_is_told_which_to_use(
    app: Any, remedies: list[str], flower_log: pytest.LogCaptureFixture
) -> None:
    """In the log, of train and evaluate replies, in the report, and in the error that ends the run."""
    strategy = FedFroM()
    with pytest.raises(RuntimeError, match="errors alone") as ended:
        strategy.start(InProcessGrid(app, 2), to_record(net().to(torch.bfloat16).state_dict()), num_rounds=1)
    lines = [r.getMessage() for r in flower_log.records if "error in reply" in r.getMessage()]
    assert len(strategy.reports[1].failed) == 2 and len(lines) == 4
    for text in (*strategy.reports[1].failed.values(), *lines, str(ended.value)):
        assert "TypeError" in text and all(remedy in text for remedy in remedies)


def test_no_other_error_is_taken_for_bfloat16() -> None:
    def app(message: Message, context: Context) -> Message:
        message.content["arrays"].to_torch_state_dict()
        raise TypeError("Unsupported serialization type")

    strategy = FedFroM()
    with pytest.raises(RuntimeError, match="errors alone"):
        strategy.start(InProcessGrid(app, 2), to_record(net().state_dict()), num_rounds=1)
    assert set(strategy.reports[1].failed.values()) == {"TypeError: Unsupported serialization type"}


def asked(arrays: ArrayRecord, clients: int = 3) -> list[Message]:
    return FedFroM().configure_train(1, arrays, ConfigRecord(), InProcessGrid(moving, clients))


# --- Deltas ----------------------------------------------------------------------------------------------------------


class Linear(torch.nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        self.bn = torch.nn.Module()
        self.bn.register_buffer("running_mean", weight.detach()[0].clone())
        self.register_buffer("count", torch.tensor(3))


def weights_of(replies: str) -> tuple[list[float], torch.Tensor, torch.Tensor]:
    """Three clients' weights at k = 1, who change W by 1, 2 and 4 thousandths; the result, and the oracle's."""
    g = torch.Generator().manual_seed(0)
    W = torch.randn(200, 300, generator=g)
    noise = [torch.randn(200, 300, generator=g) for _ in range(3)]
    changes = [
        (size * float(W.norm()) / float(theta.norm())) * theta
        for theta, size in zip(noise, (1e-3, 2e-3, 4e-3), strict=True)
    ]

    def app(message: Message, context: Context) -> Message:
        i = int(context.node_config["partition-id"])
        model = Linear(torch.zeros_like(W))
        client.load(model, message)
        with torch.no_grad():
            model.weight += changes[i]
            model.bn.running_mean += i
        if replies == "values":
            rounded = {k: v.bfloat16().float() if v.is_floating_point() else v for k, v in model.state_dict().items()}
            content = {"arrays": to_record(rounded), "metrics": MetricRecord({"num-examples": 1})}
            return Message(RecordDict(content), reply_to=message)
        return client.reply(model, message, {"num-examples": 1}, as_delta=True)

    strategy = FedFroM(k=1, examples_power=0, clip=None, fraction_evaluate=0.0)
    grid = InProcessGrid(app, 3, record=True)
    result = strategy.start(grid, to_record(Linear(W).state_dict()), num_rounds=1)
    assert not grid.errors and strategy.reports[1].valid == 3, strategy.reports[1].rejected
    if replies == "deltas":
        up = crossed(grid, "up")[0][0]["arrays"]
        assert up["weight"].stype == DELTA and len(up["weight"].data) == 2 * W.numel()
        assert up["bn.running_mean"].stype == up["count"].stype == "numpy.ndarray"
    layers = {layer.name: layer for layer in strategy.reports[1].merge.layers}
    mean = to_state_dict(result.arrays)["bn.running_mean"].float()
    assert torch.allclose(mean, W[0] + 1, rtol=1e-2, atol=1e-2)
    expected = oracle.Layer([W.double() + change for change in changes], [W] * 3, W)
    place = {node: grid.partition_of[node] for node in strategy.reports[1].nodes}
    ordered = dict(zip(place.values(), layers["weight"].weights, strict=True))
    return (
        [ordered[i] for i in range(3)],
        to_state_dict(result.arrays)["weight"],
        expected.target(expected.weights(1.0)),
    )


def test_rounding_what_clients_end_with_spoils_the_weights_and_deltas_do_not() -> None:
    found, merged, expected = weights_of("deltas")
    assert found == pytest.approx([1 / 7, 2 / 7, 4 / 7], rel=2e-3)
    assert merged.dtype == torch.float32
    update = expected - merged.double()
    assert float(update.norm()) < 1e-2 * 3e-3 * float(expected.norm())
    spoiled, _, _ = weights_of("values")
    assert spoiled == pytest.approx([0.205, 0.303, 0.491], abs=0.02)  # not vacuous


SHARED = {"clip", "server_lr"}
METHODS: list[dict[str, Any]] = [
    {"method": "from", "k": 1.0, "clip": 1.0},
    {"method": "from", "scope": "model", "server_lr": 0.5},
    {"method": "average"},
    {"method": "ties"},
    {"method": "dare-from"},
]


@pytest.mark.parametrize("options", METHODS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_deltas_merge_as_the_values_that_they_lead_to(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Powers of two and small whole numbers: no value is rounded in any of these dtypes."""
    g = torch.Generator().manual_seed(0)
    W = torch.randint(-8, 8, (30, 40), generator=g).to(dtype)
    changes = [torch.randint(-3, 4, (30, 40), generator=g).to(torch.bfloat16) for _ in range(3)]
    values = [{"w": W + change.to(dtype)} for change in changes]
    expected, report = merge(values, {"w": W}, **options)
    for senders in ([0, 1, 2], [1]):
        states = [{"w": changes[i]} if i in senders else values[i] for i in range(3)]
        own_options = {name: value for name, value in options.items() if name not in SHARED | {"method"}}
        method = make_method(options["method"], **own_options)
        shared = Round({"w": W}, **{name: value for name, value in options.items() if name in SHARED})
        clients = [Client(state, deltas=["w"] if i in senders else []) for i, state in enumerate(states)]
        found, own = merge_clients(clients, shared, method)
        assert found["w"].dtype == dtype
        if dtype == torch.float64:  # the norms of changes in bfloat16 are float32's
            torch.testing.assert_close(found["w"], expected["w"], rtol=1e-6, atol=1e-6)
            continue
        assert torch.equal(found["w"], expected["w"])
        assert own.layers[0].norms == report.layers[0].norms and own.layers[0].weights == report.layers[0].weights


def test_deltas_of_what_has_none_are_refused() -> None:
    W = {"w": torch.ones(3), "bn.running_mean": torch.ones(3)}
    for names in (["bn.running_mean"], ["nobody"]):
        with pytest.raises(ValueError, match=f"client 1, '{names[0]}': expected a delta of a plain tensor"):
            merge_clients([Client(W), Client(W, "client 1", deltas=names)], Round(W), FroM())
    with pytest.raises(ValueError, match="reference"):
        merge_clients([Client(W), Client(W, deltas=["w"])], Round(), FroM(k=0.0))


@pytest.mark.parametrize(
    ("key", "array", "words"),
    [
        (HEAD, delta_array(torch.zeros(3, 11)), ["(3, 11)"]),
        (HEAD, Array("bfloat16", (3, 10), DELTA, b"\0" * 59), ["60 bytes", "59"]),
        (HEAD, Array("int16", (3, 10), DELTA, b"\0" * 60), ["int16"]),
        (HEAD, delta_array(torch.full((3, 10), float("nan"))), ["finite"]),
        (HEAD, delta_array(torch.full((3, 10), 3e38)), ["3e+38"]),
        ("base_model.model.q.lora_A.weight", delta_array(torch.zeros(4, 12)), ["delta"]),
        ("base_model.model.norm.running_mean", delta_array(torch.zeros(10)), ["delta"]),
        ("base_model.model.norm.num_batches_tracked", delta_array(torch.zeros(())), ["int64"]),
    ],
    ids=str,
)
def test_a_bad_delta_is_rejected_alone(key: str, array: Array, words: list[str]) -> None:
    def app(message: Message, context: Context) -> Message:
        reply = moving(message, context)
        if context.node_config["partition-id"] == 1 and message.metadata.message_type == "train":
            reply.content["arrays"][key] = array
        return reply

    strategy = FedFroM()
    result = strategy.start(InProcessGrid(app, 3), record_of(mixed_state()), num_rounds=1)
    (reason,) = strategy.reports[1].rejected.values()
    for word in (key, *words):
        assert word in reason
    without = FedFroM().start(InProcessGrid(moving, 3, silent=[1]), record_of(mixed_state()), num_rounds=1)
    assert same_bits(result.arrays, without.arrays)


def test_multikrum_and_the_disk_take_deltas(tmp_path: Path) -> None:
    def app(as_delta: bool) -> Any:
        def answer(message: Message, context: Context) -> Message:
            i = int(context.node_config["partition-id"])
            model = net()
            client.load(model, message)
            g = torch.Generator().manual_seed(i)
            with torch.no_grad():
                for value in model.parameters():
                    value += 0.01 * (20 if i == 3 else 1) * torch.randn(value.shape, generator=g)
            options = {"as_delta": torch.float32} if as_delta else {}
            return client.reply(model, message, {"num-examples": 5}, **options)

        return answer

    ends = []
    for as_delta, budget in ((False, None), (True, None), (True, 0)):
        strategy = FedMerge("average", select="multikrum", attackers=1, memory_budget=budget, spool=tmp_path)
        strategy.fraction_evaluate = 0.0
        grid = InProcessGrid(app(as_delta), 6)
        ends.append(strategy.start(grid, to_record(net().state_dict()), num_rounds=1).arrays)
        assert not grid.errors
        assert {grid.partition_of[node] for node in strategy.reports[1].rejected} == {3}
    for key, value in to_state_dict(ends[0]).items():
        torch.testing.assert_close(to_state_dict(ends[1])[key], value, rtol=1e-5, atol=1e-7)
    assert same_bits(ends[1], ends[2])


def test_an_adapters_factors_go_as_they_are_and_flowers_own_strategies_refuse_deltas() -> None:
    model = adapted()
    message = next(iter(asked(to_record(client.adapter_state(model)))))
    reply = client.reply(model, message, {"num-examples": 5}, as_delta=True)
    stypes = {key: array.stype for key, array in reply.content["arrays"].items()}
    assert all(
        (stype == DELTA) == ("head" in key or key.endswith(("norm.weight", "norm.bias")))
        for key, stype in stypes.items()
    )
    with pytest.raises(TypeError):
        FedAvg().aggregate_train(1, [reply])
    with pytest.raises(ValueError, match="as_delta"):
        client.reply(model, message, {"num-examples": 5}, as_delta=torch.int8)
