"""What may be wrong with a reply."""

import json
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import strategies as st

from fedfrom.wire.adapter_configs import ADAPTER_KEY
from fedfrom.wire.contents import STATISTICS_KEY
from tests.hostile.values import (
    CONFIG,
    DTYPES,
    HEAD,
    PREFIX,
    Q,
    extremes,
    mixed_state,
    moved,
    numbers,
    patterns,
    shapes,
    texts,
)
from tests.models import Arrays, Fault, record_of


def npy(descr: str, shape: Any, body: bytes, fortran: str = "False", version: bytes = b"\x01\x00") -> bytes:
    """Return .npy bytes whose header says what it likes."""
    text = f"{{'descr':{descr},'fortran_order':{fortran},'shape':{shape},}}".encode(errors="replace")
    text += b" " * (-(10 + len(text) + 1) % 64) + b"\n"
    size = 2 if version[0] == 1 else 4
    return b"\x93NUMPY" + version + len(text).to_bytes(size, "little") + text + body


def version(draw: st.DrawFn) -> bytes:
    return draw(st.sampled_from([b"\x01\x00"] * 4 + [b"\x02\x00", b"\x03\x00", b"\x09\x00"]))


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


def _set(record: str, key: str, value: Any) -> Fault:
    def fault(content: RecordDict) -> None:
        content[record][key] = value

    return fault


def _config(fields: dict[str, Any]) -> Fault:
    def fault(content: RecordDict) -> None:
        content[ADAPTER_KEY] = ConfigRecord(fields)

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
