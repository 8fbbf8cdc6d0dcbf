"""What pyproject.toml asks for, and that what is private in Flower is not needed."""

import ast
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests import flower_versions
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"].values()
REQUIREMENTS = sorted({each for group in (PROJECT["dependencies"], *EXTRAS) for each in group})
PUBLIC = {"flwr", "flwr.app", "flwr.serverapp", "flwr.serverapp.strategy"}


@pytest.mark.parametrize("text", [each for each in REQUIREMENTS if not each.startswith("fedfrom")])
def test_a_requirement_is_bounded_on_both_sides_and_the_tests_run_within(text: str) -> None:
    requirement = Requirement(text)
    assert {each.operator for each in requirement.specifier} == {">=", "<"}, "the next major version is untested"
    pins = dict(re.findall(r"^([\w.-]+)==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    assert requirement.specifier.contains(pins[requirement.name])


def test_fedfrom_uses_public_names_of_flower_alone() -> None:
    """So that a new release of Flower can't take away what the strategies stand on."""
    found = set()
    for path in (ROOT / "fedfrom").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                found.add(node.module or "")
            elif isinstance(node, ast.Import):
                found.update(name.name for name in node.names)
    assert {name for name in found if name.split(".")[0] == "flwr"} == PUBLIC


def test_the_oldest_flower_is_the_lower_bound_and_the_newest_known_is_not_below_the_pinned() -> None:
    assert flower_versions.requirement().specifier.contains(flower_versions.oldest())
    assert Version(flower_versions.pinned()) <= Version(flower_versions.PASSED)


@pytest.mark.parametrize(
    ("name", "newest", "installs", "fails"),
    [
        ("newest", flower_versions.PASSED, True, True),
        ("newest", flower_versions.PASSED, False, False),  # told, with pip's reason
        ("newest", "1.9999", True, False),  # a release that nobody has tried: told
        ("1.9999", "", True, True),
        ("1.9999", "", False, True),
    ],
)
def test_which_failures_fail_the_command(
    name: str,
    newest: str,
    installs: bool,
    fails: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def environment(version: str) -> None:
        if not installs:
            raise RuntimeError("certifi>=2099 is nowhere")

    monkeypatch.setattr(flower_versions, "newest", lambda: newest)
    monkeypatch.setattr(flower_versions, "environment", environment)
    monkeypatch.setattr(flower_versions, "passes", lambda python, version: False)
    assert bool(flower_versions.main([name])) is fails
    said = capsys.readouterr().out
    assert ("failed in" in said) is installs and ("certifi>=2099" in said) is not installs
