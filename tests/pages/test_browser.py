"""The page in a real browser, headless and without a network: it renders, and asks for nothing."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.pages.conftest import Edited, Page, page_of, results_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: see CONTRIBUTING.md"),
]
SAID_BY_PAGES = re.compile(r"CONSOLE|Refused to|Content Security Policy|net::|ERR_")


class Browser:
    """Chromium with a profile of its own and every host unknown: what it complains of, what pages ask for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, page: Path, *arguments: str) -> str:
        """Open a page and return what chromium wrote on stdout, after no complaint and no request."""
        log = self.folder / "net.json"
        done = subprocess.run(
            [
                str(CHROMIUM),
                *(
                    "--headless",
                    "--no-sandbox",
                    "--disable-gpu",
                    "--hide-scrollbars",
                    "--disable-background-networking",
                ),
                *("--disable-component-update", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND"),
                *(f"--user-data-dir={self.folder / 'profile'}", "--enable-logging=stderr", "--v=0"),
                *(f"--log-net-log={log}", "--virtual-time-budget=3000", *arguments, page.as_uri()),
            ],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        complaints = [line for line in done.stderr.splitlines() if SAID_BY_PAGES.search(line)]
        assert not complaints, complaints
        events = json.loads(log.read_text(encoding="utf-8"))["events"]
        asked = [event["params"] for event in events if "initiator" in event.get("params", {})]
        # chromium asks for updates of its own, on behalf of no page
        self.requested = [about["url"] for about in asked if about["initiator"] != "not an origin"]
        return done.stdout

    def picture(self, page: Path, width: int, *arguments: str) -> np.ndarray:
        """Return the upper 1600 pixels of a page as wide as a window, as (height, width, 3) in [0, 1]."""
        import matplotlib.image

        shot = self.folder / "shot.png"
        self.run(page, f"--window-size={width},1600", f"--screenshot={shot}", *arguments)
        return matplotlib.image.imread(shot)[..., :3]


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    return Browser(tmp_path)


def test_the_page_renders_without_complaint_or_request(browser: Browser, real_runs: list[Path], tmp_path: Path) -> None:
    written = page_of(*real_runs, out=tmp_path / "report.html")
    dumped = tmp_path / "dom.html"
    dumped.write_text(browser.run(written.path, "--dump-dom"), encoding="utf-8")
    assert not browser.requested
    seen = Page(dumped)
    assert seen.text == written.text and seen.data == written.data
    # what the browser was given to draw is what the results say
    each = [results_of(run)["strategies"]["from"]["rounds"] for run in real_runs]
    means = [np.mean([entry["scores"]["score"] for entry in rounds]) for rounds in zip(*each, strict=True)]
    assert seen.line("score", "FedFroM")["y"] == pytest.approx(means)
    bytes_up = [entry["bytes-up"] for entry in each[0][1:]]
    assert seen.line("bytes-up", "FedFroM")["y"] == bytes_up


def test_hostile_labels_run_nothing(browser: Browser, edited: Edited, tmp_path: Path) -> None:
    def attack(found: dict) -> None:
        label = (
            "<img src=https://example.org/x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
        )
        found["strategies"] = {label: found["strategies"]["from"]}
        found["metric"] = "</script><script>document.title='owned'</script>"

    written = page_of(edited(attack), out=tmp_path / "report.html")
    assert "document.title='owned'</script>" in json.dumps(written.data)
    seen = browser.run(written.path, "--dump-dom")
    assert "<title>Simulation report: edited</title>" in seen
    assert not browser.requested


def test_a_request_would_be_noticed(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "asks.html"
    page.write_text('<!DOCTYPE html><img src="http://example.org/x.png">')
    browser.run(page, "--dump-dom")
    assert browser.requested == ["http://example.org/x.png"]
    page.write_text('<!DOCTYPE html><script>console.error("no")</script>')
    with pytest.raises(AssertionError, match="no"):
        browser.run(page, "--dump-dom")


@pytest.mark.parametrize("width", [1280, 390])
def test_pictures_are_drawn_in_light_and_dark_at_any_width(
    browser: Browser, real_runs: list[Path], tmp_path: Path, width: int
) -> None:
    written = page_of(real_runs[0], out=tmp_path / "report.html")
    light = browser.picture(written.path, width)
    dark = browser.picture(written.path, width, "--blink-settings=preferredColorScheme=0")
    assert light.shape == dark.shape and light.shape[1] == width
    assert np.median(light) > 0.9 and np.median(dark) < 0.2
    # the first line's colour: #0072B2 on light, #4AA8E8 on dark; where a telephone shrinks it few pixels are pure
    for shot, colour in ((light, (0, 0x72, 0xB2)), (dark, (0x4A, 0xA8, 0xE8))):
        assert (np.abs(shot - np.array(colour) / 255).max(axis=-1) < 0.08).sum() > 20
