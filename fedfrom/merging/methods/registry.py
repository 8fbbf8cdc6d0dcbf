"""The merging methods by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from fedfrom.closest import did_you_mean
from fedfrom.merging.methods.actmat import ACTMat
from fedfrom.merging.methods.average import Average, FactorAverage
from fedfrom.merging.methods.base import Method
from fedfrom.merging.methods.core_space import CoreDareTies, CoreTies
from fedfrom.merging.methods.ctm import CtM
from fedfrom.merging.methods.dare import Dare, DareFroM, DareTies
from fedfrom.merging.methods.fisher import Fisher
from fedfrom.merging.methods.frobenius import FroM
from fedfrom.merging.methods.iso import Iso, IsoCTS
from fedfrom.merging.methods.knots import KnotsDareTies, KnotsTA, KnotsTies
from fedfrom.merging.methods.lorm import LoRM
from fedfrom.merging.methods.regmean import RegMean
from fedfrom.merging.methods.soups import GreedySoup
from fedfrom.merging.methods.svc import SVC
from fedfrom.merging.methods.task_arithmetic import TaskArithmetic
from fedfrom.merging.methods.ties import Ties
from fedfrom.merging.methods.tsv import TSV

_METHODS: dict[str, type[Method]] = {
    "from": FroM,
    "average": Average,
    "factor-average": FactorAverage,
    "task-arithmetic": TaskArithmetic,
    "ties": Ties,
    "dare": Dare,
    "dare-ties": DareTies,
    "dare-from": DareFroM,
    "regmean": RegMean,
    "fisher": Fisher,
    "knots-ta": KnotsTA,
    "knots-ties": KnotsTies,
    "knots-dare-ties": KnotsDareTies,
    "tsv": TSV,
    "iso": Iso,
    "iso-cts": IsoCTS,
    "core-ties": CoreTies,
    "core-dare-ties": CoreDareTies,
    "lorm": LoRM,
    "soup": Average,
    "greedy-soup": GreedySoup,
    "svc": SVC,
    "actmat": ACTMat,
    "ctm": CtM,
}


def methods() -> list[str]:
    """Return the names of the merging methods, as `merge(states, method=name)` and `FedMerge(name)` take them.

    Examples
    --------
    >>> from fedfrom import methods
    >>> methods()[:3]
    ['from', 'average', 'factor-average']
    """
    return list(_METHODS)


def method_class(name: str) -> type[Method]:
    """Return the class of the method of this name."""
    return _METHODS[name]


def method_options(name: str) -> set[str]:
    """Return the options that the method of this name takes."""
    return {field.name for field in fields(_METHODS[name]) if field.init}


def needed_statistics(name: str) -> str | None:
    """Return what clients have to send for the method of this name: "gram", "fisher" or nothing."""
    return _METHODS[name].needs


def check_method(name: str, options: Collection[str], others: Collection[str] = ()) -> None:
    """Raise ValueError where the name or an option of the method is unknown, with the closest that is known.

    Parameters
    ----------
    name : str
        What should be one of `methods()`.
    options : Collection[str]
        The names of what should be the method's options.
    others : Collection[str] (default: ())
        Names of what the caller takes beside them, which may be what was meant.
    """
    if name not in _METHODS:
        meant = did_you_mean(name, _METHODS)
        raise ValueError(f"method: expected one of {', '.join(_METHODS)}, found {name!r}{meant}")
    known = method_options(name)
    if unknown := sorted(set(options) - known):
        # who takes options alone, as the command line does, has neither configs nor validation data
        also = {"lora": "configs", "lora-config": "configs"}
        meant = meant_by(unknown, [*known, *others], also) if others else did_you_mean(unknown, known)
        raise ValueError(
            f"method {name!r}: expected options {', '.join(sorted(known))}, found {', '.join(unknown)}{meant}"
        )


def meant_by(unknown: Collection[str], expected: Collection[str], also: Mapping[str, str] | None = None) -> str:
    """Return what an error ends in where options are unknown: what they probably meant, "" where nothing is close.

    Parameters
    ----------
    unknown : Collection[str]
        The names of the options.
    expected : Collection[str]
        The known names.
    also : Mapping[str, str] | None (default: None)
        Known names by what else they are called, with - for _.
    """
    if "grid" in unknown and {"k", "search"} <= set(expected):
        return "; the k to try are search={'k': ...}"
    return did_you_mean(unknown, expected, also)


def make_method(method: str | Method, **options: Any) -> Method:
    """Return the method of that name with those options, or the method object itself.

    Raises
    ------
    ValueError
        The name or an option is unknown, an option is out of range, or options come with a method object.
    """
    if not isinstance(method, str):
        if options:
            raise ValueError(
                f"options {sorted(options)} go with a method's name; found {type(method).__name__}: set them there"
            )
        if not isinstance(method, Method):
            raise ValueError(f"method: expected a name of {', '.join(_METHODS)} or a method object, found {method!r}")
        return method
    check_method(method, options)
    return _METHODS[method](**options)
