"""Tensors that are read from files a block at a time: from spool files of replies, and from safetensors files."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from fedfrom.merging.linalg.samples import RUN, RUNS, sampled


class StoredFile(ABC):
    """An open file of which many threads may read any part at once.

    Parameters
    ----------
    file : IO[bytes]
        Opened for reading, unbuffered.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    @abstractmethod
    def damaged(self, key: str, missing: int, position: int, error: Exception | None) -> ValueError:
        """Return the error for a tensor that can't be read; subclasses name the file or the client.

        Parameters
        ----------
        key : str
            The tensor's key.
        missing, position : int
            Number of bytes that could not be read, and the offset in the file where they start.
        error : Exception | None
            The exception of the failed read; None where the file ended.
        """

    def read_into(self, out: Tensor, start: int, key: str) -> None:
        """Fill a tensor with the file's bytes from offset `start` on, or raise the error of `damaged`."""
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
    """One tensor in a file, as a `fedfrom.merging.linalg.blocks.Reader`.

    Attributes
    ----------
    file : StoredFile
        The file, which has the entries in C order.
    key : str
        The tensor's key, for errors.
    start : int
        Offset of its first byte in the file.
    shape : torch.Size
        Its shape.
    stored : torch.dtype
        Dtype of the entries in the file.
    dtype : torch.dtype
        Dtype in which they are returned.
    device : torch.device
        Device on which they are returned.
    sample_start : int | None (default: None)
        Offset of a copy of the sample's entries, in one piece; None: the sample is read from among all entries.
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
        """Return the entries from `start` to `stop` in C order, flat; in `out`, which is flat too, where given."""
        direct = out is not None and out.dtype == self.stored and out.device.type == "cpu"
        read = out if out is not None and direct else torch.empty(stop - start, dtype=self.stored)
        self.file.read_into(read, self.start + start * self.stored.itemsize, self.key)
        if out is None:
            return read.to(self.device, self.dtype)
        return out if read is out else out.copy_(read)

    def sample(self) -> Tensor:
        """Return the entries that `fedfrom.merging.linalg.samples.sampled` takes of a tensor; only they are read."""
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


def bytes_of(tensor: Tensor) -> Any:
    """Return a view of the bytes of a contiguous tensor on the CPU; nothing is copied."""
    return tensor.view(torch.uint8).numpy().data if tensor.numel() else b""
