"""What may be handed over in place of a state dict, an adapter config or a safetensors file."""

import io
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import safetensors.torch
import torch
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from tests.hostile.replies import odd_values
from tests.hostile.values import (
    CONFIG,
    PATHS,
    Q,
    json_values,
    numbers,
    patterns,
    shapes,
    texts,
)

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
