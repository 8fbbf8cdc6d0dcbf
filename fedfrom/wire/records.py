"""Flower's ArrayRecords <-> state dicts, with two kinds of arrays of our own: bfloat16 values, and deltas."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.lib import format as npy
from torch import Tensor

from fedfrom.tensor_bytes import bytes_of

BF16 = "fedfrom.bf16"
"""Array kind (`stype`) for bfloat16 values: the data are the raw values in C order, without a header."""

DELTA = "fedfrom.delta"
"""Array kind (`stype`) for a client's delta in place of its trained tensor: raw values in C order, without a header."""

_DELTAS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_NUMPY = "numpy.ndarray"  # Flower's kind for the bytes of a .npy file
_MAGIC = npy.magic(1, 0)


def to_state(record: ArrayRecord, who: str = "arrays") -> dict[str, Tensor]:
    """Return a record's arrays as tensors, by key: views of the record's bytes, which must not be written to.

    Reads the arrays that Flower writes (`Array(ndarray)`) and those of `to_record`.

    Raises
    ------
    ValueError
        An array can't be read. The error names `who` and the key.
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
    """Return a record's arrays as a state dict; new memory. Reads the bfloat16 arrays of `to_record` too.

    Raises
    ------
    ValueError
        An array can't be read. The error names the key.
    """
    return {key: tensor.clone() for key, tensor in to_state(record).items()}


def to_record(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Return tensors as Flower's record, by key; new memory.

    The bytes equal those of Flower's own `ArrayRecord(state_dict)`, except for bfloat16, which Flower's refuses:
    bfloat16 travels in two bytes a number, in arrays of the kind "fedfrom.bf16". `to_state_dict` reads both kinds.
    Flower's `Array.numpy` and `to_torch_state_dict` raise TypeError on "fedfrom.bf16", so that no client takes the bits
    for other numbers. Where a client fails so, the strategy's log and report name the remedy.

    Raises
    ------
    TypeError
        Neither kind can carry a tensor's dtype. The error names the key.
    """
    return ArrayRecord({key: to_array(key, tensor) for key, tensor in state.items()})


def delta_array(change: Tensor) -> Array:
    """Return a client's delta of a tensor as an array of its own kind, which Flower does not read as values."""
    if change.dtype not in _DELTAS.values():
        raise ValueError(f"as_delta: expected True or torch's {', '.join(_DELTAS)}, found {change.dtype}")
    raw = bytes(bytes_of(change.detach().cpu().contiguous().reshape(-1)))
    return Array(str(change.dtype).removeprefix("torch."), tuple(change.shape), DELTA, raw)


def deltas_in(record: ArrayRecord) -> set[str]:
    """Return the keys of the arrays that hold deltas."""
    return {key for key, array in record.items() if array.stype == DELTA}


@functools.lru_cache(1024)
def layout(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[str, str, bytes]:
    """Return how an array carries a tensor: the dtype's name, the array's kind (`stype`), and the header of its bytes.

    Raises
    ------
    TypeError
        numpy lacks the dtype, and it is not bfloat16.
    """
    if dtype == torch.bfloat16:
        return "bfloat16", BF16, b""
    kind = torch.empty(0, dtype=dtype).numpy().dtype
    header = io.BytesIO()
    npy.write_array_header_1_0(header, {"descr": npy.dtype_to_descr(kind), "fortran_order": False, "shape": shape})
    return str(kind), _NUMPY, header.getvalue()


class _Numbers:
    """Numbers inside bytes, for `np.asarray`; declared writable, since torch warns of read-only arrays."""

    def __init__(self, data: bytes, start: int, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self._data = data  # keeps the bytes alive
        address = np.frombuffer(data, np.uint8).__array_interface__["data"][0] + start
        self.is_aligned = address % dtype.itemsize == 0
        self.__array_interface__ = {"data": (address, False), "shape": shape, "typestr": dtype.str, "version": 3}


def _view(array: Array) -> Tensor:
    """Return an array's numbers as a view of its bytes; unusual layouts are copied by Flower's own conversion."""
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
    """Return the shape, whether the order is Fortran's, and the dtype; cached, since all clients send equal headers."""
    return npy.read_array_header_1_0(io.BytesIO(data))


def _numbers(data: bytes, start: int, dtype: np.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return the numbers that begin at byte `start`, in C order: a view, or a copy where they are not aligned."""
    size = math.prod(shape) * dtype.itemsize
    if size > len(data) - start:
        raise ValueError(f"expected {size} bytes for {dtype} {shape}, found {len(data) - start}")
    if not size:
        return torch.from_numpy(np.empty(shape, dtype))
    numbers = _Numbers(data, start, dtype, shape)
    values = np.asarray(numbers)
    return torch.from_numpy(values if numbers.is_aligned else values.copy())


def to_array(key: str, tensor: Tensor) -> Array:
    """Return a tensor as Flower's array; one copy of its numbers is made."""
    tensor = tensor.detach().cpu().contiguous()
    shape = tuple(tensor.shape)
    try:
        name, kind, header = layout(shape, tensor.dtype)
    except TypeError as error:
        raise TypeError(f"{key!r}: expected a dtype that numpy has, or bfloat16, found {tensor.dtype}") from error
    return Array(name, shape, kind, b"".join((header, bytes_of(tensor.reshape(-1)))))
