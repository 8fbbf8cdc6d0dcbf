"""Results folders as real runs leave them, and pages taken apart."""

import io
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedfrom.pages import write_report
from tests.inprocess import InProcessGrid
from tests.simulations.conftest import blank, tiny_glue, tiny_model  # noqa: F401

SEEDS = (0, 1, 2)


@pytest.fixture(scope="session")
def real_runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> list[Path]:
    """The folders of three simulations that differ in their seed alone, of clients of unequal ranks."""
    from simulations import client_app, results, server_app
    from simulations.experiment import Experiment
    from simulations.narration import Narrator
    from simulations.options import Options

    values = {
        "model": request.getfixturevalue("tiny_model"),
        "glue_dir": request.getfixturevalue("tiny_glue"),
        "task": "sst2",
        "clients": 3,
        "rounds": 2,
        "steps": 2,
        "batch_size": 8,
        "lr": 0.02,
        "pooling": "mean",
        "partition": "dirichlet",
        "ranks": "2,4,4",
        "strategies": "from,average",
    }
    folder = tmp_path_factory.mktemp("runs")
    for seed in SEEDS:
        client_app._workers.clear()
        options = Options.from_mapping({**values, "seed": seed, "out": str(folder / f"seed-{seed}")})
        narrator = Narrator(Console(file=io.StringIO()))
        with pytest.MonkeyPatch.context() as patch, results.Folder(options.out) as out:
            patch.setattr("matplotlib.figure.Figure.savefig", blank)  # tests write the pages that they look at
            experiment = Experiment.prepare(options)
            histories = list(server_app.compare(InProcessGrid(client_app.app, 3, seed=seed), experiment, narrator))
            out.publish(experiment, histories)
    return [folder / f"seed-{seed}" for seed in SEEDS]


Edited = Callable[..., Path]


@pytest.fixture
def edited(real_runs: list[Path], tmp_path: Path) -> Edited:
    """Return a function that copies a real run's folder, and hands its results to another to be changed in place."""

    def edit(change: Callable[[Any], Any] = lambda found: None, name: str = "edited", run: int = 0) -> Path:
        folder = tmp_path / name
        shutil.copytree(real_runs[run], folder)
        found = results_of(folder)
        change(found)
        (folder / "results.json").write_text(json.dumps(found), encoding="utf-8")
        return folder

    return edit


def results_of(folder: Path) -> Any:
    """Return what a folder's results.json holds."""
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing: for tests of what is written, a hundred times faster."""
    from fedfrom.pages import figures

    monkeypatch.setattr(figures, "draw", lambda chart: (b"", "<svg/>", "<svg/>"))


class Page(HTMLParser):
    """A page taken apart: its elements with their attributes, its visible text, its data block."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self._block = ""
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())
        self.data = json.loads(self._block)
        self.summary = self.data["summary"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            self._block += data
        elif "style" not in self._open:
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        """Return the attributes of every element of that name."""
        return [attributes for name, attributes in self.elements if name == tag]

    def strategy(self, label: str, run: int = 0) -> Any:
        """Return what the data block has of a strategy."""
        return next(entry for entry in self.data["runs"][run]["strategies"] if entry["label"] == label)

    def line(self, chart: str, label: str) -> Any:
        """Return a line of a chart."""
        return next(line for line in self.data["charts"][chart]["series"] if line["label"] == label)


def page_of(*runs: Path, out: Path) -> Page:
    """Write a page and take it apart."""
    return Page(write_report(runs, out))


def addresses(page: Page) -> list[str]:
    """Return everything that a page's attributes and styles could make a browser load or open."""
    names = ("src", "srcset", "href", "action", "data", "poster")
    named = [attributes[name] for _, attributes in page.elements for name in names if name in attributes]
    return [*named, *re.findall(r"url\([^)]*\)|@import [^;]*", page.source)]
