"""The tests that use Flower, with other versions of it, each in an environment of its own.

    python -m tests.flower_versions [VERSION ...]

A VERSION is a number, or `oldest` (the lower bound in pyproject.toml), `pinned` (constraints.txt), or `newest` (what
the package index serves). Without any: oldest and newest, as `make test` runs with the pinned one.

An environment holds that Flower, and whatever it asks for in another version than the environment this is run in, which
lends all else (torch, Ray, transformers …): its folder of packages comes after the new one's own. pip sees both, so it
resolves fedfrom's requirements and Flower's as it would on an empty machine, in seconds.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
import time
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".venv" / "flower"
PASSED = "1.42.0"
"""The newest version that these tests passed with. Failures of a newer one are told, but fail the command only where it
was named by number: a release of Flower should not stop changes that have nothing to do with it."""

TESTS = ("strategy*", "replies", "spool", "client", "bf16", "checkpoint*", "flower_app")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]


def requirement() -> Requirement:
    """Return what pyproject.toml says of flwr."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (found,) = [each for each in map(Requirement, project["dependencies"]) if each.name == "flwr"]
    return found


def oldest() -> str:
    """Return the lower bound."""
    (bound,) = [each.version for each in requirement().specifier if each.operator == ">="]
    return bound


def pinned() -> str:
    """Return the version that all tests run with."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return next(re.finditer(r"^flwr==(.+)$", pins, re.MULTILINE))[1]


def newest() -> str:
    """Return the newest version that the package index serves within the bounds, whether it can be installed or not."""
    options = ["--quiet", "--dry-run", "--no-deps", "--ignore-installed", "--report", "-"]
    found = subprocess.run([*PIP, "install", *options, str(requirement())], check=True, capture_output=True, text=True)
    return str(json.loads(found.stdout)["install"][0]["metadata"]["version"])


def environment(version: str) -> Path:
    """Make the environment of a version, and return its Python.

    Raises
    ------
    RuntimeError
        pip can't install it: its own words, which name the requirement that stops it.
    """
    folder = ENVIRONMENTS / version
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [*PIP, "--python", str(python), "install", "--quiet"]
    flower = f"flwr[simulation]=={version}"
    for words in (["--no-deps", "--ignore-installed", flower], ["--editable", f"{ROOT}[simulation,test]", flower]):
        done = subprocess.run([*install, *words], capture_output=True, text=True, env=alone())
        if done.returncode:
            raise RuntimeError(f"flwr {version} can't be installed here:\n{done.stderr.strip()}")
    return python


def alone() -> dict[str, str]:
    """Return this process's environment without PYTHONPATH, which would come before what is installed."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def passes(python: Path, version: str) -> bool:
    """Run the tests with a version, and return whether they pass."""
    found = subprocess.run(
        [python, "-c", "import flwr; print(flwr.__version__, flwr.__file__)"],
        cwd=ROOT,
        env=alone(),
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split(maxsplit=1)
    if Version(found[0]) != Version(version) or not found[1].startswith(str(ENVIRONMENTS)):
        raise RuntimeError(f"expected flwr {version} of {ENVIRONMENTS}, found {' '.join(found)}")
    files = sorted(str(path) for name in TESTS for path in (ROOT / "tests").glob(f"test_{name}.py"))
    pytest = [python, "-m", "pytest", "--numprocesses", "auto", "-m", "not slow or flwr_run", "-p", "no:cacheprovider"]
    return subprocess.run([*pytest, *files], cwd=ROOT, env=alone()).returncode == 0


def main(names: list[str]) -> int:
    """Run the tests with each version, print a line for each, and return the number that count as failed."""
    failed, lines = 0, []
    for name in names or ["oldest", "newest"]:
        named = {"oldest": oldest, "pinned": pinned, "newest": newest}.get(name)
        version, start = named() if named else name, time.monotonic()
        print(f"== flwr {version} ({name})", flush=True)
        try:
            outcome = "passed" if passes(environment(version), version) else "failed"
        except RuntimeError as error:
            print(error)
            outcome = "not installed"
        excused = name == "newest" and (outcome == "not installed" or Version(version) > Version(PASSED))
        failed += outcome != "passed" and not excused
        lines.append(f"flwr {version} ({name}): {outcome} in {time.monotonic() - start:.0f} s")
    print("\n".join(lines))
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
