"""Merged tensors are written straight into the bytes of the record that sends them: large ones are not copied."""

from __future__ import annotations

import ctypes
import functools
import io
import math
import mmap
import sys
from typing import NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedfrom.wire.records import layout, to_array

_WORTH = 1 << 16  # bytes: smaller tensors are copied
_LARGE_PAGE = 1 << 21  # bytes
_MADV_POPULATE_WRITE = 23  # Linux's number: Python has no name for it


class _Held(NamedTuple):
    """An array's header and numbers in one buffer; the numbers are the memory of a tensor that was handed out."""

    buffer: io.BytesIO
    shape: tuple[int, ...]
    dtype: torch.dtype

    def array(self) -> Array:
        """Return the array; its bytes are a copy where the tensor is still referenced, and could be written to."""
        try:
            self.buffer.truncate(len(self.buffer.getbuffer()))  # raises BufferError while a tensor uses the buffer
            data = self.buffer.getvalue()
        except BufferError:
            data = bytes(self.buffer.getbuffer())
        name, kind, _ = layout(self.shape, self.dtype)
        return Array(name, self.shape, kind, data)


class Outgoing:
    """Gives tensors memory inside an array's bytes, and makes the record from those bytes."""

    def __init__(self) -> None:
        self._held: dict[int, _Held] = {}

    def empty(self, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a tensor to be filled, as torch.empty does; large ones on the CPU are zeros behind a header."""
        size = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or size < _WORTH:
            return torch.empty(shape, dtype=dtype, device=device)
        header = layout(tuple(shape), dtype)[2]
        buffer = io.BytesIO(bytes(len(header) + size))
        data = np.frombuffer(buffer.getbuffer(), np.uint8)
        _map(data)
        data[: len(header)] = np.frombuffer(header, np.uint8)
        tensor = torch.from_numpy(data[len(header) :]).view(dtype).reshape(shape)
        self._held[tensor.data_ptr()] = _Held(buffer, tuple(shape), dtype)
        return tensor

    def record(self, state: dict[str, Tensor]) -> ArrayRecord:
        """Return the state as `to_record` does, and empty it; tensors not from `empty` are copied, one at a time."""
        record = ArrayRecord()
        for key in list(state):
            tensor = state.pop(key)
            held = self._held.pop(tensor.data_ptr(), None)
            if held is None or (held.shape, held.dtype) != (tuple(tensor.shape), tensor.dtype):
                record[key] = to_array(key, tensor)
            else:
                del tensor
                record[key] = held.array()
        return record


def _map(data: np.ndarray) -> None:
    """Have Linux map the pages of new memory at once, 2 MiB pages where they fit, as for numpy's large arrays.

    Mapped one by one at the first write, small pages take longer than the sums that are written to them. Two threads
    that first write to the same large page both fill it with zeros: 3 ms a page, against 0.3 ms with one thread.
    """
    if sys.platform != "linux":
        return
    first, end = data.ctypes.data, data.ctypes.data + data.nbytes
    for advice, page in ((mmap.MADV_HUGEPAGE, _LARGE_PAGE), (_MADV_POPULATE_WRITE, mmap.PAGESIZE)):
        start, stop = -(-first // page) * page, end // page * page
        if stop > start:  # only advice: where it is refused, as by Linux before 5.14, the result is the same
            _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
