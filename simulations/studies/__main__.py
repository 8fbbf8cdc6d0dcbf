"""`python -m simulations.studies paper|federated|glue`: the command lines of the studies."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from simulations import commands, environment
from simulations.studies.federated.options import QUICK as FEDERATED_QUICK
from simulations.studies.federated.options import FederatedOptions
from simulations.studies.glue.options import QUICK as GLUE_QUICK
from simulations.studies.glue.options import GlueOptions
from simulations.studies.paper.options import QUICK as PAPER_QUICK
from simulations.studies.paper.options import PaperOptions
from simulations.studies.study import Study

if TYPE_CHECKING:  # it imports pandas, which --help need not wait for
    from simulations.studies.frame import Frame

FLAGS = {
    "report": "Only write the tables and pictures of the finished work.",
    "quick": "Minutes instead of hours: the scores mean nothing.",
}


@commands.takes(PaperOptions, PAPER_QUICK, **FLAGS)
def paper(options: PaperOptions, report: bool) -> None:
    """Merge adapters (and full models) of QNLI, RTE and WNLI under one MNLI head by every method, on paired seeds.

    A run that was stopped goes on with the missing work when the same command is given again.
    """
    environment.prepare(options.checked().simulation("lora", 0).needs_hub)
    from simulations import training
    from simulations.studies.paper import cells, summary

    folder = Path(options.out)
    study = cells.study(options, folder / "work")
    _run(
        study,
        folder,
        options.processes or training.free_workers(),
        report,
        lambda frame: summary.write(options, frame, folder),
    )


@commands.takes(FederatedOptions, FEDERATED_QUICK, **FLAGS)
def federated(options: FederatedOptions, report: bool) -> None:
    """Settle FedFroM's powers p and k on SST-2: a grid on some seeds, then its best against others on other seeds.

    A run that was stopped goes on with the missing work when the same command is given again.
    """
    environment.prepare(options.simulation().needs_hub)
    from simulations.studies.federated import plan, summary

    folder = Path(options.out)
    # one simulation at a time: its clients are processes already
    _run(plan.study(options), folder, 1, report, lambda frame: summary.write(options, frame, folder))


@commands.takes(GlueOptions, GLUE_QUICK, **FLAGS)
def glue(options: GlueOptions, report: bool) -> None:
    """Merge the adapters of GLUE or NLI tasks by every method at every scale, and score them under the tasks' heads.

    A run that was stopped goes on with the missing work when the same command is given again.
    """
    environment.prepare(options.simulation(options.tasks[0], 0).needs_hub)
    from simulations.studies.glue import plan, summary

    folder = Path(options.out or f"results/{options.suite}")
    _run(plan.study(options), folder, options.processes, report, lambda frame: summary.write(frame, folder))


def _run(study: Study, folder: Path, processes: int, report: bool, write: "Callable[[Frame], None]") -> None:
    """Compute the missing cells of a study, unless only its report is asked for, and write its tables and pictures."""
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
    commands.execute(commands.commands([paper, federated, glue]), "python -m simulations.studies")


if __name__ == "__main__":
    main()
