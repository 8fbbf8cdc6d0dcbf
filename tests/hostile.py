"""What hostile input is drawn from, an oracle for what gets accepted, and a watch over what code does meanwhile."""

import contextlib
import io
import json
import math
import os
import pickle
import re
import signal
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.torch
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from fedfrom.wire.records import ADAPTER_KEY, STATISTICS_KEY
from tests.conftest import ROOT
from tests.models import Arrays, Fault, Scaling, factors, modules_of, record_of, truncated

PREFIX = "base_model.model."
Q, V, WORDS = (PREFIX + name for name in ("q", "layers.0.v", "words"))
HEAD, NORM = PREFIX + "head.weight", PREFIX + "norm"
CONFIG = {"r": 4, "lora_alpha": 8, "use_rslora": False}


def cases(number: int) -> Callable[[Any], Any]:
    """Run a test on so many cases with the profile that `make test` has, on more with one that has more examples."""
    return settings(max_examples=max(1, number * settings().max_examples // 50))


def mixed_state(rank: int = 4, seed: int = 0, dtype: type = np.float32) -> Arrays:
    """Return a state with all that a reply may hold: Linear with and without bias, embedding, tensors, buffers."""
    draw = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return np.asarray(draw.normal(size=shape)).astype(dtype)

    return {
        f"{Q}.lora_A.weight": normal(rank, 12),
        f"{Q}.lora_B.weight": normal(10, rank),
        f"{V}.lora_A.weight": normal(rank, 5),
        f"{V}.lora_B.weight": normal(6, rank),
        f"{V}.lora_B.bias": normal(6),
        f"{WORDS}.lora_embedding_A": normal(rank, 9),
        f"{WORDS}.lora_embedding_B": normal(7, rank),
        HEAD: normal(3, 10),
        f"{NORM}.running_mean": normal(10),
        f"{NORM}.num_batches_tracked": np.array(7),
    }


def moved(state: Arrays, seed: int, step: float = 0.1) -> Arrays:
    """Return what a client makes of a state: every real number a step away, every whole one a few more."""
    draw = np.random.default_rng(seed)
    return {
        key: (value + step * draw.normal(size=value.shape)).astype(value.dtype)
        if value.dtype.kind == "f"
        else value + seed % 5
        for key, value in state.items()
    }


def grams(seed: int) -> Arrays:
    """Return Gram matrices of the inputs of `mixed_state`'s linear layers."""
    draw = np.random.default_rng(seed)
    inputs = {name: draw.normal(size=(40, d)).astype(np.float32) for name, d in ((Q, 12), (V, 5), (HEAD[:-7], 10))}
    return {name: x.T @ x / 40 for name, x in inputs.items()}


def fishers(state: Arrays, seed: int) -> Arrays:
    """Return Fisher diagonals of a state's tensors."""
    return {key: value**2 for key, value in moved(state, seed).items() if value.dtype.kind == "f"}


# --- Values ----------------------------------------------------------------------------------------------------------

BOMB = r"(\w+\.?)+X"
"""Takes longer than anybody waits on a module name of sixty letters."""

PATHS = ["../../../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "~root/.ssh/id_rsa", "a/../../b", "C:\\x", "\0"]
texts = st.one_of(
    st.text(max_size=8),
    st.sampled_from([*PATHS, "", "\n", "a\nb", "four", "4", "NaN", "%s%n", "{}", "Q" * 300, "\ud800"]),
    st.integers(3, 5).map(lambda n: "x" * 10**n),
)
odd_numbers = st.sampled_from(
    [0, -1, True, 0.5, -0.0, 1e-320, 1e308, 10**18, 2**63, 10**400, -(10**400), math.nan, math.inf, -math.inf]
)
numbers = st.one_of(st.integers(-3, 20), st.integers(), st.floats(), odd_numbers)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=4,
)
"""What json.loads may return from a file that somebody else wrote."""

expressions = st.one_of(
    st.sampled_from(
        ["q", "v", r"layers\.0\.v", ".*", "q|words", "^q", r".*\.\d+\.v", "(q)", "words$", "", "q.", r"[qv]", "(?i)Q"]
    ),
    st.sampled_from([BOMB, "(a+)+$", "(.*)*X", "(a|a)" * 40, ".*" * 30 + "X", "a?" * 40 + "a" * 40, "(?:.|.)+X"]),
    st.sampled_from(
        ["(", "[", "*", "(?P<", "a{99999999999}", "(" * 3000 + ")" * 3000, "\\", "(?z)", "a{3,1}", "[b-a]"]
    ),
    texts,
)
patterns = st.one_of(
    st.dictionaries(expressions, st.one_of(st.integers(1, 12), numbers, json_values), max_size=3), json_values
)
extremes = st.sampled_from(
    [0.0, -0.0, 1e-45, 1e-38, 1e-10, 1e4, 6e4, 1e10, 1e19, 1e30, 1e38, 3.4e38, -3.4e38, 1e70, 1e300, math.nan, math.inf]
)
DTYPES = ["<f2", "<f4", "<f8", ">f4", "<c8", "<i1", "<i4", "<i8", "<u2", "<u8", "|b1", "<M8[s]", "<U3", "|V4"]
shapes = st.one_of(
    st.lists(st.integers(0, 12), max_size=4).map(tuple),
    st.sampled_from([(10**12,), (10**6, 10**6), (2**62,), (2**32, 2**32), (-1,), (-3, 10), (0, 10**12), (1,) * 70]),
)


# --- Replies ---------------------------------------------------------------------------------------------------------


def npy(descr: str, shape: Any, body: bytes, fortran: str = "False", version: bytes = b"\x01\x00") -> bytes:
    """Return .npy bytes whose header says what it likes."""
    text = f"{{'descr':{descr},'fortran_order':{fortran},'shape':{shape},}}".encode(errors="replace")
    text += b" " * (-(10 + len(text) + 1) % 64) + b"\n"
    size = 2 if version[0] == 1 else 4
    return b"\x93NUMPY" + version + len(text).to_bytes(size, "little") + text + body


@st.composite
def odd_arrays(draw: st.DrawFn, value: np.ndarray) -> Array:
    """Draw an array that claims to be like `value`: its bytes, header, shape, dtype or serialisation altered."""
    array = Array(np.asarray(value))
    dtype = draw(st.sampled_from([array.dtype] * 4 + ["float64", "bfloat16", "object", "?"]))
    shape = draw(st.one_of(st.just(array.shape), st.just(array.shape), shapes))
    stype = draw(st.sampled_from([array.stype] * 6 + ["fedfrom.bf16", "pickle", "torch.save", ""]))
    kind = draw(st.sampled_from(["bytes", "header", "header", "raw"]))
    if kind == "raw":
        data = draw(
            st.one_of(
                st.binary(max_size=40),
                st.sampled_from(
                    [
                        b"",
                        b"cos\nsystem\n(S'true'\ntR.",
                        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
                        b"PK\x03\x04" + b"\0" * 40,
                        b"PK\x05\x06" + b"\0" * 18,
                    ]
                ),
            )
        )
    elif kind == "header":
        descr = draw(st.sampled_from([*(repr(d) for d in DTYPES), "'|O'", "[('a','<f4')]", "'O'", "1", "'<f4,<f4'"]))
        claim = draw(st.one_of(st.just(array.shape), shapes, st.just("(3, 10L)"), st.just("(" * 99)))
        body = draw(
            st.one_of(st.just(value.tobytes()), st.binary(max_size=300), st.just(b"cos\nsystem\n(S'true'\ntR."))
        )
        data = npy(descr, claim, body, draw(st.sampled_from(["False", "False", "True", "2"])), version(draw))
    else:
        altered = bytearray(array.data)
        for _ in range(draw(st.integers(0, 3))):
            # the header is where it hurts most
            place = draw(st.one_of(st.integers(0, 127), st.integers(0, len(altered) - 1)))
            altered[place] = draw(st.integers(0, 255))
        end = draw(st.one_of(st.just(len(altered)), st.integers(0, len(altered))))
        data = bytes(altered[:end]) + draw(st.binary(max_size=4))
    return Array(dtype, shape, stype, data)


def version(draw: st.DrawFn) -> bytes:
    return draw(st.sampled_from([b"\x01\x00"] * 4 + [b"\x02\x00", b"\x03\x00", b"\x09\x00"]))


@st.composite
def odd_values(draw: st.DrawFn, value: np.ndarray) -> np.ndarray:
    """Draw a well-formed array that is not, or only just, what an honest client would send in place of `value`."""
    value = np.asarray(value)
    kind = draw(st.sampled_from(["entry", "fill", "scale", "cast", "shape", "cut", "flip"]))
    with np.errstate(all="ignore"):
        if kind == "entry" and value.size and value.dtype.kind == "f":
            value = value.copy()
            value.flat[draw(st.integers(0, value.size - 1))] = draw(extremes)
        elif kind == "fill" and value.dtype.kind == "f":
            value = np.full_like(value, draw(extremes))
        elif kind == "scale" and value.dtype.kind == "f":
            value = (value * draw(extremes)).astype(value.dtype)
        elif kind == "cast":
            value = value.astype(draw(st.sampled_from(DTYPES[:12])))
        elif kind == "shape":
            shape = draw(st.lists(st.integers(0, 12), max_size=4).map(tuple))
            value = np.resize(value, shape)
        elif kind == "cut" and value.ndim:
            value = value[: draw(st.integers(0, 4))]
        else:
            value = value.T
    return value


def _put(record: str, key: str, array: Array) -> Fault:
    def fault(content: RecordDict) -> None:
        content[record][key] = array

    return fault


def _drop(record: str, key: str | None) -> Fault:
    def fault(content: RecordDict) -> None:
        del (content if key is None else content[record])[record if key is None else key]

    return fault


def _more(name: str, record: Any) -> Fault:
    def fault(content: RecordDict) -> None:
        content[name] = record

    return fault


def _rename(record: str, key: str | None, name: str) -> Fault:
    def fault(content: RecordDict) -> None:
        within = content if key is None else content[record]
        within[name] = within.pop(record if key is None else key)

    return fault


def _rank(state: Arrays, rank: int, alpha: Any, seed: int) -> Fault:
    """Send an adapter of another rank, in good order."""

    def fault(content: RecordDict) -> None:
        own = moved(mixed_state(rank, 1), seed)
        content["arrays"].update(record_of({k: v.astype(state[k].dtype) for k, v in own.items() if ".lora_" in k}))
        fields = {**CONFIG, "r": rank, "lora_alpha": alpha, "rank_pattern": "{}", "alpha_pattern": "{}"}
        content[ADAPTER_KEY] = ConfigRecord(fields)

    return fault


@st.composite
def reply_faults(draw: st.DrawFn, state: Arrays, statistics: Arrays) -> Fault:
    """Draw one thing that is wrong with a reply of `state` (and statistics, where there are any)."""
    held = {"arrays": state} | ({STATISTICS_KEY: statistics} if statistics else {})
    record = draw(st.sampled_from(sorted(held)))
    key = draw(st.sampled_from([*held[record], "extra", f"{PREFIX}k.lora_A.weight", "lora_A.weight", ""]))
    value = held[record].get(key, np.zeros((2, 3), np.float32))
    kind = draw(st.sampled_from(["bytes", *["value"] * 3, "key", "metric", "record", "config", *["rank"] * 3]))
    if kind == "bytes":
        return _put(record, key, draw(odd_arrays(value)))
    if kind == "value":
        return _put(record, key, Array(np.asarray(draw(odd_values(value)))))
    if kind == "key":
        name = draw(st.one_of(st.sampled_from([HEAD, f"{Q}.lora_A.weight", key.upper(), f"{key}.weight"]), texts))
        return draw(st.sampled_from([_drop(record, key), _rename(record, key, name)]))
    if kind == "metric":
        name = draw(st.sampled_from(["num-examples", "num-examples", "loss", "new", "replies-valid"]))
        # no message carries a longer integer
        whole = numbers if name == "num-examples" else st.integers(-(2**63), 2**63 - 1)
        lists = st.one_of(st.lists(st.integers(-9, 9), max_size=3), st.lists(st.floats(), max_size=3))
        return _set("metrics", name, draw(st.one_of(whole, st.floats(), lists)))
    if kind == "record":
        others = [ArrayRecord(), MetricRecord(), ConfigRecord(), MetricRecord({"num-examples": 3}), record_of(state)]
        name = draw(st.one_of(st.sampled_from(["arrays", "metrics", "other", ADAPTER_KEY, STATISTICS_KEY]), texts))
        choices = [_more(name, other) for other in others] + [_drop(name, None), _rename(record, None, name)]
        return draw(st.sampled_from(choices))
    if kind == "rank":
        alpha = draw(st.one_of(st.sampled_from([8, 8.0, 2, 16, 1e-300, 1e200]), numbers))
        return _rank(state, draw(st.integers(1, 14)), alpha, draw(st.integers(0, 9)))
    values = st.one_of(numbers, texts, st.binary(max_size=8), st.lists(st.integers(-2, 9), max_size=3))
    as_text = st.one_of(patterns.map(json.dumps), texts, st.just("[" * 100_000), st.just('{"q":' * 5000))
    fields = {
        "r": draw(st.one_of(st.just(4), values)),
        "lora_alpha": draw(st.one_of(st.just(8), values)),
        "use_rslora": draw(st.one_of(st.booleans(), values)),
        "rank_pattern": draw(st.one_of(st.just("{}"), as_text)),
        "alpha_pattern": draw(st.one_of(st.just("{}"), as_text)),
        "base_model_name_or_path": draw(texts),
    }
    left_out = draw(st.sampled_from([*[None] * 4, *fields]))
    return _config({key: value for key, value in fields.items() if key != left_out})


def _set(record: str, key: str, value: Any) -> Fault:
    def fault(content: RecordDict) -> None:
        content[record][key] = value

    return fault


def _config(fields: dict[str, Any]) -> Fault:
    def fault(content: RecordDict) -> None:
        content[ADAPTER_KEY] = ConfigRecord(fields)

    return fault


# --- States and files ------------------------------------------------------------------------------------------------

ODD = [torch.complex64, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.bool, torch.uint8]
ODD += [torch.uint16, torch.uint32, torch.int64, torch.int8]


@st.composite
def odd_tensors(draw: st.DrawFn, value: Tensor) -> Any:
    """Draw what might stand in a state dict in place of `value`."""
    kind = draw(st.sampled_from(["value", "value", "cast", "layout", "other"]))
    if kind == "value":
        return torch.from_numpy(np.array(draw(odd_values(value.numpy()).filter(lambda v: v.dtype.str in _TORCHES))))
    if kind == "cast":
        return value.to(draw(st.sampled_from(ODD)))
    if kind == "layout":
        layouts: list[Callable[[Tensor], Any]] = [
            lambda t: t.to_sparse(),
            lambda t: t.to("meta"),
            lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
            lambda t: torch.nn.Parameter(t.clone(), requires_grad=t.is_floating_point()),
            lambda t: t.expand(2, *t.shape),
            lambda t: torch.zeros(()).expand(t.shape),
            lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
            lambda t: torch.empty(0),
            lambda t: torch.empty(0, 10**12),
            lambda t: t.flip(0) if t.ndim else t,
            lambda t: torch.nested.nested_tensor([t, t]),
            lambda t: t[..., None].expand(*t.shape, 2)[..., 0],
        ]
        return draw(st.sampled_from(layouts))(value)
    return draw(st.sampled_from([None, 3, 1.5, "weights", b"", [], [1.0, 2.0], {}, value.numpy(), {"weight": value}]))


_TORCHES = {"<f2", "<f4", "<f8", "|i1", "<i4", "<i8", "<u2", "<u8", "|b1", "<c8"}


@st.composite
def odd_states(draw: st.DrawFn, state: dict[str, Tensor]) -> Any:
    """Draw what might be handed over in place of a state dict."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.sampled_from([{}, None, 3, "adapter.safetensors", [], list(state.items()), ("w", 1.0)]))
    original, state = state, dict(state)
    for _ in range(draw(st.integers(1, 2))):
        key: Any = draw(st.sampled_from(list(original)))
        kind = draw(st.sampled_from(["value", "value", "value", "drop", "rename", "more"]))
        value = original[key]
        if kind == "value":
            state[key] = draw(odd_tensors(value))
        elif kind in ("drop", "rename"):
            state.pop(key, None)
        if kind in ("rename", "more"):
            state[draw(st.one_of(odd_keys, st.just(f"{key}.default")))] = value
    return state


odd_keys = st.one_of(
    texts,
    st.sampled_from(
        [
            None,
            0,
            ("a", "b"),
            f"{Q}.lora_A.default.weight",
            f"{Q}.lora_magnitude_vector",
            f"{Q}.lora_magnitude_vector.weight",
            f"{Q}.lora_embedding_A",
            f"{Q}.lora_E",
            f"{Q}.lora_A.a.b.weight",
            f"{Q}.lora_A",
            f"{Q}.lora_A.",
            ".lora_A.weight",
            "lora_A.weight",
            "x.hada_w1_a",
            "x.modules_to_save.a.weight",
            ".running_mean",
        ]
    ),
)


fields = {
    "r": st.one_of(st.just(4), numbers, json_values),
    "lora_alpha": st.one_of(st.just(8), numbers, json_values),
    "use_rslora": st.one_of(st.booleans(), json_values),
    "rank_pattern": patterns,
    "alpha_pattern": patterns,
    "peft_type": st.one_of(st.just("LORA"), json_values),
    "init_lora_weights": st.one_of(st.sampled_from([True, "pissa", "PATH"]), json_values),
    "use_dora": st.one_of(st.booleans(), json_values),
    "target_parameters": st.one_of(st.none(), json_values),
    "base_model_name_or_path": st.sampled_from(PATHS),
    "auto_mapping": json_values,
}
odd_configs = st.one_of(
    st.builds(
        lambda changes: {**CONFIG, **changes},
        st.sets(st.sampled_from(sorted(fields)), max_size=2).flatmap(
            lambda names: st.fixed_dictionaries({name: fields[name] for name in sorted(names)})
        ),
    ),
    json_values,
)
"""What might be handed over in place of an adapter config: changed in one or two fields, or anything."""


class Lazy(Mapping[str, Tensor]):
    """A safetensors file whose tensors are read when asked for, as users write it."""

    def __init__(self, path: Any) -> None:
        self.file = safe_open(path, "pt")
        self.names = list(self.file.keys())

    def __getitem__(self, key: str) -> Tensor:
        return self.file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Exploit:
    """What a pickle may hold: loading it raises."""

    def __reduce__(self) -> Any:
        return _exploited, ()


def _exploited() -> None:
    raise AssertionError("a pickle was loaded")


def pickled() -> list[bytes]:
    """Return pickles as they are found under names that end in .safetensors."""
    archive = io.BytesIO()
    torch.save({"w": torch.ones(2)}, archive)
    return [pickle.dumps(Exploit()), pickle.dumps({"w": Exploit()}, protocol=0), archive.getvalue()]


def with_header(header: bytes, body: bytes = b"") -> bytes:
    """Return a safetensors file of that header."""
    return len(header).to_bytes(8, "little") + header + body


@st.composite
def odd_files(draw: st.DrawFn, state: dict[str, Tensor]) -> bytes:
    """Draw a safetensors file of `state`, altered in its header, its length or its bytes; or something else."""
    data = safetensors.torch.save(state)
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = draw(st.sampled_from(["field", "field", "field", "names", "text", "bytes", "cut", "length", "pickle"]))
    if kind == "field":
        for _ in range(draw(st.integers(1, 2))):
            entry = header[draw(st.sampled_from(sorted(header)))]
            field = draw(st.sampled_from(["dtype", "shape", "shape", "data_offsets", "extra"]))
            given_dtypes = ["F64", "F32", "F16", "BF16", "I64", "I8", "U16", "U32", "BOOL", "C64", "F8_E4M3", "F8_E8M0"]
            offsets = st.lists(
                st.one_of(st.integers(-9, len(body) + 9), st.sampled_from([2**63, 2**64, 10**12])), max_size=3
            )
            entry[field] = draw(
                {
                    "dtype": st.sampled_from([*given_dtypes, "F4", "f32", "PICKLE", "", None, 3]),
                    "shape": st.one_of(
                        st.just(entry["shape"][::-1]), shapes.map(list), st.just([10**12, 0]), st.just([2**63, 2])
                    ),
                    "data_offsets": offsets,
                    "extra": json_values.filter(_is_json),
                }[field]
            )
    elif kind == "names":
        key = draw(st.sampled_from(sorted(header)))
        name = draw(st.one_of(odd_keys.filter(lambda k: isinstance(k, str)), st.just("__metadata__")))
        header[name] = header.pop(key) if draw(st.booleans()) else header[key]
    elif kind == "pickle":
        return draw(st.sampled_from(pickled()))
    text = json.dumps(header).encode()
    if kind == "text":
        first = json.dumps({key: header[key] for key in sorted(header)[:1]}).encode()
        text = draw(
            st.sampled_from(
                [
                    text[:-1] + b"," + first[1:],  # a name twice
                    text + b" " * 100,
                    b" " + text,
                    b"[]",
                    b"{}",
                    b"null",
                    b"",
                    text[: len(text) // 2],
                    b'{"__metadata__":' * 5000,
                    b"[" * 100_000,
                    text.replace(b"weight", b"\xff\xfe"),
                    b'{"__metadata__":{"format":"pt","path":"../../etc/passwd"},' + text[1:],
                ]
            )
        )
    data = with_header(text, body)
    if kind == "length":
        length = draw(
            st.one_of(st.integers(0, 2 * len(data)), st.sampled_from([2**31, 2**63 - 1, 2**64 - 1, 10**8 + 1]))
        )
        data = length.to_bytes(8, "little") + data[8:]
    elif kind == "cut":
        data = data[: draw(st.integers(0, len(data)))] + draw(st.binary(max_size=9))
    elif kind == "bytes":
        altered = bytearray(data)
        for _ in range(draw(st.integers(1, 3))):
            altered[draw(st.one_of(st.integers(0, 8 + len(text)), st.integers(0, len(data) - 1)))] ^= 1 << draw(
                st.integers(0, 7)
            )
        data = bytes(altered)
    return data


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value).encode()
    except (ValueError, UnicodeEncodeError):
        return False
    return True


# --- The oracle: dense, float64, straight from the equations ---------------------------------------------------------


def scaling_of(config: Mapping[str, Any]) -> Scaling:
    """Return what gives a module's scaling, as PEFT does: the first pattern that matches the end of its path."""

    def of(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
        name = module.removeprefix(PREFIX)
        return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", name)), default)

    def scaling(module: str) -> float:
        r = of(config.get("rank_pattern") or {}, module, config["r"])
        alpha = of(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
        return alpha / (math.sqrt(r) if config.get("use_rslora") else r)

    return scaling


def config_of(record: ConfigRecord) -> dict[str, Any]:
    """Return the adapter config that a reply carries."""
    config = dict(record)
    return config | {field: json.loads(str(config[field])) for field in ("rank_pattern", "alpha_pattern")}


def dense(state: Arrays, scaling: Scaling, ranks: Mapping[str, int] | None = None) -> Arrays:
    """Return what a state stands for, float64: products for factors (of the leading ranks), s bias for a bias."""
    found = {}
    for module in modules_of(state):
        B, A = factors(state, module)
        r = None if ranks is None else ranks[module]
        found[module] = scaling(module) * B[:, :r] @ A[:r]
        if (key := f"{module}.lora_B.bias") in state:
            found[key] = scaling(module) * state[key].astype(np.float64)
    rest = {key: value.astype(np.float64) for key, value in state.items() if ".lora_" not in key}
    return found | rest


def assert_is_the_merge(
    merged: Arrays,
    sent: Arrays | None,
    replies: Sequence[Arrays],
    examples: Sequence[float],
    *,
    k: float = 1.0,
    p: float = 0.0,
    scope: str = "layer",
    server_lr: float = 1.0,
    clip: float | None = None,
    scaling: Scaling = lambda module: 1.0,
    scalings: Sequence[Scaling] | None = None,
    merged_scaling: Scaling | None = None,
    precision: tuple[float, float] | None = None,
) -> None:
    """Assert that a state is W + alpha sum_i w_i (W_i - ref_i) in every layer, and in adapters as near as rank allows.

    Parameters
    ----------
    merged : Arrays
        What was found.
    sent : Arrays | None
        W; None is zero, and then plain tensors are averaged.
    replies : Sequence[Arrays]
        W_i.
    examples, k, p, scope, server_lr, clip
        As for FroM and `merge`.
    scaling, scalings, merged_scaling : Scaling
        s of W, of the W_i and of what was merged.
    precision : tuple[float, float] | None (default: None)
        Of what was merged, its spacing at 1 and its smallest number, where the arrays given are wider.
    """
    scalings = [scaling] * len(replies) if scalings is None else scalings
    found = dense(merged, scaling if merged_scaling is None else merged_scaling)
    mine = [dense(state, own) for state, own in zip(replies, scalings, strict=True)]
    zero = {name: np.zeros_like(value) for name, value in mine[0].items()}
    W = zero if sent is None else dense(sent, scaling)
    received = [
        zero if sent is None else dense(sent, scaling, {m: factors(state, m)[1].shape[0] for m in modules_of(state)})
        for state in replies
    ]
    deltas = [{name: own[name] - ref[name] for name in W} for own, ref in zip(mine, received, strict=True)]
    norms = {name: np.array([np.linalg.norm(delta[name]) for delta in deltas]) for name in W}

    def is_update(name: str) -> bool:
        plain = name in replies[0]
        kept = plain and (replies[0][name].dtype.kind != "f" or (sent is None and ".lora_" not in name))
        return not (kept or name.endswith(("running_mean", "running_var")))

    for name in W:
        if clip is None or (sent is None and name in replies[0]):  # a value alone is no update
            continue
        shortened = _clipped(norms[name], clip)
        for delta, factor in zip(deltas, shortened, strict=True):
            delta[name] = delta[name] * factor
        norms[name] = norms[name] * shortened
    whole = np.sqrt(sum(norms[name] ** 2 for name in W if is_update(name) and ".lora_B.bias" not in name))
    for name, value in W.items():
        if name in replies[0] and replies[0][name].dtype.kind != "f":
            expected = value if sent is not None else np.max([own[name] for own in mine], axis=0)
            assert np.array_equal(found[name], expected), name
            continue
        size = whole if scope == "model" else norms[name.removesuffix(".lora_B.bias")]
        weights = _weights(size, k if is_update(name) else 0.0, examples, p)
        # Terms may cancel: rounding is relative to them, in the precision that the sums run in.
        terms = [np.linalg.norm(own[name]) + np.linalg.norm(ref[name]) for own, ref in zip(mine, received, strict=True)]
        change = sum(w * delta[name] for w, delta in zip(weights, deltas, strict=True))
        T = value + (server_lr if is_update(name) else 1.0) * change
        eps, smallest = precision or _precision(merged, name)
        limit = 20 * eps * (np.linalg.norm(T) + float(weights @ np.array(terms))) + 10 * smallest * T.size
        best = 0.0
        if name not in merged:
            rank = min(factors(merged, name)[1].shape[0], *T.shape)
            best = float(np.linalg.norm(T - truncated(T, rank)))
        error = float(np.linalg.norm(found[name] - T))
        assert error <= best * (1 + 1e-6) + limit, f"{name}: {error:g} off, the best is {best:g}, limit {limit:g}"


def _precision(state: Arrays, name: str) -> tuple[float, float]:
    """Return the spacing at 1, and the smallest number, of a tensor's or a module's dtype."""
    dtype = next(np.finfo(v.dtype) for k, v in state.items() if k == name or k.startswith(f"{name}.lora_"))
    return float(dtype.eps), float(dtype.smallest_subnormal)


def _clipped(norms: np.ndarray, clip: float) -> np.ndarray:
    """Return the factors that shorten norms to `clip` times the median of those above 0."""
    heard = norms[norms > 0]
    most = clip * np.median(heard) if len(heard) else 0.0
    return np.array([min(1.0, most / norm) if norm > 0 else 1.0 for norm in norms])


def _weights(norms: np.ndarray, k: float, examples: Sequence[float], p: float) -> np.ndarray:
    """Return Eq. 1's weights, in extended precision."""
    share = np.array(examples, dtype=np.longdouble) ** np.longdouble(p)
    largest = norms.max()
    if k > 0 and largest > 0:
        relative = norms.astype(np.longdouble) / np.longdouble(largest)
        share = share * ((relative >= 1 - 1e-6) if math.isinf(k) else relative ** np.longdouble(k))
    return (share / share.sum()).astype(np.float64)


# --- The watch -------------------------------------------------------------------------------------------------------

_HARMFUL = ("pickle.find_class", "os.system", "os.exec", "subprocess.Popen", "socket.connect", "os.remove", "os.rename")
_READABLE = tuple(
    os.path.realpath(path)
    for path in {sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), str(ROOT), "/proc", "/sys", "/dev"}
)
_watching: list[list[str]] = []
_hooked: list[bool] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event in _HARMFUL:
        _watching[-1].append(f"{event} {args!r:.200}")
    elif event == "open" and isinstance(args[0], str | bytes):
        path, mode, flags = os.path.realpath(os.fsdecode(args[0])), args[1], args[2]
        writes = bool(set(mode or "") & set("wax+")) or bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        # what Python caches of its own modules is no file of ours
        if not path.endswith(".pyc") and "__pycache__" not in path and (writes or not path.startswith(_READABLE)):
            _watching[-1].append(f"open {path} {mode}")


@contextlib.contextmanager
def harmless(*allowed: str) -> Iterator[None]:
    """Assert that nothing is unpickled, run or connected to, and no file written, or read but those `allowed`."""
    if not _hooked:
        sys.addaudithook(_audit)  # can't be taken off: it stays, idle
        _hooked.append(True)
    _watching.append([])
    try:
        yield
    finally:
        seen = _watching.pop()
    paths = [os.path.realpath(path) for path in allowed]
    assert not (harm := [event for event in seen if not any(path in event for path in paths)]), harm


@contextlib.contextmanager
def soon(seconds: float) -> Iterator[None]:
    """Assert that something takes less CPU time than this; regular expressions can be interrupted too."""

    def late(number: int, frame: Any) -> None:
        raise AssertionError(f"took more than {seconds} s of CPU time")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
