"""Tensors in files, read a block at a time: of replies on disk, and of safetensors files."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import IO

import torch
from torch import Tensor

from fedfrom.merging.linalg.samples import RUN, RUNS, sampled
from fedfrom.tensor_bytes import bytes_of


class StoredFile(ABC):
    """An open file that is read at any place, from many threads at once.

    Parameters
    ----------
    file : IO[bytes]
        Without a buffer.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    @abstractmethod
    def damaged(self, key: str, missing: int, position: int, error: Exception | None) -> ValueError:
        """Return what to raise where a tensor can't be read; whose file it is, its owner knows.

        Parameters
        ----------
        key : str
            The tensor's.
        missing, position : int
            How many bytes could not be read, and from where on.
        error : Exception | None
            What was raised; None where the file has come to its end.
        """

    def read_into(self, out: Tensor, start: int, key: str) -> None:
        """Fill a tensor with the bytes from `start` on, or raise what `damaged` makes of it."""
        rest, position = memoryview(bytes_of(out)), start
        while len(rest):  # a read may give less than was asked for
            error: Exception | None = None
            try:
                found = os.preadv(self.file.fileno(), [rest], position)
            except (OSError, ValueError) as caught:  # ValueError: it is closed
                found, error = 0, caught
            if not found:
                raise self.damaged(key, len(rest), position, error) from error
            rest, position = rest[found:], position + found


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: see `fedfrom.merging.linalg.blocks.Reader`.

    Attributes
    ----------
    file : StoredFile
        Where it lies, in C order, and `start` the byte there.
    key : str
        What errors call it.
    shape : torch.Size
        Its shape.
    stored : torch.dtype
        What its entries are in the file; they are read as `dtype`.
    dtype : torch.dtype
        See there.
    device : torch.device
        Where they are read to.
    sample_start : int | None (default: None)
        The byte from which on its sample lies, once more and in one piece; None: it is read from among the others.
    """

    file: StoredFile
    key: str
    start: int
    shape: torch.Size
    stored: torch.dtype
    dtype: torch.dtype
    device: torch.device
    sample_start: int | None = None

    def numel(self) -> int:
        """Return how many entries it has."""
        return self.shape.numel()

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return the entries from `start` to `stop` in C order; in `out`, flat and of this dtype, where given."""
        direct = out is not None and out.dtype == self.stored and out.device.type == "cpu"
        read = out if out is not None and direct else torch.empty(stop - start, dtype=self.stored)
        self.file.read_into(read, self.start + start * self.stored.itemsize, self.key)
        if out is None:
            return read.to(self.device, self.dtype)
        return out if read is out else out.copy_(read)

    def sample(self) -> Tensor:
        """Return what `fedfrom.merging.linalg.samples.sampled` does of all its entries; no others are read."""
        numel = self.numel()
        size = sampled(torch.empty(1).expand(numel)).numel()
        if size == numel:
            return self.read(0, numel)
        out, step = torch.empty(size, dtype=self.stored), numel // RUNS
        if self.sample_start is None:
            for i, run in enumerate(out.split(RUN)):
                self.file.read_into(run, self.start + i * step * self.stored.itemsize, self.key)
        else:
            self.file.read_into(out, self.sample_start, self.key)
        return out.to(self.device, self.dtype)
