"""Environment variables of a quiet run without network access, set before flwr, ray or Hugging Face are imported."""

import os
import platform
import re
import shlex
import sys
import warnings
from pathlib import Path

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_MEMORY_MONITOR": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "MPLBACKEND": "Agg",
}


def quiet() -> None:
    """Set the variables of QUIET that are not set yet; libraries read most of them once, when they are imported."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # Raised by the imports of ray and flwr; a user of the simulation can't act on them.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)


def prepare(online: bool) -> None:
    """Set the variables, with HF_HUB_OFFLINE. Call this before Hugging Face's libraries are imported.

    Parameters
    ----------
    online : bool
        Whether the options name a model or data on the Hub. Otherwise the Hub is never asked: a missing file is an
        error at once, not a series of timeouts. The user's own value of HF_HUB_OFFLINE stays.
    """
    quiet()
    os.environ.setdefault("HF_HUB_OFFLINE", "0" if online else "1")


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> str:
    """Return this machine's cores, processor and GPU in one line."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    import torch

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{cores()} cores of {processor}{gpu}"


def command(program: str) -> str:
    """Return the command line of this process, without the paths and the number of processes of this machine.

    Parameters
    ----------
    program : str
        What was run: "python -m simulations.studies paper", a module and perhaps a subcommand.
    """
    text = shlex.join(sys.argv[len(program.split()) - 2 :])
    value = r"[ =]('[^']*'|\S+)"
    text = re.sub(rf"(^| )--(report\b|(glue-dir|out|processes){value})", "", text)
    text = re.sub(rf"(--(mergekit|spool)){value}", r"\1 PATH", text)
    return f"{program} {text.strip()}".strip()
