"""What counts as a number in a setting: Python's own, without booleans, so that True is not taken for 1."""

from __future__ import annotations

from typing import Any, TypeGuard

import numpy as np


def plain(value: Any) -> Any:
    """Return a number of numpy's as Python's own, which JSON takes and reckons in float64; all else as it is."""
    return value.item() if isinstance(value, np.number) else value


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value is an int or a float, NaN and infinity included; a boolean is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether a value is an int; a boolean is none."""
    return isinstance(value, int) and not isinstance(value, bool)
