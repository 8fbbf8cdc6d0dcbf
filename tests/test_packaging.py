"""The package: what the wheel and the sdist hold, and that the wheel installs and runs where the repository is not."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from fedfrom import __version__
from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LEFT_BEHIND = shutil.ignore_patterns(".*", "results", "dist", "build", "*.egg-info", "__pycache__")


def run(command: Sequence[object], **options: object) -> str:
    """Without PYTHONPATH: what the user's names there would come before what is installed."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=800, env=own, **options
    )  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheel and sdist, built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("built")
    sources = shutil.copytree(ROOT, folder / "sources", ignore=LEFT_BEHIND)
    shutil.copy(ROOT / ".gitignore", sources)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "-q", "-w", folder]
    run([*pip, sources])
    backend = "import sys, hatchling.build as b; b.build_sdist(sys.argv[1])"
    hatchling = folder / "hatchling"
    run([sys.executable, "-m", "pip", "install", "-q", "--target", hatchling, "hatchling>=1.27,<2"])
    run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(hatchling)!r}); {backend}", folder], cwd=sources)
    return folder


def test_the_wheel_holds_the_package_alone(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.split("/")[0] for name in names}
    assert packages == {"fedfrom", f"fedfrom-{__version__}.dist-info"}
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fedfrom").rglob("*.py")} | {"fedfrom/py.typed"}
    assert there <= set(names)


def test_the_sdist_holds_what_a_reader_needs(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "fedfrom/py.typed", "tests/conftest.py"} <= names
    assert not any(name.startswith((".venv", "results/simulation")) for name in names)


def test_the_wheel_runs_in_an_environment_of_its_own(built: Path, tmp_path: Path) -> None:
    """Its dependencies are this environment's, lent: installing them anew takes minutes."""
    (wheel,) = built.glob("*.whl")
    run([sys.executable, "-m", "venv", tmp_path / "venv"])
    python = tmp_path / "venv" / "bin" / "python"
    run([python, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", "--no-index", wheel])
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert run([tmp_path / "venv" / "bin" / "fedfrom", "--version"], cwd=tmp_path).split()[-1] == __version__
    where = run([python, "-c", "import fedfrom; print(fedfrom.__file__)"], cwd=tmp_path)
    assert where.startswith(str(site))
