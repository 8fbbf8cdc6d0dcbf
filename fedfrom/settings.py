"""The ranges of a strategy's settings: FedAvg's own, which Flower does not check, and those of the screening.

A wrong one would show up in mid-run, or never.
"""

from __future__ import annotations

import math
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


def check_screening(examples_cap: float | None, min_valid_replies: int, select: str | None, attackers: int) -> None:
    """Raise ValueError where a setting of the screening is out of range."""
    if examples_cap is not None and (not isinstance(examples_cap, int | float) or not 1 <= examples_cap < math.inf):
        raise ValueError(f"examples_cap: expected a finite number >= 1 or None, found {examples_cap!r}")
    if not isinstance(min_valid_replies, int) or min_valid_replies < 1:
        raise ValueError(f"min_valid_replies: expected a whole number >= 1, found {min_valid_replies!r}")
    if select not in (None, "multikrum"):
        raise ValueError(f"select: expected 'multikrum' or None, found {select!r}")
    if not isinstance(attackers, int) or attackers < 0 or (attackers > 0 and select is None):
        raise ValueError(f"attackers: expected a whole number >= 0, above 0 with select= alone, found {attackers!r}")
