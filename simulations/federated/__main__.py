"""`python -m simulations.federated`: the study's command line."""

import time
from pathlib import Path
from typing import Annotated

import typer

from simulations import commands, environment
from simulations.errors import BadInput
from simulations.federated.plan import TASK, Plan
from simulations.options import Options
from simulations.study import Study

QUICK = {"rounds": 2, "steps": 2, "layers": 1, "train_examples": 600, "eval_examples": 100, "validation_examples": 50}


def run(
    out: Annotated[str, typer.Option(help="Folder of the tables, the pictures and, in work, the results kept.")] = (
        "results/federated"
    ),
    glue_dir: Annotated[str, typer.Option(help="Folder with GLUE's TSV files (or set FEDFROM_GLUE_DIR).")] = "",
    rounds: Annotated[int, typer.Option(help="Federated rounds.")] = 10,
    steps: Annotated[int, typer.Option(help="Optimiser steps of a client in a round.")] = 6,
    batch_size: Annotated[int, typer.Option(help="Examples in a training step.")] = 8,
    clients: Annotated[int, typer.Option(help="Number of clients.")] = 6,
    model: Annotated[str, typer.Option(help="minilm, a folder, or a Hub name.")] = "minilm",
    layers: Annotated[int | None, typer.Option(help="Transformer layers kept, 0: all. [default: 3 for minilm]")] = None,
    grid_seeds: Annotated[int, typer.Option(help="Seeds of the grid of p and k: 0, 1, ...")] = 3,
    seeds: Annotated[int, typer.Option(help="Seeds of the comparison: those that follow.")] = 5,
    processes: Annotated[int, typer.Option(help="Client processes at a time, 0: one a core.")] = 0,
    report: Annotated[bool, typer.Option("--report", help="Only write tables and pictures of what is there.")] = False,
    verbose: Annotated[bool, typer.Option(help="Show every round.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Minutes instead of hours: shows that it works.")] = False,
) -> None:
    """Settle FedFroM's powers p and k on SST-2: a grid on some seeds, then its best against others on other seeds.

    Stopped at any time, the same command goes on with what is missing.
    """
    try:
        asked = {
            "task": TASK,
            "glue_dir": glue_dir or None,
            "clients": clients,
            "rounds": rounds,
            "steps": steps,
            "batch_size": batch_size,
            "model": model,
            "layers": layers,
            "eval_examples": 400,
            "validation_examples": 200,
            "max_length": 48,
            "target": 0.7,
            "processes": processes,
            "verbose": verbose,
            **(QUICK if quick else {}),
        }
        if quick:
            grid_seeds, seeds = 1, 2
        options = Options.from_mapping(asked).validated()
        environment.prepare(options.needs_hub)
        plan = Plan(options, tuple(range(grid_seeds)), tuple(range(grid_seeds, grid_seeds + seeds)))
        study = Study(Path(out) / "work", plan.settings(), [piece.name for piece in plan.pieces()])
        start = time.perf_counter()
        if not report:
            from simulations.federated.running import run as run_plan

            run_plan(plan, study)
        from simulations.federated.report import write

        write(plan, study, Path(out))
        print(f"Tables and pictures in {out} after {time.perf_counter() - start:.0f} s")
    except BadInput as error:
        raise commands.ended(error, 2) from None
    except RuntimeError as error:
        raise commands.ended(error, 1) from None


if __name__ == "__main__":
    commands.execute(commands.command(run), "python -m simulations.federated")
