"""Arguments and options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Inputs = Annotated[
    list[str],
    typer.Argument(metavar="IN...", hidden=True),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="The pretrained model: full checkpoints' updates, and adapters' saved modules, are taken from it.",
    ),
]
Device = Annotated[
    str, typer.Option("--device", help="Where layers are merged: cpu, cuda, … [default: cpu]", show_default=False)
]
ForceBase = Annotated[
    bool, typer.Option("--force-base", help="The adapters' base models go by different names, but are the same.")
]
Dora = Annotated[bool, typer.Option("--dora", help="Accept DoRA: its magnitudes are averaged, 6 to 17 % off.")]
SameBase = Annotated[
    bool,
    typer.Option("--same-base", help="Accept PiSSA and its kin: all adapters share one base model altered by it."),
]
