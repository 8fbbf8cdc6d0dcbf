"""A user's file of rows: texts or pairs of texts, and what is right for each, as it is written there."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfrom.closest import did_you_mean
from fedfrom.errors import BadInput

# names of the columns that texts are in, the first that a file has: pairs before single texts
_TEXTS = (
    ("text", "pair"),
    ("text", "text_pair"),
    ("text",),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("#1 String", "#2 String"),  # MRPC's
    ("sentence",),
)
# the last three are QQP's, MRPC's and STS-B's
_LABELS = ("label", "labels", "is_duplicate", "Quality", "score")
_FORMATS = ".csv, .tsv, .jsonl or .txt"


@dataclass(frozen=True)
class Rows:
    """The rows of one file, in its order.

    Attributes
    ----------
    path : str
        The file, as the user named it.
    texts : list[str]
        (n,) at least two.
    pairs : list[str] | None
        (n,) each row's second text, where the file has one.
    labels : list[Any] | None
        (n,) as written: text, or JSON's values; None where the file has no such column.
    lines : list[int]
        (n,) the line of the file that each row is on.
    """

    path: str
    texts: list[str]
    pairs: list[str] | None
    labels: list[Any] | None
    lines: list[int]

    def __len__(self) -> int:
        return len(self.texts)


def read_rows(name: str) -> Rows:
    """Return the rows of a file.

    Parameters
    ----------
    name : str
        A CSV file; a TSV file, without quotes, as GLUE's are; JSON lines, an object each; or plain text, where each
        line that is not blank is a row. The first line of CSV and TSV names the columns.

    Raises
    ------
    BadInput
        It can't be read, has no column of texts, fewer than two rows, or a row without a text or a label.
    """
    path = Path(name).expanduser()
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".jsonl", ".txt"):
        raise BadInput(f"--tune {name}: expected a file of rows, {_FORMATS}, found {path.name!r}: name one of these")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"--tune {name}: expected a readable file of UTF-8 text, found: {reason}") from None
    if kind == ".txt":
        lines = [(number, {"text": line}) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    elif kind == ".jsonl":
        lines = _objects(name, text)
    else:
        lines = _cells(name, text, kind == ".tsv")
    if len(lines) < 2:
        raise BadInput(f"--tune {name}: expected at least two rows, found {len(lines)}: a few hundred are enough")
    columns = list(dict.fromkeys(column for _, row in lines for column in row))
    wanted = next((names for names in _TEXTS if set(names) <= set(columns)), None)
    if wanted is None:
        known = sorted({column for names in _TEXTS for column in names})
        raise BadInput(
            f"--tune {name}: expected a column text, or text and pair, found columns {', '.join(columns)[:100]}"
            f"{did_you_mean(columns, known)}"
        )
    label = next((column for column in _LABELS if column in columns), None)
    for number, row in lines:
        for column in wanted:
            if not isinstance(row.get(column), str) or not row[column].strip():
                raise BadInput(f"--tune {name}, line {number}: expected text in column {column!r}, found none")
        if label is not None and (row.get(label) is None or row[label] == ""):
            raise BadInput(f"--tune {name}, line {number}: expected a value in column {label!r}, found none")
    first, second = wanted[0], wanted[1] if len(wanted) > 1 else None
    return Rows(
        name,
        [row[first] for _, row in lines],
        None if second is None else [row[second] for _, row in lines],
        None if label is None else [row[label] for _, row in lines],
        [number for number, _ in lines],
    )


def _objects(name: str, text: str) -> list[tuple[int, dict[str, Any]]]:
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"--tune {name}, line {number}: expected a JSON object, found {error}") from None
        if not isinstance(row, dict):
            raise BadInput(f"--tune {name}, line {number}: expected a JSON object, found {type(row).__name__}")
        found.append((number, row))
    return found


def _cells(name: str, text: str, tabs: bool) -> list[tuple[int, dict[str, Any]]]:
    lines = text.split("\n") if tabs else text.splitlines(keepends=True)
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    reader = csv.reader(lines, **options)
    found = []
    try:
        header = [column.strip() for column in next(reader, [])]
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise BadInput(
                    f"--tune {name}, line {reader.line_num}: expected {len(header)} columns as in the first line, "
                    f"found {len(cells)}"
                )
            found.append((reader.line_num, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise BadInput(f"--tune {name}, line {reader.line_num}: expected CSV, found: {error}") from None
    return found


def class_numbers(rows: Rows, classes: int, names: Mapping[str, int]) -> list[int]:
    """Return (n,) the class of each row, in [0, classes).

    Parameters
    ----------
    rows : Rows
        With labels: whole numbers, or names.
    classes : int
        The head's number of classes, at least 2.
    names : Mapping[str, int]
        A config's label2id; empty where none is known.

    Raises
    ------
    BadInput
        There are no labels, or one is no class.
    """
    known = {name.lower(): number for name, number in names.items() if 0 <= number < classes}
    return [_class(rows, line, label, classes, known) for line, label in zip(rows.lines, _labels(rows), strict=True)]


def real_numbers(rows: Rows) -> list[float]:
    """Return (n,) the labels of rows for a regression head; raise BadInput where one is no finite number."""
    found = []
    for line, label in zip(rows.lines, _labels(rows), strict=True):
        number = _number(label)
        if number is None or number - number != 0:
            raise BadInput(f"--tune {rows.path}, line {line}: expected a number as label, found {label!r}")
        found.append(number)
    return found


def _labels(rows: Rows) -> Sequence[Any]:
    if rows.labels is None:
        raise BadInput(f"--tune {rows.path}: expected a column label beside the text, found none")
    return rows.labels


def _class(rows: Rows, line: int, label: Any, classes: int, known: Mapping[str, int]) -> int:
    number = _number(label)
    if number is None and isinstance(label, str):
        number = known.get(label.strip().lower())
    if number is None or number not in range(classes):
        names = f", or one of {', '.join(known)}" if known else ""
        raise BadInput(
            f"--tune {rows.path}, line {line}: expected a class from 0 to {classes - 1}{names}, found "
            f"{str(label)[:60]!r}: number the classes as the head does, or name them under label2id in a config.json "
            "beside the adapter"
        )
    return int(number)


def _number(label: Any) -> float | None:
    try:
        return float(label) if isinstance(label, str | int | float) else None
    except (ValueError, OverflowError):
        return None
