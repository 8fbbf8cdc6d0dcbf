"""An input: a folder with a PEFT adapter or a Hugging Face checkpoint, or the name of one on the Hub."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfrom.errors import BadInput
from fedfrom.files.tensors import Tensors

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
MODEL, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
TUNING = "tuning.json"  # what fedfrom merge --tune tried
_HUB_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?(@[\w./-]+)?")
# files downloaded from the Hub: no pickles, and nothing from subfolders (other formats, earlier checkpoints)
_FETCHED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*"]
_NOT_FETCHED = ["*/*", "consolidated*"]
_CARRIED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")
_LEGAL = ("LICENSE", "NOTICE")
# files on the training of one input, which the merged model does not get
_OWN = re.compile(
    r"(trainer_state|all_results|train_results|eval_results|tuning|.*\.index)\.json|requirements\.txt", re.DOTALL
)
_LARGEST = 1 << 26  # bytes of a small file


@dataclass(frozen=True)
class Model:
    """An adapter or a checkpoint on disk.

    Attributes
    ----------
    name : str
        The name that the user gave; errors, tables and the model card use it.
    folder : Path
        The folder.
    tensors : Tensors
        The state. A tensor is read when it is accessed.
    config : dict[str, Any]
        adapter_config.json, or config.json of a checkpoint.
    is_adapter : bool
        Whether it is an adapter.
    """

    name: str
    folder: Path
    tensors: Tensors
    config: dict[str, Any]
    is_adapter: bool

    @property
    def file_of(self) -> dict[str, str]:
        """Key -> name of the file that holds the tensor."""
        return {key: path.name for key, path in self.tensors.file_of.items()}


def open_model(name: str, device: str = "cpu") -> Model:
    """Return the adapter or checkpoint of a folder, or of the Hub where the folder does not exist; no tensor is read.

    Parameters
    ----------
    name : str
        A folder, or owner/name or owner/name@revision on the Hub, whose safetensors, JSON and tokenizer files are
        downloaded.
    device : str (default: "cpu")
        Device of the tensors.

    Raises
    ------
    BadInput
        The name is unknown, or the folder has no weights that are safe to read, or they are damaged.
    """
    folder = Path(os.path.expanduser(name))
    try:
        there = os.path.lexists(folder)
    except ValueError as error:  # a name that no file can have
        raise BadInput(f"{name!r}: expected a folder, found {error}") from None
    if not there:
        folder = _download(name)
    elif not folder.is_dir():
        raise BadInput(f"{name}: expected a folder, found a file: give the folder that it lies in")
    try:
        entries = set(os.listdir(folder))
    except OSError as error:
        raise BadInput(f"{name}: can't be read: {error.strerror}") from None
    if ADAPTER in entries or ADAPTER_CONFIG in entries:
        _needs(entries, name, ADAPTER, ADAPTER_CONFIG, "adapter_model.bin")
        tensors = Tensors({folder / ADAPTER: None}, device)
        return Model(name, folder, tensors, read_json(folder / ADAPTER_CONFIG), True)
    weights = INDEX if INDEX in entries else MODEL
    _needs(entries, name, weights, CONFIG, "pytorch_model.bin")
    files = _shards(folder) if weights == INDEX else {folder / MODEL: None}
    config = read_json(folder / CONFIG)
    if config.get("quantization_config"):
        raise BadInput(f"{name}: expected weights that can be averaged, found a quantised checkpoint: dequantize it")
    return Model(name, folder, Tensors(files, device), config, False)


def _needs(entries: set[str], name: str, weights: str, config: str, pickle: str) -> None:
    if weights not in entries:
        pickles = sorted(entry for entry in entries if entry in (pickle, pickle + ".index.json"))
        pickles += sorted(entry for entry in entries if entry.endswith((".bin", ".pt", ".pth")))
        if pickles:
            raise BadInput(
                f"{name}: expected {weights}, found {pickles[0]}, a pickle, which may run code when read: load it "
                "where you trust it and save it again with save_pretrained(..., safe_serialization=True)"
            )
        wanted = f"{ADAPTER} or {MODEL}" if weights == MODEL else weights
        raise BadInput(f"{name}: expected {wanted}, found neither it nor another file of weights: name another folder")
    if config not in entries:
        raise BadInput(
            f"{name}: expected {config} beside {weights}, found none: copy it from where the model was saved"
        )


def _shards(folder: Path) -> dict[Path, list[str]]:
    """Return the keys of each shard."""
    path = folder / INDEX
    index = read_json(path).get("weight_map")
    if not isinstance(index, Mapping) or not index:
        raise BadInput(f"{path}: expected a weight_map, found none: download the checkpoint again")
    files: dict[Path, list[str]] = {}
    for key, file in index.items():
        # a file name alone: a path could lead anywhere
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise BadInput(f"{path}, {key!r}: expected a safetensors file of the same folder, found {str(file)[:80]!r}")
        files.setdefault(folder / file, []).append(key)
    for file in files:
        if not file.is_file():
            raise BadInput(f"{file}: not there, though the index lists it: download the checkpoint again")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, or raise BadInput."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(
            f"{path}: expected JSON, found {type(error).__name__}: {reason}; save or download it again"
        ) from None
    if not isinstance(found, dict):
        raise BadInput(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def _download(name: str) -> Path:
    """Return the folder of a model of the Hub, in the Hub's cache."""
    if not _HUB_NAME.fullmatch(name) or name.startswith("."):
        raise BadInput(f"{name}: no such folder")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars
    except ModuleNotFoundError:
        raise BadInput(f"{name}: no such folder; to load it from the Hub: pip install 'fedfrom[cli]'") from None
    if not sys.stderr.isatty():
        disable_progress_bars()
    repository, _, revision = name.partition("@")
    try:
        folder = snapshot_download(
            repository, revision=revision or None, allow_patterns=_FETCHED, ignore_patterns=_NOT_FETCHED
        )
    except Exception as error:  # the Hub's client raises a dozen types
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(
            f"{name}: no such folder, and the Hub gave none ({type(error).__name__}: {reason}): check the name, the "
            "network and your access"
        ) from None
    return Path(folder)


def carried_files(model: Model) -> list[Path]:
    """Return the small files that the merged model gets as well: tokenizer, generation config, licence, model code.

    Raises
    ------
    BadInput
        One of them is a link to a file outside the folder.
    """
    files = []
    for path in sorted(model.folder.iterdir()):
        name = path.name
        wanted = (name.endswith(_CARRIED) or name.startswith(_LEGAL)) and not name.startswith(".")
        if not wanted or _OWN.fullmatch(name) or name == ADAPTER_CONFIG or not path.is_file():
            continue
        home = model.folder.resolve()
        # the Hub's cache keeps files in blobs/ and links to them from snapshots/<revision>/
        blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
        if not any(room in path.resolve().parents for room in (home, blobs)):
            raise BadInput(f"{path}: a link that leads out of its folder: put the file there, or remove the link")
        if path.stat().st_size <= _LARGEST:
            files.append(path)
    return files


def copy_files(files: Sequence[Path], folder: Path) -> None:
    """Copy the contents of files into a folder, without their permissions."""
    for path in files:
        shutil.copyfile(path, folder / path.name)
