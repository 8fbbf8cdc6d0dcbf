"""The ranges of FedAvg's own arguments, which Flower does not check: a wrong one would show up in mid-run, or never."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

_FRACTIONS = ("fraction_train", "fraction_evaluate")
_COUNTS = ("min_train_nodes", "min_evaluate_nodes", "min_available_nodes")
_KEYS = ("weighted_by_key", "arrayrecord_key", "configrecord_key")
_FUNCTIONS = ("train_metrics_aggr_fn", "evaluate_metrics_aggr_fn")


def check_fedavg(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError where an argument of FedAvg is out of its range.

    Parameters
    ----------
    arguments : Mapping[str, Any]
        Those that are given, by name: fractions in [0, 1] (0 leaves training or evaluation out), whole numbers of nodes
        >= 0, keys of text, functions or None. Others are not looked at.
    """
    for name, value in arguments.items():
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if name in _FRACTIONS and not (is_number and 0 <= value <= 1):
            raise ValueError(f"{name}: expected a share of the nodes, a number from 0 to 1, found {value!r}")
        if name in _COUNTS and not (is_number and value >= 0 and isinstance(value, Integral)):
            raise ValueError(f"{name}: expected a whole number of nodes >= 0, found {value!r}")
        if name in _KEYS and not (isinstance(value, str) and value):
            raise ValueError(f"{name}: expected a key, text of at least one character, found {value!r}")
        if name in _FUNCTIONS and value is not None and not callable(value):
            signature = "(list[RecordDict], str) -> MetricRecord"
            raise ValueError(f"{name}: expected a function {signature} or None, found {value!r}")
