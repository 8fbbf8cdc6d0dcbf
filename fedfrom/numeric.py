"""What counts as a number in a setting: Python's own, without booleans, so that True is not taken for 1."""

from __future__ import annotations

from typing import Any, TypeGuard

import numpy as np


def plain(value: Any) -> Any:
    """Return a numpy number as Python's int or float, which JSON accepts; other values unchanged."""
    return value.item() if isinstance(value, np.number) else value


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value is an int or a float, NaN and infinity included, and not a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether a value is an int, and not a boolean."""
    return isinstance(value, int) and not isinstance(value, bool)
