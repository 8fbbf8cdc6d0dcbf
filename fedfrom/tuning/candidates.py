"""The methods that are tried, and what each merges the inputs into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedfrom.errors import BadInput
from fedfrom.merging import oversize
from fedfrom.merging.merge import LayerByLayer
from fedfrom.merging.methods.base import Method
from fedfrom.merging.methods.registry import make_method, method_options
from fedfrom.merging.report import LayerReport
from fedfrom.tuning.network import Body

AVERAGE = "average"
SCALES = 9
_METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    (AVERAGE, {}),
    ("from", {"k": 1.0}),
    ("from", {"k": -1.0}),
    ("ties", {}),
    ("tsv", {}),
    ("iso-cts", {}),
    ("core-ties", {}),
)


@dataclass(frozen=True)
class Candidate:
    """A method by name, with the options that differ from its defaults.

    Attributes
    ----------
    name : str
        See `fedfrom.methods`.
    method : Method
        The method.
    options : dict[str, Any]
        What the user would give to get it.
    """

    name: str
    method: Method
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{name}={_plain(value)}" for name, value in self.options.items())])


def candidates(common: Mapping[str, Any], asked: Candidate | None) -> list[Candidate]:
    """Return what is tried: the average first, then the one that was asked for, or the list.

    Parameters
    ----------
    common : Mapping[str, Any]
        Options for all methods that have them: rank, solver, examples_power.
    asked : Candidate | None
        The method that the user gave.

    Raises
    ------
    BadInput
        No scale multiplies what the method that was asked for merges.
    """
    if asked is not None and asked.method.on_factors:
        raise BadInput(f"--tune: expected a method that merges products, found {asked.name}: no scale multiplies it")
    wanted = _METHODS if asked is None else _METHODS[:1]
    found = [
        Candidate(name, make_method(name, **own, **{k: v for k, v in common.items() if k in method_options(name)}), own)
        for name, own in wanted
    ]
    if asked is None:
        return found
    return [asked] if asked.name in (AVERAGE, "soup") else [*found, asked]


def body_of(layers: LayerByLayer, head: Mapping[str, str]) -> Body:
    """Return what a merge makes of the inputs, the head apart, whose tensors are given as name -> key."""
    state: dict[str, Tensor] = {}
    references: dict[str, Tensor] = {}
    reports: list[LayerReport] = []
    for ((part, report),) in layers:
        reports.append(report)
        state.update(part)
        W = layers.inputs.reference_of(report.name)
        if report.kind == "tensor" and W is not None:
            references.update({key: W.tensor(report.name) for key in part})
    with _unlogged():
        config = layers.report(reports).config
    merged = {name: state.pop(key) for name, key in head.items()}
    moved = {name: references.pop(key) for name, key in head.items() if key in references}
    return Body(state, config or {}, references, merged, moved)


@contextmanager
def _unlogged() -> Iterator[None]:
    """Leave out the warning of merges that are too long: their scale is yet to be chosen."""
    disabled, oversize.log.disabled = oversize.log.disabled, True
    try:
        yield
    finally:
        oversize.log.disabled = disabled


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
