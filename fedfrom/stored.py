"""Tensors that are read from files a block at a time: from the files of replies on disk, and from safetensors files."""

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
    """An open file that many threads may read at once, each at its own position.

    Parameters
    ----------
    file : IO[bytes]
        Opened without a buffer.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    @abstractmethod
    def damaged(self, key: str, missing: int, position: int, error: Exception | None) -> ValueError:
        """Return the error to raise where a tensor can't be read; a subclass knows whose file this is.

        Parameters
        ----------
        key : str
            The tensor's key.
        missing, position : int
            Number of bytes that could not be read, and the byte from which on.
        error : Exception | None
            The error of the reading; None where the file ended.
        """

    def read_into(self, out: Tensor, start: int, key: str) -> None:
        """Fill a tensor with the file's bytes from `start` on, or raise the error that `damaged` returns."""
        rest, position = memoryview(bytes_of(out)), start
        while len(rest):  # a read may give less than was asked for
            error: Exception | None = None
            try:
                found = os.preadv(self.file.fileno(), [rest], position)
            except (OSError, ValueError) as caught:  # ValueError: the file is closed
                found, error = 0, caught
            if not found:
                raise self.damaged(key, len(rest), position, error) from error
            rest, position = rest[found:], position + found


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, a `fedfrom.merging.linalg.blocks.Reader`.

    Attributes
    ----------
    file : StoredFile
        The file that holds the tensor's entries, in C order.
    key : str
        The tensor's key, for errors.
    start : int
        The byte in the file at which the entries begin.
    shape : torch.Size
        The tensor's shape.
    stored : torch.dtype
        The dtype of the entries in the file.
    dtype : torch.dtype
        The dtype to which the entries are converted when they are read.
    device : torch.device
        The device of the tensors that reading returns.
    sample_start : int | None (default: None)
        The byte at which a copy of the sampled entries begins, in one piece. None: there is no copy, and the sample is
        read from among the other entries.
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
        """Return the number of entries."""
        return self.shape.numel()

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return the entries from `start` to `stop` in C order, in `out` where given: flat, and of `self.dtype`."""
        direct = out is not None and out.dtype == self.stored and out.device.type == "cpu"
        read = out if out is not None and direct else torch.empty(stop - start, dtype=self.stored)
        self.file.read_into(read, self.start + start * self.stored.itemsize, self.key)
        if out is None:
            return read.to(self.device, self.dtype)
        return out if read is out else out.copy_(read)

    def sample(self) -> Tensor:
        """Return `fedfrom.merging.linalg.samples.sampled` of the tensor, reading only the sampled entries."""
        numel = self.numel()
        size = sampled(torch.empty(1).expand(numel)).numel()  # an expanded tensor takes no memory
        if size == numel:
            return self.read(0, numel)
        out, step = torch.empty(size, dtype=self.stored), numel // RUNS
        if self.sample_start is None:
            for i, run in enumerate(out.split(RUN)):
                self.file.read_into(run, self.start + i * step * self.stored.itemsize, self.key)
        else:
            self.file.read_into(out, self.sample_start, self.key)
        return out.to(self.device, self.dtype)
