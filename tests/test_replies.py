"""What replies may hold: one that is not what was sent is rejected alone, by name, whatever it holds."""

import json
import logging
import math
import resource
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedfrom import FedFroM
from fedfrom.merging.peft import layers as L
from fedfrom.merging.peft.configs import rank_and_scaling
from fedfrom.wire.adapter_configs import ADAPTER_KEY, config_to_record, record_to_config
from fedfrom.wire.contents import metric_record, model_record
from fedfrom.wire.metrics import comparable_metrics
from fedfrom.wire.outgoing import Outgoing
from fedfrom.wire.reading import read_reply
from fedfrom.wire.records import to_record, to_state, to_state_dict
from fedfrom.wire.sent import Sent
from tests.inprocess import InProcessGrid
from tests.models import Fault, arrays_of, crossed, faulty, mixed_state, noisy, record_of, same_bits

A = "base_model.model.q.lora_A.weight"
B = "base_model.model.q.lora_B.weight"
HEAD = "base_model.model.head.weight"
CONFIG = {"r": 4, "lora_alpha": 8, "use_rslora": False}


def put(key: str, value: Any) -> Fault:
    """Replace one array."""

    def fault(content: RecordDict) -> None:
        content["arrays"][key] = value if isinstance(value, Array) else Array(np.asarray(value))

    return fault


def edit(key: str, change: Callable[[np.ndarray], np.ndarray]) -> Fault:
    """Replace one array by a function of it."""

    def fault(content: RecordDict) -> None:
        content["arrays"][key] = Array(np.asarray(change(content["arrays"][key].numpy())))

    return fault


def metric(value: Any, key: str = "num-examples") -> Fault:
    def fault(content: RecordDict) -> None:
        content["metrics"][key] = value

    return fault


def drop(record: str, key: str | None = None) -> Fault:
    def fault(content: RecordDict) -> None:
        del (content if key is None else content[record])[record if key is None else key]

    return fault


def more(name: str, record: Any) -> Fault:
    def fault(content: RecordDict) -> None:
        content[name] = record

    return fault


def together(*faults: Fault) -> Fault:
    def fault(content: RecordDict) -> None:
        for one in faults:
            one(content)

    return fault


def with_entry(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.flat[-1] = value
        return array

    return change


def header(claim: str, body: bytes = b"") -> Array:
    """Return an Array whose .npy header says what it likes."""
    text = claim.encode() + b" " * (117 - len(claim)) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body
    return Array(dtype="float32", shape=(3, 10), stype="numpy.ndarray", data=data)


def config(**changes: Any) -> Fault:
    """Add an adapter config whose fields are altered; None leaves one out."""
    fields = {**CONFIG, "rank_pattern": "{}", "alpha_pattern": "{}", **changes}
    return more(ADAPTER_KEY, ConfigRecord({key: value for key, value in fields.items() if value is not None}))


SPOILED = {
    # what is wrong: (fault, what the reason must name)
    "a rank, as text says what to do": (edit(B, lambda b: b[:, :2]), [B, "lora_config", "fedfrom.client"]),
    "uint16 as bfloat16's bits": (edit(HEAD, lambda a: a.astype(np.uint16)), [HEAD, "float32", "uint16"]),
    "big-endian": (edit(HEAD, lambda a: a.astype(">f4")), [HEAD, "readable"]),
    "a product that float32 can't hold": (
        together(edit(A, with_entry(1e30)), edit(B, with_entry(1e30))),
        ["base_model.model.q", "product of norm"],
    ),
    "a tensor near the end of float32": (edit(HEAD, with_entry(3e38)), [HEAD, "up to"]),
    "strings": (put(HEAD, np.array(["a", "b"])), [HEAD, "readable"]),
    "no bytes": (put(HEAD, Array("float32", (3, 10), "numpy.ndarray", b"")), [HEAD, "readable"]),
    "not numpy's bytes": (put(HEAD, Array("float32", (3, 10), "numpy.ndarray", b"PK\x03\x04zip")), [HEAD, "readable"]),
    "bfloat16 cut short": (put(HEAD, Array("bfloat16", (3, 10), "fedfrom.bf16", b"\0" * 59)), [HEAD, "readable"]),
    "another serialisation": (put(HEAD, Array("float32", (3, 10), "torch.tensor", b"\0" * 120)), [HEAD, "readable"]),
    "cut short": (put(HEAD, header("{'descr':'<f4','fortran_order':False,'shape':(3, 10)}", b"\0" * 40)), [HEAD]),
    "a pickle": (put(HEAD, header("{'descr':'|O','fortran_order':False,'shape':()}", b"cos\nsystem\n.")), [HEAD]),
    "a header of 10^12": (put(HEAD, header("{'descr':'<f4','fortran_order':False,'shape':(10**12,)}")), [HEAD]),
    "a shape of 10^12": (put(HEAD, header("{'descr':'<f4','fortran_order':False,'shape':(1000000000000,)}")), [HEAD]),
    "a shape of 10^9": (put(HEAD, header("{'descr':'<f8','fortran_order':False,'shape':(1000000000,)}")), [HEAD]),
    "a shape that overflows": (
        put(HEAD, header("{'descr':'<f4','fortran_order':False,'shape':(2**40, 2**40)}")),
        [HEAD],
    ),
    "a shape below 0": (
        put(HEAD, header("{'descr':'<f4','fortran_order':False,'shape':(-3, 10)}", b"\0" * 120)),
        [HEAD],
    ),
    "a header nested deep": (put(HEAD, header("(" * 116)), [HEAD]),
    "no examples": (metric(0), ["num-examples", "> 0", "0"]),
    "negative examples": (metric(-3), ["num-examples", "-3"]),
    "NaN examples": (metric(math.nan), ["num-examples", "nan"]),
    "infinite examples": (metric(math.inf), ["num-examples", "inf"]),
    "examples as a list": (metric([10, 20]), ["num-examples", "[10, 20]"]),
    "no num-examples": (drop("metrics", "num-examples"), ["num-examples", "None"]),
    "no MetricRecord": (drop("metrics"), ["one MetricRecord", "[]"]),
    "two MetricRecords": (more("m", MetricRecord({"num-examples": 1})), ["one MetricRecord", "'m'", "'metrics'"]),
    "no ArrayRecord": (drop("arrays"), ["ArrayRecord", "'arrays'", "[]"]),
    "an empty ArrayRecord": (more("arrays", ArrayRecord()), ["5 missing"]),
    "two ArrayRecords, none the named": (
        together(more("x", record_of({"w": np.ones(1)})), more("y", record_of({"w": np.ones(1)})), drop("arrays")),
        ["'arrays'", "'x'", "'y'"],
    ),
    "a config of bytes": (config(lora_alpha=b"8"), ["lora_alpha"]),
    "rsLoRA as bytes": (config(use_rslora=b"yes"), ["use_rslora"]),
    "rsLoRA as a word": (config(use_rslora="False"), ["use_rslora"]),
    "a pattern that is no JSON": (config(rank_pattern="{"), ["rank_pattern"]),
    "a pattern nested deep": (config(rank_pattern="[" * 100_000), ["rank_pattern"]),
    "a pattern beyond any float": (config(rank_pattern='{"q": 1e999}'), ["rank_pattern", "q"]),
}


@pytest.fixture
def flower_log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="flwr")
    return caplog


@pytest.mark.parametrize("lora_config", [None, CONFIG], ids=["plain", "lora_config"])
@pytest.mark.parametrize("name", SPOILED)
def test_a_bad_reply_is_rejected_alone(name: str, lora_config: Any, flower_log: pytest.LogCaptureFixture) -> None:
    fault, named = SPOILED[name]
    strategy, grid = FedFroM(lora_config=lora_config), InProcessGrid(faulty({1: fault}), 3)
    result = strategy.start(grid, record_of(mixed_state()), num_rounds=1)
    assert not grid.errors  # the client did reply

    node = next(node for node, partition in grid.partition_of.items() if partition == 1)
    report = strategy.reports[1]
    assert list(report.rejected) == [node] and not report.failed
    for word in named:
        assert word in report.rejected[node]
    assert {grid.partition_of[n] for n in report.nodes} == {0, 2}
    assert any(
        f"node {node}" in record.getMessage() and report.rejected[node] in record.getMessage()
        for record in flower_log.records
        if record.levelno == logging.WARNING
    )
    assert result.train_metrics_clientapp[1]["replies-rejected"] == 1

    # and the rest is merged as if that client had never answered
    silent = InProcessGrid(noisy, 3, silent=[1])
    without = FedFroM(lora_config=lora_config).start(silent, record_of(mixed_state()), num_rounds=1)
    assert same_bits(result.arrays, without.arrays)


def test_a_finite_float64_update_whose_square_overflows_is_rejected() -> None:
    for key in (A, HEAD):
        strategy = FedFroM()
        grid = InProcessGrid(faulty({0: edit(key, with_entry(1e300))}), 3)
        result = strategy.start(grid, record_of(mixed_state(dtype=np.float64)), num_rounds=2)
        assert len(strategy.reports[1].rejected) == 1
        assert all(np.isfinite(value).all() for value in arrays_of(result.arrays).values())


def test_large_but_sane_updates_are_not_rejected() -> None:
    """float16 holds no more than 65504: the bound on an update must not be a bound on what trains."""
    for dtype, size in ((np.float16, 60.0), (np.float32, 1e12), (np.float64, 1e60)):
        strategy = FedFroM()
        fault = together(edit(A, with_entry(size)), edit(B, with_entry(size)), edit(HEAD, with_entry(size)))
        result = strategy.start(InProcessGrid(faulty({0: fault}), 3), record_of(mixed_state(dtype=dtype)), num_rounds=1)
        assert strategy.reports[1].rejected == {}
        assert all(np.isfinite(value).all() for value in arrays_of(result.arrays).values())


def test_a_lying_header_costs_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for shape in ("(1000000000000,)", "(1000000000,)", "(100000000, 5)"):
        for descr in ("<f4", "<f8", "|u1"):
            array = header(f"{{'descr':'{descr}','fortran_order':False,'shape':{shape}}}", b"\0" * 1000)
            with pytest.raises(Exception):  # noqa: B017 (numpy's own, which read_reply turns into a ValueError)
                to_state(ArrayRecord({"w": array}))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 200 * 1024  # KiB


# --- Whatever it holds -----------------------------------------------------------------------------------------------


def sent_and_replies(lora_config: Any = CONFIG) -> tuple[FedFroM, list[Message], dict[str, np.ndarray]]:
    """Return a strategy that has sent a state, and the sound replies of two clients."""
    strategy, state = FedFroM(lora_config=lora_config), mixed_state()
    grid = InProcessGrid(noisy, 2)
    messages = strategy.configure_train(1, record_of(state), ConfigRecord(), grid)
    return strategy, list(grid.send_and_receive(messages)), state


scalars = st.one_of(st.integers(-5, 20), st.integers(-(2**63), 2**63), st.floats(), st.booleans())
values = st.one_of(scalars, st.text(max_size=8), st.binary(max_size=8), st.lists(st.integers(-2, 9), max_size=3))
metric_values = st.one_of(
    st.integers(), st.floats(), st.lists(st.integers(), max_size=3), st.lists(st.floats(), max_size=3)
)
json_text = st.one_of(
    st.text(max_size=12),
    st.dictionaries(
        st.sampled_from(["q", "head", "(", ".*", "q|head", ""]),
        st.one_of(st.none(), scalars, st.text(max_size=4), st.lists(scalars, max_size=2)),
        max_size=2,
    ).map(json.dumps),
)
keys = st.sampled_from([*mixed_state(), "extra", "base_model.model.k.lora_A.weight", "lora_A.weight"])


@st.composite
def mutated_arrays(draw: st.DrawFn) -> Array:
    """Return a sound array whose bytes and metadata were altered in places."""
    array = Array(draw(st.sampled_from(list(mixed_state().values()))))
    data = bytearray(array.data)
    for _ in range(draw(st.integers(0, 3))):
        # the header is where it hurts most
        position = draw(st.one_of(st.integers(0, 127), st.integers(0, len(data) - 1)))
        data[position] = draw(st.integers(0, 255))
    data = data[: draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))] + draw(st.binary(max_size=4))
    shape = draw(st.one_of(st.just(array.shape), st.lists(st.integers(-1, 10**12), max_size=3).map(tuple)))
    stype = draw(st.sampled_from([array.stype, array.stype, array.stype, "fedfrom.bf16", ""]))
    return Array(draw(st.sampled_from([array.dtype, "float64", "bfloat16", "?"])), shape, stype, bytes(data))


extreme = st.sampled_from([0.0, -0.0, 1e-45, 1e-38, 1e10, 1e19, 1e30, 3.4e38, -3.4e38, math.nan, math.inf])
mutations = st.one_of(
    st.builds(put, keys, mutated_arrays()),
    st.builds(lambda key, value: edit(key, with_entry(value)), st.sampled_from([A, B, HEAD]), extreme),
    st.builds(lambda key, value: edit(key, lambda a: np.full_like(a, value)), st.sampled_from([A, B, HEAD]), extreme),
    st.builds(lambda key, n: edit(key, lambda a: a[:n]), st.sampled_from([A, HEAD]), st.integers(0, 4)),
    st.builds(
        lambda n: together(edit(A, lambda a: np.resize(a, (n, 12))), edit(B, lambda a: np.resize(a, (10, n)))),
        st.integers(0, 14),
    ),
    st.builds(lambda key: drop("arrays", key), keys),
    st.builds(metric, metric_values, st.sampled_from(["num-examples", "loss", "new"])),
    st.sampled_from([drop("metrics"), drop("arrays"), drop("metrics", "num-examples")]),
    st.builds(
        lambda fields: more(ADAPTER_KEY, ConfigRecord(fields)),
        st.fixed_dictionaries(
            {},
            optional={
                "r": st.one_of(st.just(4), values),
                "lora_alpha": st.one_of(st.just(8.0), values),
                "use_rslora": st.one_of(st.just(0), values),
                "rank_pattern": st.one_of(st.just("{}"), json_text),
                "alpha_pattern": st.one_of(st.just("{}"), json_text),
            },
        ),
    ),
    st.builds(config, r=st.integers(1, 14), rank_pattern=json_text, alpha_pattern=json_text),
    st.builds(more, st.sampled_from(["arrays", "metrics", "other"]), st.sampled_from([ArrayRecord(), MetricRecord()])),
)


@pytest.mark.parametrize("lora_config", [None, CONFIG], ids=["plain", "lora_config"])
@settings(max_examples=120)
@given(faults=st.lists(mutations, min_size=1, max_size=4))
def test_nothing_but_a_rejection_or_a_sound_merge(lora_config: Any, faults: list[Fault]) -> None:
    """Whether replies come as a list, and are measured together, or one by one."""
    strategy, (good, bad), state = sent_and_replies(lora_config)
    try:
        for fault in faults:
            fault(bad.content)
    except Exception:  # Flower refuses such a record, or one mutation needs what another spoiled
        assume(False)
    arrays, metrics = strategy.aggregate_train(1, [good, bad])

    merged = arrays_of(arrays)
    assert {k: (v.shape, v.dtype) for k, v in merged.items()} == {k: (v.shape, v.dtype) for k, v in state.items()}
    assert all(np.isfinite(value).all() for value in merged.values())
    assert metrics["replies-valid"] + metrics["replies-rejected"] == 2
    json.dumps(strategy.reports[1].to_dict())
    rejected = strategy.reports[1].rejected
    for reason in rejected.values():
        assert "expected" in reason and "found" in reason
    one_by_one, _ = strategy.aggregate_train(1, iter([good, bad]))
    assert same_bits(one_by_one, arrays) and strategy.reports[1].rejected == rejected


def read(message: Message, ranks_may_differ: bool = True, state: Any = None) -> Any:
    sent = to_state(record_of(mixed_state() if state is None else state))
    lora_config = {"r": 4, "lora_alpha": 4} if ranks_may_differ else None
    return read_reply(message, Sent(sent, L.find_layers(sent, "sent"), lora_config), "arrays", "num-examples")


def test_a_sound_reply_is_read_as_it_was_sent() -> None:
    _, (reply, _), _ = sent_and_replies()
    found = read(reply)
    sent = arrays_of(reply.content["arrays"])
    assert {k: v.numpy().tobytes() for k, v in found.state.items()} == {k: v.tobytes() for k, v in sent.items()}
    assert (found.node_id, found.examples, found.config) == (reply.metadata.src_node_id, 10.0, None)


@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_examples_beyond_any_float(value: int) -> None:
    """No message can carry them, but who calls from the same process can."""
    _, (reply, _), _ = sent_and_replies()
    reply.content["metrics"]["num-examples"] = value
    with pytest.raises(ValueError, match="num-examples"):
        read(reply)


# --- Records ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool, torch.uint8, torch.int16],
)
def test_records_keep_the_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    state = {
        "a": (torch.randn(4, 5) * 3).to(dtype),
        "b": (torch.randn(5, 4) * 3).T.to(dtype),
        "c": torch.zeros((), dtype=dtype),
        "d": torch.zeros((0, 3), dtype=dtype),
        "e": (torch.randn(4, 9) * 3).to(dtype)[::2, 1::3],
    }
    before = {key: value.clone() for key, value in state.items()}
    record = to_record(state)
    back, copies = to_state(record), to_state_dict(record)
    assert list(back) == list(copies) == list(state)
    for key, value in back.items():
        assert value.dtype == copies[key].dtype == dtype and value.shape == copies[key].shape == state[key].shape
        assert torch.equal(value, state[key]) and torch.equal(copies[key], state[key])
        copies[key].zero_()  # new memory
    assert all(torch.equal(state[key], before[key]) and torch.equal(back[key], before[key]) for key in state)
    spent = dict(state)
    assert same_bits(Outgoing().record(spent), record) and not spent


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (300, 500), (1500, 1500)])
def test_memory_of_what_goes_out_is_the_records(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    outgoing, cpu = Outgoing(), torch.device("cpu")
    given = outgoing.empty(shape, dtype=dtype, device=cpu)
    kept = outgoing.empty(shape, dtype=dtype, device=cpu)
    part = outgoing.empty((shape[0], 2 * shape[1]), dtype=dtype, device=cpu)
    for tensor in (given, kept, part[:, : shape[1]]):
        tensor.copy_(values)
    where = given.data_ptr()
    state = {"given": given, "kept": kept, "part": part[:, : shape[1]], "other": values}
    del given
    found = outgoing.record(state)
    assert same_bits(found, to_record(dict.fromkeys(found, values))) and not state
    kept.zero_()  # who still has a tensor can't change what was sent
    assert torch.equal(to_state(found)["kept"], values)
    large = values.nbytes >= 1 << 16
    assert (to_state(found)["given"].data_ptr() == where) == large


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i8", "i4", "u1", "?"])
def test_records_are_flowers_own_to_the_byte(dtype: str) -> None:
    for shape in ((), (0,), (3,), (2, 0, 4), (3, 4, 5)):
        value = np.random.default_rng(0).normal(scale=3, size=shape).astype(dtype)
        (found,) = to_record({"w": torch.from_numpy(np.asarray(value))}).values()
        own = Array(np.asarray(value))
        assert (found.dtype, found.shape, found.stype, found.data) == (own.dtype, own.shape, own.stype, own.data)
        np.testing.assert_array_equal(found.numpy(), value)
        read = to_state(ArrayRecord({"w": own}))["w"]
        assert read.shape == shape and np.array_equal(read.numpy(), value)


def test_arrays_are_read_where_they_lie() -> None:
    """Whatever the order in memory; a header of another length leaves numbers unaligned, which are then copied."""
    draw = np.random.default_rng(0)
    for value in (draw.normal(size=(3, 4)), np.asfortranarray(draw.normal(size=(3, 4))), draw.normal(size=7)):
        array = Array(value)
        start = np.frombuffer(array.data, np.uint8).ctypes.data
        found = to_state(ArrayRecord({"w": array}))["w"]
        assert start < found.data_ptr() < start + len(array.data)
        np.testing.assert_array_equal(found.numpy(), value)
        del array
        np.testing.assert_array_equal(found.numpy(), value)  # it keeps what it looks at
    odd = b"{'descr':'<f8','fortran_order':False,'shape':(2,)}\n"
    data = b"\x93NUMPY\x01\x00" + len(odd).to_bytes(2, "little") + odd + np.array([1.5, -2.0]).tobytes()
    assert to_state(ArrayRecord({"w": Array("float64", (2,), "numpy.ndarray", data)}))["w"].tolist() == [1.5, -2.0]


def test_reading_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_state(to_record({"w": torch.zeros(3), "h": torch.zeros(3, dtype=torch.bfloat16)}))


def test_bfloat16_is_half_of_float32_and_nothing_takes_its_bits_for_numbers() -> None:
    (array,) = to_record({"w": torch.zeros(1000, dtype=torch.bfloat16)}).values()
    assert len(array.data) == 2000 and array.dtype == "bfloat16"
    with pytest.raises(TypeError):
        array.numpy()
    with pytest.raises(TypeError, match="'w'.*float8"):
        to_record({"w": torch.zeros(2, dtype=torch.float8_e4m3fn)})


@pytest.mark.parametrize(
    ("dtype", "shape", "data"),
    [
        ("bfloat16", (3,), b"\0" * 5),
        ("bfloat16", (10**12,), b"\0" * 6),
        ("bfloat16", (-3,), b"\0" * 6),
        ("bfloat16", (-1, -3), b"\0" * 6),
        ("float32", (3,), b"\0" * 6),
        ("bfloat16", (2**62, 4), b"\0" * 6),
    ],
)
def test_bfloat16_whose_size_lies(dtype: str, shape: tuple[int, ...], data: bytes) -> None:
    with pytest.raises(ValueError, match="'w': expected a readable array, found ValueError: expected"):
        to_state(ArrayRecord({"w": Array(dtype, shape, "fedfrom.bf16", data)}))


def test_a_config_comes_back_with_its_expressions_spelled_out() -> None:
    config = {
        "r": 8,
        "lora_alpha": 20,
        "use_rslora": True,
        "rank_pattern": {"q": 4, r"layers\.\d+\.k": 2},
        "alpha_pattern": {"q": 3.5},
    }
    modules = ["base_model.model.layers.0.k", "base_model.model.layers.0.q", "base_model.model.k", "base_model.model.q"]
    found = record_to_config(config_to_record(config, modules))
    assert {name: rank_and_scaling(found, name) for name in modules} == {
        name: rank_and_scaling(config, name) for name in modules
    }
    assert set(found["rank_pattern"]) == {name.removeprefix("base_model.model.") for name in modules}


def test_a_config_of_the_least_fields() -> None:
    found = record_to_config(config_to_record({"r": 8, "lora_alpha": 16}, ["q"]))
    assert rank_and_scaling(found, "q") == (8, 2.0)


def test_no_expression_that_came_in_a_message_is_run() -> None:
    record = config_to_record({"r": 8, "lora_alpha": 16}, ["q"])
    record["rank_pattern"] = json.dumps({r"(\w+\.?)+X": 4})
    with pytest.raises(ValueError, match="expected module names, found"):
        record_to_config(record)


def test_model_record_prefers_the_name() -> None:
    one, other = record_of({"w": np.zeros(1)}), record_of({"w": np.ones(1)})
    assert model_record(RecordDict({"statistics": one, "arrays": other}), "arrays") is other
    assert model_record(RecordDict({"weights": one, "m": MetricRecord()}), "arrays") is one
    with pytest.raises(ValueError, match=r"'arrays'.*'a', 'b'"):
        model_record(RecordDict({"b": one, "a": other}), "arrays")


def test_metric_record_accepts_any_name_and_float_counts() -> None:
    record = MetricRecord({"num-examples": 0.5})
    assert metric_record(RecordDict({"whatever": record}), "num-examples") is record


def test_comparable_metrics_leaves_alone_what_can_be_averaged() -> None:
    contents = [RecordDict({"m": MetricRecord({"n": i, "a": 1.0, "l": [1.0, 2.0]})}) for i in range(3)]
    kept, dropped, left_out = comparable_metrics(contents)
    assert dropped == [] and left_out == 0 and all(a is b for a, b in zip(kept, contents, strict=True))


def test_comparable_metrics_drops_what_most_replies_lack() -> None:
    records = [
        {"n": 1, "both": 1.0, "mine": 2.0, "list": [1.0], "kind": 1.0},
        {"n": 2, "both": 3.0, "yours": 4.0, "list": [1.0, 2.0], "kind": [1.0]},
    ]
    contents = [
        RecordDict({name: MetricRecord(record), "arrays": ArrayRecord()})
        for name, record in zip("xy", records, strict=True)
    ]
    kept, dropped, left_out = comparable_metrics(contents)
    assert dropped == ["kind", "list", "mine", "yours"] and left_out == 0
    assert [dict(next(iter(c.metric_records.values()))) for c in kept] == [{"n": 1, "both": 1.0}, {"n": 2, "both": 3.0}]
    assert all("arrays" in content for content in kept)
    assert dict(contents[0]["x"]) == records[0]  # the replies themselves are not changed


def test_bytes_cross_as_they_are() -> None:
    """The oracle of the tests above: what `crossed` shows is what the clients sent."""
    grid = InProcessGrid(noisy, 2, record=True)
    FedFroM().start(grid, record_of(mixed_state()), num_rounds=1)
    assert set(crossed(grid, "up")[0]) == {0, 1}
