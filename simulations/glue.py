"""GLUE's tasks, SNLI and SICK as columns of text and labels, from TSV files or from the Hugging Face Hub."""

import csv
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedfrom.errors import BadInput

Columns = dict[str, list[str]]

HUB_NAME = "nyu-mll/glue"
NO_LABEL = "-1"  # the Hub's number where annotators did not agree
CONSTANT_NAMES = ("text", "pair", "label")


@dataclass(frozen=True)
class Layout:
    """A task's files, columns and labels.

    Attributes
    ----------
    folder : str
        Name of the task's folder.
    text, pair, label : str
        Columns of the sentence, of the second sentence (None without one), and of the label.
    classes : tuple[str, ...]
        Labels in the file, by class number; empty for a score.
    names : tuple[str, ...]
        Readable names of the classes.
    hub : tuple[str, ...]
        Columns of the Hub's copy: text and, where there is one, pair.
    header : tuple[str, ...] | None
        Columns of a file without a header line.
    held_out : tuple[str, ...]
        Names of the file of held-out examples; the first that is there is read.
    hub_name : str
        The Hub's dataset that has the task, empty for none.
    """

    folder: str
    text: str
    pair: str | None
    label: str
    classes: tuple[str, ...]
    names: tuple[str, ...]
    hub: tuple[str, ...]
    header: tuple[str, ...] | None = None
    held_out: tuple[str, ...] = ("dev.tsv", "dev_matched.tsv")
    hub_name: str = HUB_NAME


# Class 0 is entailment wherever there is entailment, so that one head can serve several tasks. WNLI's own numbers run
# the other way round.
ENTAILED = ("entailment", "not_entailment")
THREE_WAY = ("entailment", "neutral", "contradiction")
LAYOUTS = {
    "cola": Layout(
        "CoLA",
        "sentence",
        None,
        "label",
        ("0", "1"),
        ("unacceptable", "acceptable"),
        ("sentence",),
        header=("source", "label", "judgement", "sentence"),
    ),
    "sst2": Layout("SST-2", "sentence", None, "label", ("0", "1"), ("negative", "positive"), ("sentence",)),
    "mrpc": Layout(
        "MRPC",
        "#1 String",
        "#2 String",
        "Quality",
        ("0", "1"),
        ("different", "equivalent"),
        ("sentence1", "sentence2"),
    ),
    "qqp": Layout(
        "QQP",
        "question1",
        "question2",
        "is_duplicate",
        ("0", "1"),
        ("different", "duplicate"),
        ("question1", "question2"),
    ),
    "stsb": Layout("STS-B", "sentence1", "sentence2", "score", (), (), ("sentence1", "sentence2")),
    "mnli": Layout("MNLI", "sentence1", "sentence2", "label", THREE_WAY, THREE_WAY, ("premise", "hypothesis")),
    "qnli": Layout("QNLI", "question", "sentence", "label", ENTAILED, ENTAILED, ("question", "sentence")),
    "rte": Layout("RTE", "sentence1", "sentence2", "label", ENTAILED, ENTAILED, ("sentence1", "sentence2")),
    "wnli": Layout("WNLI", "sentence1", "sentence2", "label", ("1", "0"), ENTAILED, ("sentence1", "sentence2")),
    "snli": Layout(
        "SNLI",
        "sentence1",
        "sentence2",
        "label",
        THREE_WAY,
        THREE_WAY,
        ("premise", "hypothesis"),
        hub_name="stanfordnlp/snli",
    ),
    # Ten times as many pairs are in SICK's test set as in its dev set.
    "sick": Layout(
        "SICK", "sentence1", "sentence2", "label", THREE_WAY, THREE_WAY, (), held_out=("test.tsv",), hub_name=""
    ),
}
TRAIN_FILES = ("train.tsv", "train_subset.tsv")


def from_folder(task: str, folder: Path, part: str) -> tuple[Columns, str]:
    """Read one part of a task from GLUE's TSV layout.

    Parameters
    ----------
    task : str
        Name of the task.
    folder : Path
        Folder that holds the tasks' folders (CoLA, SST-2, …).
    part : str
        "train" or "held-out" (dev; MNLI's matched dev, SICK's test).

    Returns
    -------
    tuple[Columns, str]
        Columns text, pair (for pairs) and label (class number or score, as text) beside the file's other columns;
        and the text that names their source.

    Raises
    ------
    BadInput
        The folder, the task's folder or its file is missing or unreadable, or a label is unknown.
    """
    layout = LAYOUTS[task]
    if not os.path.isdir(folder):
        raise BadInput(f"--glue-dir {folder}: no such folder")
    candidates = [folder / layout.folder / name for name in (TRAIN_FILES if part == "train" else layout.held_out)]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        none = "neither" if len(candidates) > 1 else "no"
        hub = ", or leave --glue-dir out to read it from the Hub" if layout.hub_name else ""
        raise BadInput(
            f"task {task}: found {none} {' nor '.join(map(str, candidates))}; put {layout.folder}'s file there{hub}"
        )
    try:
        with path.open(encoding="utf-8", newline="") as file:
            # Quoting off: GLUE's texts contain unclosed quotation marks.
            lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            header = list(layout.header) if layout.header else next(lines, [])
            rows = list(lines)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path}: can't be read: {error}") from None
    label = "gold_label" if "gold_label" in header else layout.label
    missing = [name for name in (layout.text, layout.pair, label) if name and name not in header]
    if missing:
        raise BadInput(f"{path}: expected a column {missing[0]!r}, found {', '.join(header)}")
    whole = [row for row in rows if len(row) == len(header)]
    columns = {name: [row[position] for row in whole] for position, name in enumerate(header)}
    dropped = f", {len(rows) - len(whole)} broken lines left out" if len(whole) < len(rows) else ""
    return _named(columns, layout, label, str(path)), f"{path}{dropped}"


def from_hub(task: str, part: str) -> tuple[Columns, str]:
    """Read one part of a task from the Hugging Face Hub; the same columns as `from_folder`.

    Raises
    ------
    BadInput
        The Hub has no copy that is known here, or it can't be reached and its cache lacks the task.
    """
    import datasets

    layout = LAYOUTS[task]
    if not layout.hub_name:
        raise BadInput(
            f"task {task}: give a folder with {layout.folder}/train.tsv (--glue-dir): no copy on the Hub is known"
        )
    split = "train" if part == "train" else "validation_matched" if task == "mnli" else "validation"
    try:
        rows = datasets.load_dataset(layout.hub_name, *((task,) if layout.hub_name == HUB_NAME else ()), split=split)
    except Exception as error:  # the Hub's client raises a dozen unrelated types
        raise BadInput(
            f"task {task}: can't read {layout.hub_name} from the Hugging Face Hub ({type(error).__name__}); "
            "give a folder with its TSV files (--glue-dir), or check the connection and HF_HUB_OFFLINE"
        ) from None
    renamed = dict(zip(layout.hub, (layout.text, layout.pair), strict=False))
    columns = {str(renamed.get(name, name)): [str(value) for value in rows[name]] for name in rows.column_names}
    agreed = [row for row, label in enumerate(columns["label"]) if label != NO_LABEL]
    columns = {name: [values[row] for row in agreed] for name, values in columns.items()}
    if layout.classes in (ENTAILED, THREE_WAY):  # numbers on the Hub, names in the files
        columns["label"] = [layout.classes[int(value)] for value in columns["label"]]
    columns[layout.label] = columns.pop("label")
    return _named(columns, layout, layout.label, layout.hub_name), f"{layout.hub_name} {task} {split}"


def _named(columns: Columns, layout: Layout, label: str, source: str) -> Columns:
    named = {"text": columns[layout.text], "label": _labels(columns[label], layout, source)}
    if layout.pair:
        named["pair"] = columns[layout.pair]
    used = (layout.text, layout.pair, label, *CONSTANT_NAMES)
    return {**named, **{name: values for name, values in columns.items() if name not in used}}


def _labels(values: Iterable[str], layout: Layout, source: str) -> list[str]:
    if layout.classes:
        numbers = {name: str(number) for number, name in enumerate(layout.classes)}
        try:
            return [numbers[value] for value in values]
        except KeyError as error:
            raise BadInput(f"{source}: expected a label of {', '.join(layout.classes)}, found {error}") from None
    try:
        return [str(float(value)) for value in values]
    except ValueError as error:
        raise BadInput(f"{source}: expected a score, {error}") from None
