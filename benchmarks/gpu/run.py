"""The parts of a run, one after the other; every import of a part waits until it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.conditions import conditions
from benchmarks.gpu.needs import PACKAGES
from benchmarks.gpu.timing import Device, Limits
from simulations import environment
from simulations.options import Options

PROGRAM = "python -m benchmarks.gpu"


@dataclass(frozen=True)
class Sizes:
    """How large the run is: names of constants of the parts, or values of their types.

    Attributes
    ----------
    adapters : Adapters
    full : Model
    federated : Federation
        None where the constant of the part is taken.
    quick : bool
        Which constant that is.
    """

    quick: bool
    adapters: Any = None
    full: Any = None
    federated: Any = None


def sizes(quick: bool) -> Sizes:
    """Return the sizes of a rehearsal, or of a whole run."""
    return Sizes(quick)


def limits(total: float, longest: float, within: float, repeats: int) -> Limits:
    """Return a part's limits of time, in seconds."""
    return Limits(total, longest, repeats, within)


def parts(
    names: Sequence[str],
    what: Sizes,
    time: Mapping[str, Limits],
    device_name: str,
    folder: Path | None,
    glue_folder: Path,
    model: str,
) -> None:
    """Measure the parts of these names and write a table of each.

    Parameters
    ----------
    names : Sequence[str]
        Of "adapters", "full" and "federated".
    what : Sizes
        What is measured.
    time : Mapping[str, Limits]
        Limits by part.
    device_name : str
        "cuda" or "cpu".
    folder : Path | None
        Where tables are written; None prints them alone.
    glue_folder : Path
        GLUE's TSV files, for "federated".
    model : str
        The model of "federated".
    """
    asked = Options(model=model, task=("sst2",), glue_dir=str(glue_folder))
    environment.prepare(asked.needs_hub)  # before a part imports Hugging Face's libraries
    device = Device(device_name)
    for name in names:
        about = "\n\n".join(f"{line}." for line in conditions(PROGRAM, *PACKAGES[name]))
        if name == "adapters":
            from benchmarks.gpu import adapters

            size = what.adapters or (adapters.QUICK if what.quick else adapters.LLAMA)
            adapters.measure(size, device, time[name], folder, about)
        elif name == "full":
            from benchmarks.gpu import full

            size = what.full or (full.QUICK if what.quick else full.LLAMA)
            full.measure(size, device, time[name], folder, about)
        else:
            from benchmarks.gpu import federated
            from simulations.running import quiet

            size = what.federated or (federated.QUICK if what.quick else federated.FEDERATION)
            with quiet(verbose=False):
                federated.measure(size, model, glue_folder, device, time[name], folder, about)
        device.release()
