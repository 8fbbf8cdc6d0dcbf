"""Checks of numbers in settings: Python's int and float are numbers; booleans are not, so True is not taken for 1."""

from __future__ import annotations

from typing import Any, TypeGuard

import numpy as np


def plain(value: Any) -> Any:
    """Return a numpy number as a Python number, which JSON can hold and which has float64 precision.

    Any other value is returned as it is.
    """
    return value.item() if isinstance(value, np.number) else value


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value is an int or a float, NaN and infinity included; a boolean is not a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether a value is an int; a boolean is not a number."""
    return isinstance(value, int) and not isinstance(value, bool)
