"""What the parts need of a machine, and what it lacks: one sentence each, with the remedy."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

PARTS = ("adapters", "full", "federated")
_MERGING = ("torch", "numpy", "pandas")
PACKAGES = {
    "adapters": (*_MERGING, "peft", "transformers"),
    "full": _MERGING,
    "federated": (*_MERGING, "peft", "transformers", "safetensors", "flwr"),
}
"""The packages that each part imports; neither ray nor datasets nor flwr_datasets is among them."""
FILES = ("SST-2/train.tsv", "SST-2/dev.tsv", "QNLI/train.tsv", "QNLI/dev.tsv")
VARIABLE = "FEDFROM_GLUE_DIR"


def missing_packages(parts: Sequence[str]) -> list[str]:
    """Return a sentence for each package that is not installed."""
    names = dict.fromkeys(name for part in parts for name in PACKAGES[part])
    return [_missing(name, parts) for name in names if importlib.util.find_spec(name) is None]


def _missing(name: str, parts: Sequence[str]) -> str:
    users = [part for part in parts if name in PACKAGES[part]]
    return (
        f"The package {name} is not installed, which {_and(users)} {'needs' if len(users) == 1 else 'need'}: "
        f"pip install -c constraints.txt {name}."
    )


def missing_gpu() -> str | None:
    """Return a sentence where torch has no CUDA device."""
    import torch

    if torch.cuda.is_available():
        return None
    build = "a CUDA build" if torch.version.cuda else "a build without CUDA"
    return (
        f"No GPU: torch {torch.__version__}, {build}, finds no CUDA device; run this where it finds one, or give "
        "--device cpu for a rehearsal on the CPU."
    )


def missing_glue(folder: str) -> str | None:
    """Return a sentence where GLUE's files are not in the folder; "" is no folder."""
    remedy = f"give --glue-dir or {VARIABLE} a folder with {', '.join(FILES)}, or leave federated out (--only)"
    if not folder:
        return f"No GLUE folder: {remedy}."
    root = Path(os.path.expanduser(folder))
    lacking = [name for name in FILES if not (root / name).is_file() and not _other_name(root, name)]
    return f"The GLUE folder {folder} lacks {', '.join(lacking)}: {remedy}." if lacking else None


def missing_model(model: str) -> str | None:
    """Return a sentence where the model of the federated part is not there; "minilm" is that of a package."""
    from fedfrom.errors import BadInput
    from simulations import assets
    from simulations.options import DEFAULT_MODEL

    try:
        if model == DEFAULT_MODEL:
            assets.model_folder()
    except BadInput as error:
        return f"The model {model} is missing: {error}; or name another with --model."
    return None


def _other_name(root: Path, name: str) -> bool:
    """Whether the task's training file has the other name that `simulations.glue` reads."""
    path = root / name
    return path.name == "train.tsv" and path.with_name("train_subset.tsv").is_file()


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
