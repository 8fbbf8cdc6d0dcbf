"""Flower's records <-> states, and adapter configs: what travels in a message, under which names."""

from __future__ import annotations

import ctypes
import functools
import io
import json
import math
import mmap
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.lib import format as npy
from torch import Tensor

from fedfrom.merging.peft.configs import spell_out

ADAPTER_KEY = "fedfrom.adapter"
"""Name of the ConfigRecord that carries an adapter's rank and scaling, from the server and in replies."""

STATISTICS_KEY = "fedfrom.statistics"
"""Name of the ArrayRecord with a client's Gram or Fisher statistics, in replies."""

BF16 = "fedfrom.bf16"
"""Kind of the arrays that carry bfloat16: their data are the numbers' own bytes, in C order and without a header."""

DELTA = "fedfrom.delta"
"""Kind of the arrays that carry what a client changed, not what it ended with: their data are as those of `BF16`."""

_DELTAS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_NUMPY = "numpy.ndarray"  # Flower's kind for the bytes of a .npy file
_MAGIC = npy.magic(1, 0)
_R = TypeVar("_R", ArrayRecord, ConfigRecord, MetricRecord)
_WORTH = 1 << 16  # bytes of a tensor that is worth to be written where it will be sent from
_LARGE_PAGE = 1 << 21  # bytes
_MADV_POPULATE_WRITE = 23  # of Linux: Python has no name for it
_LONGEST_REASON = 700
"""Characters of a reason to reject a reply."""

_NUMBERS = ("r", "lora_alpha", "use_rslora")
_PATTERNS = ("rank_pattern", "alpha_pattern")
_MODULE = re.compile(r"[\w.-]+")


def to_state(record: ArrayRecord, who: str = "arrays") -> dict[str, Tensor]:
    """Return a record's arrays as tensors, by key: views of the record's own bytes, which nothing may write into.

    Reads what Flower writes (`Array(ndarray)`) and what `to_record` does.

    Raises
    ------
    ValueError
        An array can't be read; names `who` and the key.
    """
    state = {}
    for key, array in record.items():
        try:
            state[key] = _view(array)
        except Exception as error:  # malformed bytes fail in numpy in many ways
            raise ValueError(
                f"{who}, {key!r}: expected a readable array, found {type(error).__name__}: {error}"
            ) from error
    return state


def to_state_dict(record: ArrayRecord) -> dict[str, Tensor]:
    """Return a record's arrays as a state dict, bfloat16 as `to_record` sends it too; new memory.

    Raises
    ------
    ValueError
        An array can't be read; names the key.
    """
    return {key: tensor.clone() for key, tensor in to_state(record).items()}


def to_record(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Return tensors as Flower's record, by key; new memory.

    The bytes are those of Flower's own `ArrayRecord(state_dict)`, but for bfloat16, which that refuses: it travels as
    it is, two bytes a number, as arrays of the kind "fedfrom.bf16". `to_state_dict` reads both; to Flower's
    `Array.numpy`, and so to its `to_torch_state_dict`, bfloat16 is a TypeError, so that nothing takes its bits for
    numbers. Where that happens in a client, the strategy's log and report name the remedy.

    Raises
    ------
    TypeError
        A tensor has a dtype that neither can carry; names the key.
    """
    return ArrayRecord({key: _array(key, tensor) for key, tensor in state.items()})


def delta_array(change: Tensor) -> Array:
    """Return what a client changed of a tensor as an array that nothing takes for its values."""
    if change.dtype not in _DELTAS.values():
        raise ValueError(f"as_delta: expected True or torch's {', '.join(_DELTAS)}, found {change.dtype}")
    raw = change.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return Array(str(change.dtype).removeprefix("torch."), tuple(change.shape), DELTA, raw)


def deltas_in(record: ArrayRecord) -> set[str]:
    """Return the keys of the arrays that are what a client changed."""
    return {key for key, array in record.items() if array.stype == DELTA}


class _Held(NamedTuple):
    """Bytes that are a record's array already, whose numbers a tensor was handed out to write."""

    buffer: io.BytesIO
    shape: tuple[int, ...]
    dtype: torch.dtype

    def array(self, size: int) -> Array:
        """Return the array of `size` bytes; a copy where somebody still has the tensor, and could write to it."""
        try:
            self.buffer.truncate(size)  # not allowed while its memory is lent
            data = self.buffer.getvalue()
        except BufferError:
            data = bytes(self.buffer.getbuffer())
        name, kind, _ = _layout(self.shape, self.dtype)
        return Array(name, self.shape, kind, data)


class Outgoing:
    """Memory for tensors that will be sent: it is that of the record's bytes, so that large ones are not copied."""

    def __init__(self) -> None:
        self._held: dict[int, _Held] = {}

    def empty(self, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return what torch.empty does, but for large ones zeros, inside bytes that begin as an array's do."""
        size = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or size < _WORTH:
            return torch.empty(shape, dtype=dtype, device=device)
        header = _layout(tuple(shape), dtype)[2]
        buffer = io.BytesIO(bytes(len(header) + size))
        data = np.frombuffer(buffer.getbuffer(), np.uint8)
        _map(data)
        data[: len(header)] = np.frombuffer(header, np.uint8)
        tensor = torch.from_numpy(data[len(header) :]).view(dtype).reshape(shape)
        self._held[tensor.data_ptr()] = _Held(buffer, tuple(shape), dtype)
        return tensor

    def record(self, state: dict[str, Tensor]) -> ArrayRecord:
        """Return what `to_record` does, and empty the state: of what `empty` did not give, one tensor is held twice."""
        record = ArrayRecord()
        for key in list(state):
            tensor = state.pop(key)
            held = self._held.pop(tensor.data_ptr(), None)
            if held is None or (held.shape, held.dtype) != (tuple(tensor.shape), tensor.dtype):
                record[key] = _array(key, tensor)
            else:
                size = len(held.buffer.getbuffer())
                del tensor
                record[key] = held.array(size)
        return record


def _map(data: np.ndarray) -> None:
    """Have Linux give the pages of large new memory now, and of 2 MiB where they fit, as numpy's large arrays have.

    Small pages, got one by one, take longer than the sums that are written to them; and two threads that write to one
    large page before it is there both fill it with zeros, which took 3 ms a page where one thread takes 0.3.
    """
    if sys.platform != "linux":
        return
    first, end = data.ctypes.data, data.ctypes.data + data.nbytes
    for advice, page in ((mmap.MADV_HUGEPAGE, _LARGE_PAGE), (_MADV_POPULATE_WRITE, mmap.PAGESIZE)):
        start, stop = -(-first // page) * page, end // page * page
        if stop > start:  # advice alone: where it is not taken, as by Linux before 5.14, nothing is different
            _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


@functools.lru_cache(1024)
def _layout(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[str, str, bytes]:
    """Return the name of a dtype, the kind of array that carries it, and what its bytes begin with.

    Raises
    ------
    TypeError
        Neither numpy nor we have the dtype.
    """
    if dtype == torch.bfloat16:
        return "bfloat16", BF16, b""
    kind = torch.empty(0, dtype=dtype).numpy().dtype
    header = io.BytesIO()
    npy.write_array_header_1_0(header, {"descr": npy.dtype_to_descr(kind), "fortran_order": False, "shape": shape})
    return str(kind), _NUMPY, header.getvalue()


class _Numbers:
    """Numbers inside bytes as numpy reads them: told that they may be written to, since torch warns of all others."""

    def __init__(self, data: bytes, start: int, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self._data = data  # is there for as long as this is
        address = np.frombuffer(data, np.uint8).__array_interface__["data"][0] + start
        self.is_aligned = address % dtype.itemsize == 0
        self.__array_interface__ = {"data": (address, False), "shape": shape, "typestr": dtype.str, "version": 3}


def _view(array: Array) -> Tensor:
    """Return an array's numbers in place; those that are of no usual layout are copied."""
    if array.stype in (BF16, DELTA):
        known = _DELTAS if array.stype == DELTA else {"bfloat16": torch.bfloat16}
        if array.dtype not in known or min(array.shape, default=0) < 0:
            raise ValueError(f"expected {' or '.join(known)} of a shape, found {array.dtype} {array.shape}")
        found = known[array.dtype]
        return _numbers(array.data, 0, np.dtype(f"i{found.itemsize}"), array.shape).view(found)
    if array.stype != _NUMPY or array.data[:8] != _MAGIC:
        return torch.from_numpy(array.numpy())
    start = 10 + int.from_bytes(array.data[8:10], "little")
    shape, is_fortran, dtype = _header(array.data[8:start])
    if dtype.kind not in "biuf" or not dtype.isnative or min(shape, default=0) < 0:
        return torch.from_numpy(array.numpy())
    values = _numbers(array.data, start, dtype, shape[::-1] if is_fortran else shape)
    return values.permute(*range(values.ndim)[::-1]) if is_fortran else values


@functools.lru_cache(1024)
def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return the shape, whether the order is Fortran's, and the dtype: clients send the same ones again and again."""
    return npy.read_array_header_1_0(io.BytesIO(data))


def _numbers(data: bytes, start: int, dtype: np.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return the bytes from `start` on as numbers, in C order: a view, or a copy where they are not aligned."""
    size = math.prod(shape) * dtype.itemsize
    if size > len(data) - start:
        raise ValueError(f"expected {size} bytes for {dtype} {shape}, found {len(data) - start}")
    if not size:
        return torch.from_numpy(np.empty(shape, dtype))
    numbers = _Numbers(data, start, dtype, shape)
    values = np.asarray(numbers)
    return torch.from_numpy(values if numbers.is_aligned else values.copy())


def _array(key: str, tensor: Tensor) -> Array:
    """Return a tensor as Flower's array; its numbers are copied once."""
    tensor = tensor.detach().cpu().contiguous()
    shape = tuple(tensor.shape)
    try:
        name, kind, header = _layout(shape, tensor.dtype)
    except TypeError as error:
        raise TypeError(f"{key!r}: expected a dtype that numpy has, or bfloat16, found {tensor.dtype}") from error
    values = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return Array(name, shape, kind, b"".join((header, values.reshape(-1).view(np.uint8).data)))


def config_to_record(config: Mapping[str, Any], modules: Iterable[str]) -> ConfigRecord:
    """Return what of an adapter config the other side needs: rank, lora_alpha, use_rslora and the patterns.

    Parameters
    ----------
    config : Mapping
        adapter_config.json's content.
    modules : Iterable[str]
        Names of the adapter's layers: patterns travel spelled out for them, as module names, since no side runs a
        regular expression that came in a message.
    """
    config = spell_out(config, modules)
    record = ConfigRecord({field: config[field] for field in _NUMBERS})
    for field in _PATTERNS:
        record[field] = json.dumps(config[field])
    return record


def record_to_config(record: ConfigRecord, who: str = ADAPTER_KEY) -> dict[str, Any]:
    """Return the adapter config that `config_to_record` wrote.

    Raises
    ------
    ValueError
        A field is missing or is not what it should be. Nothing else, whatever the record holds.
    """
    try:
        config: dict[str, Any] = {field: record[field] for field in _NUMBERS}
        patterns = {field: json.loads(str(record[field])) for field in _PATTERNS}
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{who}: expected {', '.join(_NUMBERS + _PATTERNS)} as fedfrom.client writes them, "
            f"found {sorted(record)} ({type(error).__name__}: {error})"
        ) from error
    if config["use_rslora"] not in (False, True):
        raise ValueError(f"{who}, 'use_rslora': expected true or false, found {config['use_rslora']!r}")
    if not all(isinstance(pattern, dict) for pattern in patterns.values()):
        raise ValueError(f"{who}: expected patterns as JSON objects, found {patterns}")
    for name in {**patterns["rank_pattern"], **patterns["alpha_pattern"]}:
        if not _MODULE.fullmatch(name):
            raise ValueError(f"{who}, rank_pattern and alpha_pattern: expected module names, found {name!r}")
    return {
        "r": _positive(who, "r", config["r"], int),
        "lora_alpha": _positive(who, "lora_alpha", config["lora_alpha"], float),
        "use_rslora": bool(config["use_rslora"]),
        "rank_pattern": {
            k: _positive(who, f"rank_pattern[{k!r}]", v, int) for k, v in patterns["rank_pattern"].items()
        },
        "alpha_pattern": {
            k: _positive(who, f"alpha_pattern[{k!r}]", v, float) for k, v in patterns["alpha_pattern"].items()
        },
    }


def _positive(who: str, field: str, value: Any, kind: type[int] | type[float]) -> int | float:
    """Return a number > 0 that a float can hold, whole where `kind` is int; or raise ValueError."""
    if not isinstance(value, int if kind is int else int | float) or not 0 < value <= sys.float_info.max:
        whole = "whole " if kind is int else ""
        raise ValueError(f"{who}, {field}: expected a {whole}number > 0, found {value!r}")
    return kind(value)


def records_of(content: RecordDict, kind: type[_R]) -> dict[str, _R]:
    """Return a content's records of one kind, by name.

    Flower's own views of them refer to the content and to themselves: a reply that was looked at so would stay in
    memory until Python next looks for such cycles.
    """
    return {name: record for name, record in content.items() if isinstance(record, kind)}


def array_bytes(content: RecordDict) -> int:
    """Return how many bytes of arrays, their headers among them, a content carries."""
    return sum(len(array.data) for record in records_of(content, ArrayRecord).values() for array in record.values())


def model_record(content: RecordDict, arrayrecord_key: str) -> ArrayRecord:
    """Return the ArrayRecord that holds the model: the one of that name, or the only one beside statistics."""
    records = records_of(content, ArrayRecord)
    records.pop(STATISTICS_KEY, None)
    if arrayrecord_key in records:
        return records[arrayrecord_key]
    if len(records) == 1:
        return next(iter(records.values()))
    raise ValueError(f"expected an ArrayRecord {arrayrecord_key!r}, or a single one, found {sorted(records)}")


def metric_record(content: RecordDict, weighted_by: str) -> MetricRecord:
    """Return the only MetricRecord, checked to hold the weighting key as one number.

    Raises
    ------
    ValueError
        There is none or more than one, or the key is missing, not a number, not finite or not above 0.
    """
    records = records_of(content, MetricRecord)
    if len(records) != 1:
        raise ValueError(f"expected one MetricRecord, found {sorted(records)}")
    metrics = next(iter(records.values()))
    value = metrics.get(weighted_by)
    # compared, not converted: an int may be beyond any float
    if not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"metric {weighted_by!r}: expected a finite number > 0, found {value!r}")
    return metrics


def one_line(reason: str) -> str:
    """Return a reason in one line of bearable length, whatever the client put into it."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(reason.split()))
    return line if len(line) <= _LONGEST_REASON else f"{line[:400]} ... {line[-200:]}"
