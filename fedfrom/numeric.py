"""What counts as a number in a setting: Python's own, without booleans, so that True is not taken for 1."""

from __future__ import annotations

from typing import TypeGuard


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value is an int or a float, NaN and infinity included; a boolean is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether a value is an int; a boolean is none."""
    return isinstance(value, int) and not isinstance(value, bool)
