"""The parts of a run, one after the other; every import of a part waits until it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.conditions import conditions
from benchmarks.gpu.needs import PACKAGES
from benchmarks.gpu.timing import Device, Limits
from simulations import environment
from simulations.options import Options

if TYPE_CHECKING:
    from benchmarks.gpu.adapters import Adapters
    from benchmarks.gpu.federated import Federation
    from benchmarks.gpu.full import Model

PROGRAM = "python -m benchmarks.gpu"


@dataclass(frozen=True)
class Sizes:
    """How large the run is.

    Attributes
    ----------
    quick : bool
        Whether a part that is None here is that of a rehearsal, or of a whole run.
    adapters : Adapters | None
        What the part of this name measures.
    full : Model | None
        The same.
    federated : Federation | None
        The same.
    """

    quick: bool
    adapters: Adapters | None = None
    full: Model | None = None
    federated: Federation | None = None


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

            wanted = what.adapters or (adapters.QUICK if what.quick else adapters.LLAMA)
            adapters.measure(wanted, device, time[name], folder, about)
        elif name == "full":
            from benchmarks.gpu import full

            sized = what.full or (full.QUICK if what.quick else full.LLAMA)
            full.measure(sized, device, time[name], folder, about)
        else:
            from benchmarks.gpu import federated
            from simulations.running import quiet

            federation = what.federated or (federated.QUICK if what.quick else federated.FEDERATION)
            with quiet(verbose=False):
                federated.measure(federation, model, glue_folder, device, time[name], folder, about)
        device.release()
