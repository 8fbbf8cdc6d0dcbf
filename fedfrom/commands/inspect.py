"""`fedfrom inspect IN …`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedfrom.arguments import power_of, progress_bar
from fedfrom.commands.console import console
from fedfrom.commands.options import Base, Device, Dora, ForceBase, Inputs, SameBase


def inspect(
    inputs: Inputs,
    k: Annotated[
        str,
        typer.Option(
            "--k", help="Power of the norm in the weights that are predicted. [default: 1]", show_default=False
        ),
    ] = "1.0",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    plot: Annotated[
        str | None, typer.Option("--plot", help="Draw norms, weights, interference and cosines into FILE.png.")
    ] = None,
    every_layer: Annotated[bool, typer.Option("--all", help="Show all layers, not the 10 that disagree most.")] = False,
    wide: Annotated[bool, typer.Option("--wide", help="Show every column, however narrow the terminal is.")] = False,
    base: Base = None,
    device: Device = "cpu",
    force_base: ForceBase = False,
    dora: Dora = False,
    same_base: SameBase = False,
) -> None:
    """Show how adapters or checkpoints IN … compare, layer by layer, before they are merged.

    IN is a folder or a name on the Hub, as in fedfrom merge. Shown are
    ranks, norms, effective ranks (the stable rank: the sum of an update's squared singular values divided by the
    largest of them), pairwise cosines, FroM's weights, and the share of the updates' energy that their merge loses.

    \b
    fedfrom inspect adapter-a adapter-b
    fedfrom inspect adapter-a adapter-b --k 0.5 --all
    fedfrom inspect model-a model-b --base pretrained --json > found.json
    fedfrom inspect adapter-a adapter-b --plot inputs.png
    """
    power = power_of(k)
    from fedfrom.files.inspection import inspect_folders

    if plot is not None:
        from fedfrom.files.figure import check_plot

        check_plot(Path(plot))
    with progress_bar("Reading") as progress:
        found = inspect_folders(inputs, power, base, device, force_base, dora, same_base, progress)
    if plot is not None:
        from fedfrom.files.figure import draw

        draw(found, Path(plot))
    if as_json:
        print(json.dumps(found.to_dict(), indent=1, allow_nan=False))
        return
    from fedfrom.files.tables import tables

    terminal = console(wide)
    for table in tables(found, every_layer, terminal.width):
        terminal.print(table)
