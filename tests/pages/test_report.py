"""What a page says is what results.json says, whoever wrote it."""

import base64
import contextlib
import io
import json
import random
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from fedfrom.errors import BadInput
from fedfrom.pages import write_report
from tests.conftest import ROOT
from tests.pages.conftest import Edited, Page, addresses, page_of, results_of

NAMES = {"from": "FedFroM", "average": "FedMerge average"}


@pytest.fixture(scope="session")
def page(real_runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of one run."""
    return page_of(real_runs[0], out=tmp_path_factory.mktemp("page"))


def test_the_pictures_numbers_are_those_of_the_results(page: Page, real_runs: list[Path]) -> None:
    found = results_of(real_runs[0])
    assert page.data["runs"][0]["seed"] == 0
    for i, (label, name) in enumerate(NAMES.items(), 1):
        history = found["strategies"][label]
        rounds, merges = history["rounds"], [history["reports"][at]["merge"] for at in ("1", "2")]
        line = page.line("score", name)
        assert line["x"] == [0, 1, 2] and line["y"] == [entry["scores"]["score"] for entry in rounds]
        for way in ("up", "down"):
            assert page.line(f"bytes-{way}", name)["y"] == [entry[f"bytes-{way}"] for entry in rounds[1:]]
        assert page.line("interference", name)["y"] == [merge["interference"] for merge in merges]
        cosines = [fmean(merge["cosines"][a][b] for a, b in ((1, 0), (2, 0), (2, 1))) for merge in merges]
        assert page.line("cosine", name)["y"] == pytest.approx(cosines)
        dropped = [fmean(la["energy_dropped"] for la in merge["layers"] if la["kind"] == "adapter") for merge in merges]
        assert page.line("energy-dropped", name)["y"] == pytest.approx(dropped)
        weights = page.data["charts"][f"weights-{i}"]
        assert weights["values"] == [[entry["weights"][client] for entry in rounds[1:]] for client in "012"]
        matrix = page.data["charts"][f"cosines-{i}"]
        at = [history["reports"]["2"]["clients"].index(int(client)) for client in matrix["rows"]]
        assert matrix["rows"] == ["0", "1", "2"]
        assert matrix["values"] == [[merges[1]["cosines"][a][b] for b in at] for a in at]
        parts = {part["label"]: part["values"][i - 1] for part in page.data["charts"]["seconds"]["parts"]}
        assert parts["training"] == history["training-seconds"]
        assert parts["evaluation"] == history["evaluation-seconds"]
        assert parts["merging"] == history["server-seconds"]
        assert sum(parts.values()) == pytest.approx(history["wall-seconds"])


def test_spectra_are_the_singular_values_of_the_final_adapter(page: Page, real_runs: list[Path]) -> None:
    folder = real_runs[0] / "from"
    config = json.loads((folder / "adapter_config.json").read_text())
    state = load_file(folder / "adapter_model.safetensors")
    scaling = config["lora_alpha"] / config["r"]
    spectra = page.strategy("from")["spectra"]
    modules = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    assert sorted(spectra) == sorted(modules) and scaling != 1
    for module in modules:
        product = scaling * state[f"{module}.lora_B.weight"].double() @ state[f"{module}.lora_A.weight"].double()
        expected = torch.linalg.svdvals(product)[: config["r"]].tolist()
        assert spectra[module] == pytest.approx(expected, rel=1e-5, abs=1e-9)  # six digits are kept
    drawn = page.data["charts"]["spectrum-1"]["series"]
    assert [line["y"] for line in drawn] == list(spectra.values())


def test_seeds_of_the_same_settings_have_one_line_with_students_interval(real_runs: list[Path], tmp_path: Path) -> None:
    page = page_of(*real_runs, out=tmp_path)
    each = [
        [entry["scores"]["score"] for entry in results_of(run)["strategies"]["from"]["rounds"]] for run in real_runs
    ]
    line = page.line("score", "FedFroM")
    assert len(page.data["charts"]["score"]["series"]) == 2
    for at, values in enumerate(zip(*each, strict=True)):
        assert line["y"][at] == pytest.approx(fmean(values))
        assert line["half-width"][at] == pytest.approx(stats.t.ppf(0.975, 2) * stats.sem(values))
    # the seed is the one thing in which they differ
    assert list(page.data["settings-that-differ"]) == ["seed"]
    assert "seeds 0, 1, 2" in page.summary


def test_a_seed_that_comes_again_narrows_no_interval(
    real_runs: list[Path], edited: Edited, tmp_path: Path, undrawn: None
) -> None:
    # how many processes ran, and where the results went, changes no score
    second = edited(lambda found: found["options"].update(processes=7, out="elsewhere"), "second", run=1)
    page = page_of(real_runs[0], second, edited(name="again"), out=tmp_path)
    assert [group["runs"] for group in page.data["groups"]] == [["seed-0", "second"], ["again"]]


def test_other_settings_are_other_lines(real_runs: list[Path], edited: Edited, tmp_path: Path, undrawn: None) -> None:
    other = edited(lambda found: found["options"].update(lr=0.5, processes=7))
    page = page_of(real_runs[0], other, out=tmp_path)
    assert page.data["settings-that-differ"] == {"lr": ["0.02", "0.5"]}  # how many processes ran changes no score
    labels = [line["label"] for line in page.data["charts"]["score"]["series"]]
    assert labels == [f"{name}: lr {lr}" for lr in (0.02, 0.5) for name in NAMES.values()]


@pytest.mark.parametrize(("gain", "verdict"), [(0.2, "20.0 ± 0.0 points ahead of"), (-0.2, "points behind")])
def test_a_difference_is_called_one_where_the_paired_interval_excludes_0(
    edited: Edited, tmp_path: Path, undrawn: None, gain: float, verdict: str
) -> None:
    def apart(found: Any) -> None:
        final = found["strategies"]["average"]["final"] = found["strategies"]["from"]["final"]
        found["strategies"] = {"fedavg": found["strategies"]["average"], "from": found["strategies"]["from"]}
        found["strategies"]["from"]["final"] = final + gain

    runs = [edited(apart, f"run-{run}", run) for run in range(3)]
    assert verdict in page_of(*runs, out=tmp_path).summary
    one = page_of(runs[0], out=tmp_path).summary
    assert verdict not in one and "one seed can't tell which is better" in one


def test_the_page_is_readable_alone(page: Page) -> None:
    assert all(address.startswith(("data:", "#")) for address in addresses(page))
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert "default-src 'none'" in policy
    assert [script.get("type") for script in page.all("script")] == ["application/json"]
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("img")) == len(page.data["charts"]) > 9
    assert all(len(image["alt"]) > 40 for image in page.all("img"))
    assert len(page.all("caption")) == len(page.all("table")) > len(page.all("img"))
    # the tables say what the pictures show
    final = page.strategy("from")["final"]
    assert f"{100 * final:.1f} %" in page.text and page.summary in page.text


def test_the_pictures_are_there_as_files(real_runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "x-figures").mkdir()
    (tmp_path / "x-figures" / "old.png").write_bytes(b"of an earlier page")
    (tmp_path / "x-figures" / "photo.png").write_bytes(b"of somebody's own")
    (tmp_path / "x.html").write_text('<script type="application/json">{"name":"old"}</script>')
    page = page_of(real_runs[0], out=tmp_path / "x.html")
    assert (tmp_path / "x-figures" / "photo.png").read_bytes() == b"of somebody's own"
    (tmp_path / "x-figures" / "photo.png").unlink()
    files = list((tmp_path / "x-figures").iterdir())
    assert {file.name for file in files} == {f"{name}.png" for name in page.data["charts"]}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-figures", "x.html"]
    again = page_of(real_runs[0], out=tmp_path / "x.html")
    assert again.source == page.source


def test_lost_replies_are_listed_with_their_reasons(edited: Edited, tmp_path: Path, undrawn: None) -> None:
    def lose(found: Any) -> None:
        first, second = (found["strategies"]["from"]["reports"][at] for at in "12")
        gone = second["nodes"].pop()
        who.append(second["clients"].pop())
        second["rejected"] = {str(gone): "'q.lora_A': expected 1 found NaN"}
        first["failed"], first["missing"] = {"77": "out of memory"}, [78]
        found["strategies"]["average"]["reports"]["1"]["merge"] = None

    who: list[int] = []
    page = page_of(edited(lose), out=tmp_path)
    for text in (f"client {who[0]} 'q.lora_A': expected 1 found NaN", "node 77 out of memory", "missing node 78"):
        assert text in page.text
    assert "round skipped" in page.text
    assert "3 of 11 reported replies were lost and 1 round skipped" in page.summary


def test_a_page_without_losses_says_so(page: Page) -> None:
    assert "12 replies were merged; none was rejected, failed or missing." in page.text


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=https://example.org/x onerror=alert(1)>',
    "</script><script>alert(2)</script><!--",
    "$\\frac{1}{$ _^",
    "_under",
    "\ud800 \x00\x1b[31m \u202e turned",
    "..",
    "x" * 5000,
    "&lt;b&gt; &amp; %s {0}",
]


def test_what_files_say_is_text_and_nothing_else(edited: Edited, tmp_path: Path) -> None:
    def attack(found: Any) -> None:
        history = found["strategies"]["from"]
        first = HOSTILE[0]
        report = history["reports"]["2"]
        report["rejected"], report["failed"] = {first: first}, {HOSTILE[1]: HOSTILE[2]}
        report["clients"] = HOSTILE[1:4]
        report["merge"]["layers"][0].update(name=first, kind=HOSTILE[2])
        for entry in history["rounds"][1:]:
            entry["weights"] = dict(zip(HOSTILE, [0.1] * len(HOSTILE), strict=True))
        found["strategies"] = dict.fromkeys(HOSTILE, history)
        found["metric"] = found["tasks"][0]["name"] = first
        found["options"] |= {first: HOSTILE[1], "lr": HOSTILE[2]}
        found["versions"] = {HOSTILE[2]: HOSTILE[1]}
        found["partition"][0]["client"] = first

    folder = edited(attack, "<script>alert(3)<")
    page = page_of(folder, out=tmp_path / "report.html")
    assert [script["id"] for script in page.all("script")] == ["data"]
    assert all(address.startswith(("data:", "#")) for address in addresses(page))
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.text  # as text it is there
    assert "\x1b" not in page.source and "\u202e" not in page.source and "x" * 500 not in page.source
    assert page.data["runs"][0]["metric"] == "<script>alert(1)</script>"
    pictures = [image["src"] for image in page.all("img")] + [source["srcset"] for source in page.all("source")]
    assert len(pictures) > 20
    for picture in pictures:
        root = ET.fromstring(base64.b64decode(picture.removeprefix("data:image/svg+xml;base64,")))
        assert not [element.tag for element in root.iter() if element.tag.endswith(("script", "foreignObject"))]


NEW = ("training-seconds", "evaluation-seconds", "wall-seconds", "overhead")


def test_results_of_an_older_version_give_a_page_that_says_what_is_missing(edited: Edited, tmp_path: Path) -> None:
    def age(found: Any) -> None:
        for history in found["strategies"].values():
            for name in NEW:
                del history[name]
            for report in history["reports"].values():
                for name in ("reasons", "examples_capped", "valid"):
                    del report[name]
                for name in ("interference", "cosines", "validation"):
                    del report["merge"][name]

    folder = edited(age)
    shutil.rmtree(folder / "from")
    page = page_of(folder, out=tmp_path)
    assert "score" in page.data["charts"] and "weights-1" in page.data["charts"]
    assert not {"seconds", "interference", "cosine", "spectrum-1"} & set(page.data["charts"])
    assert "interference of the whole updates was not recorded" in page.text
    assert "the seconds of FedFroM, FedMerge average went into was not recorded" in page.text
    assert "No spectrum of FedFroM: The final adapter is not beside the results" in page.text
    assert "spectrum-2" in page.data["charts"]


def test_any_part_may_be_missing_or_something_else(
    real_runs: list[Path], edited: Edited, tmp_path: Path, undrawn: None
) -> None:
    folder = edited()
    original = results_of(folder)
    generator = random.Random(0)
    junk = [None, True, -1, 1e400, 10**400, "nan", "x", [], {}, [[]], {"1": 1}]
    for _ in range(120):
        found = json.loads(json.dumps(original))
        for _ in range(generator.randint(1, 3)):
            at, key = found, "strategies"
            for _ in range(generator.randint(1, 9)):
                keys = list(at) if isinstance(at, dict) else list(range(len(at)))
                if not keys:
                    break
                key = generator.choice(keys)
                if not isinstance(at[key], dict | list) or generator.random() < 0.15:
                    break
                last, at = (at, key), at[key]
            else:
                at, key = last
            if generator.random() < 0.5 and isinstance(at, dict):
                at.pop(key, None)
            elif key in at if isinstance(at, dict) else isinstance(key, int) and key < len(at):
                at[key] = generator.choice(junk)
        (folder / "results.json").write_text(json.dumps(found), encoding="utf-8")
        try:
            page = page_of(folder, real_runs[1], out=tmp_path / "report.html")
        except BadInput as error:
            assert str(error).startswith(str(folder))
        else:
            assert page.summary and "nan" not in page.summary


@pytest.mark.parametrize("damage", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_that_cant_be_read_is_said_to_be_so(
    edited: Edited, tmp_path: Path, undrawn: None, damage: str
) -> None:
    folder = edited()
    (folder / "from" / damage).write_bytes(b"{")
    page = page_of(folder, out=tmp_path)
    assert "No spectrum of FedFroM: The final adapter can't be read" in page.text


def invoke(*arguments: object) -> Any:
    from fedfrom import cli

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = cli.run(["report", *map(str, arguments)])
    return SimpleNamespace(exit_code=code, stdout=out.getvalue(), stderr=err.getvalue())


def test_the_command_writes_beside_the_run_and_says_where(edited: Edited, undrawn: None) -> None:
    folder = edited()
    done = invoke(folder / "results.json")
    assert done.exit_code == 0 and done.stdout == f"Report in {folder / 'report.html'}\n"
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere"], "nowhere: expected results.json, found none"),
        (["RUN", "RUN"], "found it twice"),
        (["RUN", "--out", "x.json"], "x.json: expected a page that ends in .html"),
        (["RUN", "--out", "/dev/null/x.html"], "/dev/null/x.html: can't be written"),
        (["BROKEN"], "expected JSON"),
        (["EMPTY"], "expected the results of a simulation"),
        (["NEWER"], "expected format 1, found 2"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    edited: Edited, tmp_path: Path, undrawn: None, arguments: list[str], named: str
) -> None:
    folders = {"RUN": edited(name="RUN"), "NEWER": edited(lambda found: found.update(format=2), "NEWER")}
    for name, content in {"BROKEN": "{", "EMPTY": '{"format": 1, "strategies": {}}'}.items():
        folders[name] = tmp_path / name
        folders[name].mkdir()
        (folders[name] / "results.json").write_text(content)
    done = invoke(*[folders.get(argument, argument) for argument in arguments])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and named in done.stderr


@pytest.mark.parametrize("missing", ["matplotlib", "scipy.stats", "jinja2"])
def test_without_a_library_the_remedy_is_named(
    real_runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    import fedfrom.pages

    monkeypatch.delitem(sys.modules, "fedfrom.pages.figures", raising=False)
    monkeypatch.delattr(fedfrom.pages, "figures", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(BadInput, match=rf"{missing}.*pip install 'fedfrom\[cli\]'"):
        write_report([real_runs[0]], tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_page_needs_the_simulations_and_its_command_loads_nothing_heavy(
    real_runs: list[Path], tmp_path: Path
) -> None:
    code = (
        "import sys; from pathlib import Path; import fedfrom.commands.report, fedfrom.pages\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'flwr', 'scipy', 'jinja2'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        f"fedfrom.pages.write_report([Path({str(real_runs[0])!r})], Path({str(tmp_path)!r}))\n"
        "assert not {'simulations', 'flwr', 'peft'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
