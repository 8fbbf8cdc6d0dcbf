"""A BERT of a few hundred weights and a GLUE of a few dozen rows: whole rounds in milliseconds."""

import io
import random
from pathlib import Path
from typing import Any

import pytest

from simulations import environment
from tests.tiny import write_bert

environment.prepare(online=False)


def blank(figure: Any, target: Any, **options: Any) -> None:
    """Write a picture of nothing, in place of matplotlib's `savefig`."""
    if isinstance(target, str | Path):
        Path(target).write_bytes(b"")
    else:
        target.write("<svg/>" if isinstance(target, io.TextIOBase) else b"")


@pytest.fixture(autouse=True)
def blank_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay out and rasterise pictures for none but the tests that look at them: three quarters of a tiny run's time."""
    if not request.node.get_closest_marker("pictures"):
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", blank)


WORDS = ("good", "great", "fine", "bad", "poor", "dull", "film", "plot", "the", "a", "is", "was")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a randomly initialised BERT with three layers of width 16, and a tokenizer of single words."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    write_bert(folder, WORDS, layers=3)
    return str(folder)


def sentence(positive: bool, generator: random.Random) -> str:
    """Return words of which three tell the label."""
    telling = generator.choices(WORDS[:3] if positive else WORDS[3:6], k=3)
    return " ".join(generator.sample([*generator.sample(WORDS[6:], 2), *telling], 5))


def write_tsv(path: Path, header: list[str] | None, rows: list[list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ([header] if header else []) + rows
    path.write_text("".join("\t".join(map(str, line)) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture(scope="session")
def tiny_glue(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder with every GLUE task in GLUE's layout, SNLI and SICK, 90 training and 30 held-out rows each."""
    folder = tmp_path_factory.mktemp("glue")
    generator = random.Random(0)
    for name, rows in {"train": 90, "dev": 30}.items():
        labels = [index % 3 for index in range(rows)]
        one = [sentence(label % 2 == 0, generator) for label in labels]
        two = [sentence(label % 2 == 1, generator) for label in labels]
        entailed = ["entailment" if label % 2 == 0 else "not_entailment" for label in labels]
        three_way = [("entailment", "neutral", "contradiction")[label] for label in labels]
        several = list(zip(range(rows), one, two, labels, entailed, three_way, strict=True))

        def write(task: str, file: str, header: list[str] | None, columns: list[list[Any]]) -> None:
            write_tsv(folder / task / file, header, columns)

        binary = [label % 2 for label in labels]
        write("CoLA", f"{name}.tsv", None, [["x", b, "*", s] for s, b in zip(one, binary, strict=True)])
        write("SST-2", f"{name}.tsv", ["sentence", "label"], [[s, b] for s, b in zip(one, binary, strict=True)])
        write(
            "MRPC",
            f"{name}.tsv",
            ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
            [[c % 2, i, i, a, b] for i, a, b, c, _, _ in several],
        )
        write(
            "QQP",
            f"{name}.tsv",
            ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
            [[i, i, i, a, b, c % 2] for i, a, b, c, _, _ in several],
        )
        write(
            "STS-B",
            f"{name}.tsv",
            ["index", "genre", "file", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score"],
            [[i, f"genre{i % 4}", "f", 2012, i, "s", "s", a, b, f"{5 * c / 2:.3f}"] for i, a, b, c, _, _ in several],
        )
        part = {"train": "train_subset.tsv", "dev": "dev_matched.tsv"}[name]
        write(
            "MNLI", part, ["index", "sentence1", "sentence2", "label"], [[i, a, b, t] for i, a, b, _, _, t in several]
        )
        part = {"train": "train_subset.tsv", "dev": "dev.tsv"}[name]
        write("QNLI", part, ["index", "question", "sentence", "label"], [[i, a, b, e] for i, a, b, _, e, _ in several])
        write(
            "RTE",
            f"{name}.tsv",
            ["index", "sentence1", "sentence2", "label"],
            [[i, a, b, e] for i, a, b, _, e, _ in several],
        )
        nli = [[a, b, t] for _, a, b, _, _, t in several]
        write("SNLI", f"{name}.tsv", ["sentence1", "sentence2", "label"], nli)
        write("SICK", {"train": "train.tsv", "dev": "test.tsv"}[name], ["sentence1", "sentence2", "label"], nli)
        # WNLI's 1 is entailment.
        write(
            "WNLI",
            f"{name}.tsv",
            ["index", "sentence1", "sentence2", "label"],
            [[i, a, b, int(e == "entailment")] for i, a, b, _, e, _ in several],
        )
    return str(folder)


@pytest.fixture
def tiny(tiny_model: str, tiny_glue: str, tmp_path: Path) -> dict[str, Any]:
    """Options that make every run a matter of milliseconds."""
    return {
        "model": tiny_model,
        "glue_dir": tiny_glue,
        "task": "sst2",
        "clients": 3,
        "rounds": 2,
        "steps": 3,
        "batch_size": 8,
        "lora_r": 4,
        "lr": 0.02,
        "pooling": "mean",
        "partition": "iid",
        "out": str(tmp_path / "results"),
    }
