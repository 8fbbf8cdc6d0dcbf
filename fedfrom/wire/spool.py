"""Replies on disk: states that are merged from files, a block at a time, while memory holds one of them at most.

A file holds one reply's tensors one after the other, in C order, each followed by the entries that are sampled of it.
It has no name: whatever becomes of this process, its room is free again when it ends.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedfrom.merging.linalg.samples import sampled


class SpoolError(ValueError):
    """What is wrong with a reply's file; names the folder, whose reply it is, and what to do."""


@dataclass(frozen=True)
class SpooledTensor:
    """One tensor of a file, which is read a block at a time: see `fedfrom.merging.linalg.blocks.Reader`."""

    file: _File
    shape: torch.Size
    dtype: torch.dtype
    start: int

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def numel(self) -> int:
        """Return how many entries it has."""
        return self.shape.numel()

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return the entries from `start` to `stop` in C order; in `out`, flat and of this dtype, where given."""
        out = torch.empty(stop - start, dtype=self.dtype) if out is None else out
        self.file.read_into(out, self.start + start * self.dtype.itemsize)
        return out

    def sample(self) -> Tensor:
        """Return what `fedfrom.merging.linalg.samples.sampled` does of all its entries."""
        out = torch.empty(sampled(torch.empty(1).expand(self.numel())).numel(), dtype=self.dtype)
        self.file.read_into(out, self.start + self.numel() * self.dtype.itemsize)
        return out


class SpooledState(Mapping[str, Tensor]):
    """A state on disk: each tensor is read, whole, when it is asked for, or a block at a time through `reader`.

    Parameters
    ----------
    state : Mapping[str, Tensor]
        What to write; on the CPU.
    folder : Path
        Where; must be there.
    who : str
        Whose state it is, for errors.

    Raises
    ------
    SpoolError
        It can't be written: no room, or no right to. Nothing of it is left.
    """

    def __init__(self, state: Mapping[str, Tensor], folder: Path, who: str) -> None:
        self._tensors: dict[str, SpooledTensor] = {}
        try:
            self._file = _File(folder, who)
            for key, tensor in state.items():
                self._tensors[key] = SpooledTensor(self._file, tensor.shape, tensor.dtype, self._file.size)
                for part in (tensor.detach().reshape(-1), sampled(tensor)):
                    self._file.write(_bytes(part.contiguous()))
        except OSError as error:
            self.close()
            raise SpoolError(
                f"{who}, spool: expected to write {sum(t.nbytes for t in state.values()) / 2**20:.0f} MiB in {folder}, "
                f"found {error.strerror or error}: make room, or give another folder (spool=) or more memory "
                "(memory_budget=)"
            ) from error

    @property
    def damage(self) -> str | None:
        """What was wrong when it could not be read."""
        return self._file.damage

    def __getitem__(self, key: str) -> Tensor:
        """Return a tensor, read anew each time."""
        tensor = self._tensors[key]
        return tensor.read(0, tensor.numel()).reshape(tensor.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def reader(self, key: str) -> SpooledTensor:
        """Return what reads a tensor a block at a time."""
        return self._tensors[key]

    def close(self) -> None:
        """Give the disk its room back; what reads from here fails from now on."""
        if "_file" in vars(self):
            self._file.close()


class _File:
    """One reply's file: written once from its start to its end, then read anywhere, from many threads at once."""

    def __init__(self, folder: Path, who: str) -> None:
        self.folder, self.who = folder, who
        self.size = 0
        self.damage: str | None = None
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (open for as long as the round)

    def write(self, data: Any) -> None:
        """Write all of the bytes: a single write takes no more than 2 GiB."""
        rest = memoryview(data)
        self.size += len(rest)
        while len(rest):
            rest = rest[self._file.write(rest) :]

    def read_into(self, out: Tensor, start: int) -> None:
        """Fill a tensor with the bytes from `start` on, or raise SpoolError."""
        wanted, position = memoryview(_bytes(out)), start
        while len(wanted):
            try:
                found = os.preadv(self._file.fileno(), [wanted], position)
                trouble = f"its end at {position}: something cut it short"
            except (OSError, ValueError) as error:  # ValueError: it is closed
                found, trouble = 0, str(error)
            if not found:
                self.damage = (
                    f"{self.who}, spool: expected {len(wanted)} bytes at {position} of its file in {self.folder}, "
                    f"found {trouble}"
                )
                raise SpoolError(self.damage)
            wanted, position = wanted[found:], position + found

    def close(self) -> None:
        """Give the disk its room back."""
        self._file.close()


def _bytes(tensor: Tensor) -> Any:
    return tensor.view(torch.uint8).numpy().data if tensor.numel() else b""
