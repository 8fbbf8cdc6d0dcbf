"""Replies on disk: states that are merged from files, a block at a time, while memory holds one of them at most.

A file holds one reply's tensors one after the other, in C order. After a large tensor the sampled entries are written
once more, in one piece. The file has no name: its room is free again when the process ends, however it ends.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedfrom.merging.linalg.samples import sampled
from fedfrom.stored import StoredFile, StoredTensor
from fedfrom.tensor_bytes import bytes_of


class SpoolError(ValueError):
    """A reply's file can't be written or read; the message names the client, the folder and the fault."""


class SpooledState(Mapping[str, Tensor]):
    """A state on disk: each tensor is read, whole, when it is asked for, or a block at a time through `reader`.

    Parameters
    ----------
    state : Mapping[str, Tensor]
        The tensors to write, on the CPU.
    folder : Path
        An existing folder for the file.
    who : str
        Whose state it is, for errors.

    Raises
    ------
    SpoolError
        The state can't be written, for lack of room or of the right to. No part of the file is left.
    """

    def __init__(self, state: Mapping[str, Tensor], folder: Path, who: str) -> None:
        self._tensors: dict[str, StoredTensor] = {}
        try:
            self._file = _File(folder, who)
            for key, tensor in state.items():
                self._tensors[key] = StoredTensor(
                    self._file,
                    key,
                    start=self._file.size,
                    shape=tensor.shape,
                    stored=tensor.dtype,
                    dtype=tensor.dtype,
                    device=torch.device("cpu"),
                    sample_start=self._file.size + tensor.nbytes,
                )
                self._file.write(bytes_of(tensor.detach().reshape(-1).contiguous()))
                if (sample := sampled(tensor)).numel() < tensor.numel():
                    self._file.write(bytes_of(sample.contiguous()))
        except OSError as error:
            self.close()
            raise SpoolError(
                f"{who}, spool: expected to write {sum(t.nbytes for t in state.values()) / 2**20:.0f} MiB in {folder}, "
                f"found {error.strerror or error}: make room, or give another folder (spool=) or more memory "
                "(memory_budget=)"
            ) from error

    @property
    def damage(self) -> str | None:
        """Why the file could not be read; None where no reading has failed."""
        return self._file.damage

    def __getitem__(self, key: str) -> Tensor:
        """Return a tensor, read anew each time."""
        tensor = self._tensors[key]
        return tensor.read(0, tensor.numel()).reshape(tensor.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def reader(self, key: str) -> StoredTensor:
        """Return a tensor as a `StoredTensor`, which is read a block at a time."""
        return self._tensors[key]

    def close(self) -> None:
        """Close the file, which frees its room on the disk; later reads fail."""
        if "_file" in vars(self):
            self._file.close()


class _File(StoredFile):
    """One reply's file: written once from its start to its end, then read."""

    def __init__(self, folder: Path, who: str) -> None:
        super().__init__(tempfile.TemporaryFile(dir=folder, buffering=0))  # noqa: SIM115 (open for as long as the round)
        self.folder, self.who = folder, who
        self.size = 0
        self.damage: str | None = None

    def write(self, data: Any) -> None:
        """Write all of the bytes: a single write takes no more than 2 GiB."""
        rest = memoryview(data)
        self.size += len(rest)
        while len(rest):
            rest = rest[self.file.write(rest) :]

    def damaged(self, key: str, missing: int, position: int, error: Exception | None) -> SpoolError:
        """Return the error to raise where a tensor can't be read; its text is kept in `damage`."""
        found = f"its end at {position}: something cut it short" if error is None else str(error)
        self.damage = (
            f"{self.who}, spool: expected {missing} bytes at {position} of its file in {self.folder}, found {found}"
        )
        return SpoolError(self.damage)

    def close(self) -> None:
        """Close the file, which frees its room on the disk."""
        self.file.close()
