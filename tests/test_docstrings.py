"""The public names: each says what it is, documents the parameters that it has and no others, and its examples run."""

import doctest
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest

import fedfrom
import fedfrom.client
import fedfrom.merging
from fedfrom.merging.methods.registry import method_options
from fedfrom.strategy import FedMerge

PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (fedfrom, fedfrom.client, fedfrom.merging)
    for name in module.__all__
}
SECTION = r"^{}\n-+\n(.*?)(?=^\w[\w ]*\n-+\n|\Z)"
CALLED = {name: thing for name, thing in PUBLIC.items() if not inspect.ismodule(thing)}


def documented(text: str, heading: str) -> set[str]:
    """The names that a section of a docstring in NumPy's form is of: "k : float", or "rank, solver" for several."""
    found = re.search(SECTION.format(heading), text, re.MULTILINE | re.DOTALL)
    lines = [line for line in found[1].splitlines() if line and not line.startswith(" ")] if found else []
    return {name.strip().lstrip("*") for line in lines for name in line.partition(" : ")[0].split(",")}


def methods_of(kind: type) -> Iterator[tuple[str, Any]]:
    """What a class defines itself under a public name: methods and properties."""
    for name, member in vars(kind).items():
        called = getattr(member, "__func__", member)  # of a class method
        if not name.startswith("_") and (inspect.isfunction(called) or isinstance(called, property)):
            yield name, called


def check(name: str, thing: Any, fewest: int) -> None:
    """Compare the parameters that a callable has with those that it documents; a few need no section."""
    text = inspect.getdoc(thing) or ""
    parameters = inspect.signature(thing).parameters.values()
    own = {p.name for p in parameters if p.name not in ("self", "cls") and p.kind is not p.VAR_KEYWORD}
    found = documented(text, "Parameters")
    if found or len(own) >= fewest:
        assert own <= found | documented(text, "Attributes"), f"{name}: undocumented"
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        assert found <= own, f"{name}: documented, and not there"


@pytest.mark.parametrize("name", CALLED)
def test_a_public_name_documents_its_parameters_and_no_others(name: str) -> None:
    thing = CALLED[name]
    first, *rest = (inspect.getdoc(thing) or "").splitlines()
    assert first.endswith(".") and (not rest or rest[0] == ""), f"{name}: expected one sentence, then an empty line"
    check(name, thing, fewest=1 if inspect.isclass(thing) else 2)


@pytest.mark.parametrize("name", [name for name, thing in CALLED.items() if inspect.isclass(thing)])
def test_a_public_classs_methods_say_what_they_do(name: str) -> None:
    kind = CALLED[name]
    for method, called in methods_of(kind):
        assert inspect.getdoc(called.fget if isinstance(called, property) else called), f"{name}.{method}"
        above = any(hasattr(base, method) for base in kind.__mro__[1:])  # which says what its parameters are
        if not above and not isinstance(called, property):
            check(f"{name}.{method}", called, fewest=2)


def test_what_fedfrom_passes_on_is_documented_where_it_goes() -> None:
    """FedFroM takes FedMerge's settings as keywords: those it documents are there."""
    passed_on = documented(inspect.getdoc(fedfrom.FedFroM) or "", "Parameters") - set(
        inspect.signature(fedfrom.FedFroM).parameters
    )
    known = set(inspect.signature(FedMerge).parameters) | method_options("from")
    assert passed_on - {"fedavg"} <= known


def test_the_examples_in_docstrings_run() -> None:
    """As they stand: they import what they use."""
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    for name, thing in CALLED.items():
        for test in finder.find(thing, name, globs={}):
            assert runner.run(test).failed == 0, test.name
    assert runner.tries >= 10, "there are examples"
