"""`python -m simulations.studies paper|federated`: the command lines."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedfrom.errors import BadInput
from simulations import commands, environment
from simulations.options import read
from simulations.studies.federated.options import QUICK as FEDERATED_QUICK
from simulations.studies.federated.options import FederatedOptions
from simulations.studies.paper.options import QUICK as PAPER_QUICK
from simulations.studies.paper.options import PaperOptions

FLAGS = {
    "report": "Only write tables and pictures of what is there.",
    "quick": "Minutes instead of hours: shows that it works, not what it gives.",
}


def paper(**given: Any) -> None:
    """Merge adapters (and full models) of QNLI, RTE and WNLI under one MNLI head by every method, on paired seeds.

    Stopped at any time, the same command goes on with what is missing.
    """

    def run(options: PaperOptions, report: bool) -> None:
        options = options.checked()
        environment.prepare(options.simulation("lora", 0).needs_hub)
        from simulations import training
        from simulations.studies.paper import cells
        from simulations.studies.paper import report as page
        from simulations.studies.paper.precision import settled

        options, folder = settled(options), Path(options.out)
        alone = 1 if training.device().type == "cuda" else training.cores()
        _study(
            cells.study(options, folder / "work"),
            folder,
            options.processes or alone,
            report,
            lambda frame: page.write_report(options, frame, folder),
        )

    _execute(PaperOptions, given, PAPER_QUICK, run)


def federated(**given: Any) -> None:
    """Settle FedFroM's powers p and k on SST-2: a grid on some seeds, then its best against others on other seeds.

    Stopped at any time, the same command goes on with what is missing.
    """

    def run(options: FederatedOptions, report: bool) -> None:
        simulation = options.simulation()
        environment.prepare(simulation.needs_hub)
        from simulations.studies.federated import plan
        from simulations.studies.federated import report as page

        folder = Path(options.out)
        # one simulation at a time, whose clients are processes of their own
        _study(plan.study(options), folder, 1, report, lambda frame: page.write_report(options, frame, folder))

    _execute(FederatedOptions, given, FEDERATED_QUICK, run)


def _execute(kind: type, given: dict[str, Any], quick: Mapping[str, Any], run: Callable[[Any, bool], None]) -> None:
    preset = quick if given.pop("quick") else {}
    report = given.pop("report")
    asked = {name: value for name, value in given.items() if value is not None}
    try:
        run(read(kind, {**preset, **asked}), report)
    except BadInput as error:
        raise commands.ended(error, 2) from None
    except RuntimeError as error:
        raise commands.ended(error, 1) from None


def _study(study: Any, folder: Path, processes: int, report: bool, write: Callable[[Any], None]) -> None:
    """Compute what is missing of a study, unless only its report is asked for, and write its tables and pictures."""
    from simulations.studies.frame import Frame
    from simulations.studies.running import run

    start = time.perf_counter()
    frame = Frame(folder / "work", study)
    if not report:
        run(frame, processes)
    write(frame)
    print(f"Tables and pictures in {folder} after {time.perf_counter() - start:.0f} s")


def main() -> None:
    """Run the command line."""
    studies = ((paper, PaperOptions), (federated, FederatedOptions))
    app = commands.commands([commands.with_options(run, options, **FLAGS) for run, options in studies])
    commands.execute(app, "python -m simulations.studies")


if __name__ == "__main__":
    main()
