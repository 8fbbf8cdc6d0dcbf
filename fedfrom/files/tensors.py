"""Tensors in safetensors files: each is read when it is accessed, and written when it is given."""

from __future__ import annotations

import json
import math
import os
import struct
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedfrom.errors import BadInput
from fedfrom.merging.linalg.blocks import Values
from fedfrom.stored import StoredFile, StoredTensor
from fedfrom.tensor_bytes import bytes_of

# safetensors' names of dtypes; tensors of other dtypes can't be merged
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 1 << 24  # bytes written at once
# tensors of at least this many entries are read in blocks. Smaller ones are read whole: their memory costs less than a
# second reading, or than the thousand short reads of a sample
_LARGE = 1 << 20


@dataclass(frozen=True)
class Spec:
    """A tensor's dtype and shape, known from a file's header."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        numel = 1
        for length in self.shape:
            numel *= length
        return numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{tuple(self.shape)} {str(self.dtype).removeprefix('torch.')}"


class _File(StoredFile):
    """A safetensors file; closed when nobody has it any more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            super().__init__(open(path, "rb", buffering=0))  # noqa: SIM115 (closed with the object)
            (length,) = struct.unpack("<Q", os.pread(self.file.fileno(), 8, 0))
            self._header: dict[str, Any] = json.loads(os.pread(self.file.fileno(), length, 8))
        except (OSError, ValueError, struct.error) as error:  # safetensors has read it before
            raise BadInput(f"{path}: expected a readable file, found {error}: was it changed meanwhile?") from None
        self._data = 8 + length

    def start(self, key: str) -> int:
        """Return the offset of a tensor's first byte."""
        try:
            return self._data + int(self._header[key]["data_offsets"][0])
        except (LookupError, TypeError):
            raise BadInput(f"{self.path}: expected {key!r}, found it gone: was the file changed meanwhile?") from None

    def damaged(self, key: str, missing: int, position: int, error: Exception | None) -> BadInput:
        """Return what to raise where a tensor can't be read."""
        found = "its end" if error is None else getattr(error, "strerror", None) or error
        return BadInput(f"{self.path}, {key!r}: expected a readable tensor, found {found}: was it changed meanwhile?")


class Tensors(Mapping[str, Tensor]):
    """The tensors of safetensors files by key, read on access: whole, or a block at a time by `reader`.

    Only the last tensor stays in memory. A tensor that the caller still holds is returned again, not read again.
    Several threads may read at once.

    Parameters
    ----------
    files : Mapping[Path, Sequence[str] | None]
        Each file with the keys to take from it; None takes all keys.
    device : str (default: "cpu")
        Device of the tensors.

    Raises
    ------
    BadInput
        A file can't be read, its header and its length don't agree, it lacks a key, or a tensor is of a dtype that
        can't be merged.
    """

    def __init__(self, files: Mapping[Path, Sequence[str] | None], device: str = "cpu") -> None:
        self.specs: dict[str, Spec] = {}
        self.file_of: dict[str, Path] = {}
        self.device = device
        self.wide: torch.dtype | None = None  # dtype to which floating-point tensors are widened when read
        self._file: tuple[Path, Any] | None = None  # one open file at a time: large models have a thousand shards
        self._last: Tensor | None = None
        self._lock = threading.Lock()
        self._held: weakref.WeakValueDictionary[str, Tensor] = weakref.WeakValueDictionary()
        self._files: weakref.WeakValueDictionary[Path, _File] = weakref.WeakValueDictionary()
        self._recent: _File | None = None  # open until another is read
        for path, keys in files.items():
            self._add(path, keys)

    def stored_dtype(self, key: str) -> torch.dtype:
        """Return the dtype of a tensor in its file, before any widening."""
        return self.specs[key].dtype

    def _add(self, path: Path, keys: Sequence[str] | None) -> None:
        try:
            file = self._opened(path)
        except (SafetensorError, OSError) as error:
            raise BadInput(
                f"{path}: expected a safetensors file, found one that is damaged or cut off ({error}): copy or "
                "download it again"
            ) from None
        there = file.offset_keys()
        if keys is not None and (missing := sorted(set(keys) - set(there))):
            raise BadInput(f"{path}: expected the tensors that the index lists, found {missing[:3]} missing")
        wanted = set(there if keys is None else keys)
        for key in there:
            if key not in wanted:
                continue
            view = file.get_slice(key)
            if view.get_dtype() not in DTYPES:
                raise BadInput(f"{path}, {key!r}: expected a tensor of real numbers, found {view.get_dtype()}")
            self.specs[key] = Spec(DTYPES[view.get_dtype()], tuple(view.get_shape()))
            self.file_of[key] = path

    def _opened(self, path: Path) -> Any:
        if self._file is None or self._file[0] != path:
            # pread: each tensor has memory of its own; a mapped file would count as memory as a whole
            self._file = (path, safe_open(path, framework="pt", backend="pread"))
        return self._file[1]

    def spec(self, key: str) -> Spec:
        """Return the dtype in which a tensor is read, and its shape; nothing is read."""
        spec = self.specs[key]
        wider = self.wide is not None and spec.dtype.is_floating_point
        return Spec(self.wide, spec.shape) if wider and self.wide is not None else spec

    def __getitem__(self, key: str) -> Tensor:
        """Return a tensor; raise SafetensorError or OSError where the file was changed meanwhile."""
        with self._lock:
            tensor = self._held.get(key)
            if tensor is None:
                self._last = None  # frees the last tensor before the next is read
                tensor = self._opened(self.file_of[key]).get_tensor(key).to(self.device, self.spec(key).dtype)
                self._held[key] = tensor
            self._last = tensor
            return tensor

    def reader(self, key: str) -> Values:
        """Return a `StoredTensor` that reads a large tensor a block at a time, or a small tensor itself."""
        path, spec = self.file_of[key], self.specs[key]
        if math.prod(spec.shape) < _LARGE:
            return self[key]
        with self._lock:
            self._recent = file = self._files.get(path) or _File(path)
            self._files[path] = file
        kinds = spec.dtype, self.spec(key).dtype
        return StoredTensor(file, key, file.start(key), torch.Size(spec.shape), *kinds, torch.device(self.device))

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, key: object) -> bool:
        return key in self.specs


class Writer:
    """One safetensors file, written a tensor at a time in any order.

    safetensors' own `save_file` wants all tensors in memory. The layout (8 bytes of length, a JSON header, the bytes of
    the tensors without gaps) follows from shapes and dtypes, so each tensor has its place before any is there; the wide
    dtypes come first, so that every tensor lies aligned.

    Parameters
    ----------
    path : Path
        A new file. Its whole length is claimed at once: a disk that is too small says so before the work.
    specs : Mapping[str, Spec]
        What it will hold.

    Raises
    ------
    OSError
        The file can't be written.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec]) -> None:
        self.path, self.specs = path, dict(specs)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        for key, spec in sorted(specs.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
            offsets[key], end = end, end + spec.size
            place = [offsets[key], end]
            header[key] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": place}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._start = {key: 8 + len(text) + offset for key, offset in offsets.items()}
        self._missing = set(specs)
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed by close
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, 8 + len(text) + end)
            self._write(0, memoryview(struct.pack("<Q", len(text)) + text))
        except BaseException:
            self._file.close()
            raise

    def write(self, key: str, tensor: Tensor) -> None:
        """Write a tensor, which has to be as its spec says."""
        found = Spec(tensor.dtype, tuple(tensor.shape))
        if found != self.specs[key]:
            raise ValueError(f"{key!r}: expected {self.specs[key]}, found {found}")
        self._write(self._start[key], memoryview(bytes_of(tensor.detach().cpu().reshape(-1))))
        self._missing.discard(key)

    def _write(self, position: int, data: memoryview) -> None:
        self._file.seek(position)
        while data:  # a write may take less than it is given
            data = data[self._file.write(data[:_CHUNK]) :]

    def close(self, complete: bool = True) -> None:
        """Close the file, once it is on the disk.

        Parameters
        ----------
        complete : bool (default: True)
            False: the file is given up, and need not hold all its tensors.
        """
        with self._file:
            if complete:
                if self._missing:
                    raise ValueError(
                        f"{self.path.name}: expected all its tensors, found none for {min(self._missing)!r}"
                    )
                os.fsync(self._file.fileno())
