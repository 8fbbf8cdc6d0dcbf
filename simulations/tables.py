"""Tables as CSV and as Markdown."""

from pathlib import Path

import pandas as pd

from fedfrom.atomic import write_whole


def write_table(folder: Path, name: str, table: pd.DataFrame, about: str) -> None:
    """Write `name`.csv and `name`.md into a folder.

    Parameters
    ----------
    folder : Path
        Made where it is missing.
    name : str
        File name without suffix.
    table : pd.DataFrame
        Texts and numbers. Floats are written with four decimals.
    about : str
        What the table shows. It stands above the Markdown.
    """
    texts = table.astype(object).map(lambda cell: f"{cell:.4f}" if isinstance(cell, float) else str(cell))
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{name}.csv", texts.to_csv(index=False, lineterminator="\n"))
    write_whole(folder / f"{name}.md", "\n".join([about, "", *markdown(texts)]) + "\n")


def markdown(texts: pd.DataFrame) -> list[str]:
    """Return the lines of a Markdown table: the columns' names, a rule, and a line for each row of texts."""
    rows = [list(map(str, texts.columns)), ["---"] * len(texts.columns), *texts.to_numpy().tolist()]
    return [f"| {' | '.join(row)} |" for row in rows]
