"""All files of the study's report: tables, pictures, and the README that says how they were made."""

from pathlib import Path

import pandas as pd

from fedfrom.atomic import write_whole
from simulations.environment import command, machine
from simulations.studies.federated import figures, tables
from simulations.studies.federated.options import FederatedOptions
from simulations.studies.federated.plan import BEST, best
from simulations.studies.frame import Frame
from simulations.tables import write_table


def write(options: FederatedOptions, frame: Frame, folder: Path) -> None:
    """Write the tables and pictures of the finished cells, and README.md."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = frame.rows()
    grid, comparison = rows[rows["part"] == "grid"], rows[rows["part"] == "comparison"]
    if len(grid):
        write_table(folder, "grid", tables.grid(grid), tables.ABOUT_GRID)
        figures.draw_grid(grid, folder / "grid.png")
    if len(comparison):
        table = tables.comparison(comparison, options.target)
        write_table(folder, "comparison", table, tables.ABOUT_COMPARISON)
        figures.draw_curves(comparison, folder / "curves.png")
    write_whole(folder / "README.md", "\n".join(_lines(options, frame, rows)) + "\n")


def _lines(options: FederatedOptions, frame: Frame, rows: pd.DataFrame) -> list[str]:
    missing, cells = frame.missing(), frame.study.cells
    hours = rows["seconds"].sum() / 3600
    chosen = "not known yet" if any(cell.part == "grid" for cell in missing) else best(rows)
    simulation = options.simulation()
    grid, others = frame.study.seeds[: options.grid_seeds], frame.study.seeds[options.grid_seeds :]
    return [
        "# FedFroM's powers p and k on SST-2",
        "",
        f"{BEST}: `{chosen}`. Tables: [grid](grid.md), [comparison](comparison.md). Pictures: grid.png, curves.png.",
        "",
        f"- {simulation.clients} clients, {simulation.rounds} rounds of {simulation.steps} steps of "
        f"{simulation.batch_size} examples, AdamW at {simulation.learning_rate:g}; {simulation.model}, "
        f"{simulation.kept_layers or 'all'} layers, LoRA r = {simulation.lora_r}; accuracy on "
        f"{simulation.eval_examples} held-out examples; k=auto chooses on {simulation.validation_examples} others.",
        f"- Seeds of the grid: {', '.join(map(str, grid))}; of the comparison: {', '.join(map(str, others))}. A seed "
        "fixes partition, initial weights, batches and examples.",
        f"- {len(cells) - len(missing)} of {len(cells)} runs{' (not complete)' if missing else ''}, {hours:.1f} hours "
        f"of rounds on {machine()}, beside other work.",
        f"- Again: `{command('python -m simulations.studies federated')} --glue-dir GLUE`, with GLUE's TSV files in "
        "GLUE/SST-2.",
    ]
