"""Trained states and statistics on disk: written once, merged many times."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from fedfrom.atomic import whole_file
from fedfrom.errors import BadInput

State = dict[str, Tensor]


class Shelf:
    """A folder of safetensors files, one for each state and for each client's statistics.

    Parameters
    ----------
    folder : Path
        Made before the first file is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Write a state. Its file appears complete or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self._path(name)) as hidden:
            save_file({key: tensor.contiguous() for key, tensor in state.items()}, hidden)

    def get(self, name: str) -> State:
        """Return a state.

        Raises
        ------
        BadInput
            Its file is missing, though the cell that wrote it is finished.
        """
        if name not in self:
            raise BadInput(f"{self._path(name)}: missing; remove cells.jsonl, which says that it was written")
        return load_file(self._path(name))

    def __contains__(self, name: str) -> bool:
        return self._path(name).is_file()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
