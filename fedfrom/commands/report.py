"""`fedfrom report RUN …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="Results folders that `python -m simulations` wrote.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="The page, or a folder for it. [default: report.html in the only RUN; for several, here]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write one HTML page, which opens offline, on one or several simulations, and its pictures as PNGs beside it.

    Runs that differ in their seed alone are shown together, with 95 % intervals.
    """
    from fedfrom.pages.page_of_runs import PAGE, write_report
    from fedfrom.pages.runs import FILE

    if out is None:
        only = runs[0].parent if runs[0].name == FILE else runs[0]
        out = (only if len(runs) == 1 else Path()) / PAGE
    print(f"Report in {write_report(runs, out)}")
