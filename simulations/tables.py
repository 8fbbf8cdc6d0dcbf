"""Tables as CSV and as Markdown."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from fedfrom.atomic import write_whole


def write_table(folder: Path, name: str, header: Sequence[str], rows: Sequence[Sequence[object]], about: str) -> None:
    """Write `name`.csv and `name`.md into a folder.

    Parameters
    ----------
    folder : Path
        Made where it is missing.
    name : str
        File name without suffix.
    header, rows : Sequence
        The columns' names, and the cells of each row. Floats are written with four decimals.
    about : str
        What the table shows; stands above the Markdown.
    """
    cells = [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([list(header), *cells])
    write_whole(folder / f"{name}.csv", text.getvalue())
    lines = [about, "", *(f"| {' | '.join(row)} |" for row in [list(header), ["---"] * len(header), *cells])]
    write_whole(folder / f"{name}.md", "\n".join(lines) + "\n")
