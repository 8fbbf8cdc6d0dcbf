"""Choosing by a user's validation function: the scores of merged states, and the values of an option to try."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

Validate = Callable[[Mapping[str, Tensor]], float]
"""A merged state (key -> tensor) -> its score; higher is better."""


def check_validate(validate: object) -> None:
    """Raise ValueError where `validate` is neither None nor callable."""
    if validate is not None and not callable(validate):
        raise ValueError(f"validate: expected a function from a merged state to its score, found {validate!r}")


def score(validate: Validate, state: Mapping[str, Tensor]) -> float:
    """Return what a validation function says of a merged state.

    Parameters
    ----------
    validate : Callable[[Mapping[str, Tensor]], float]
        The function.
    state : Mapping[str, Tensor]
        Key -> tensor.

    Returns
    -------
    float
        The score; minus infinity for NaN, so that no number is below it.

    Raises
    ------
    ValueError
        `validate` raised, or returned what is no number.
    """
    try:
        value: Any = validate(state)
    except Exception as error:
        raise ValueError(
            f"validate: expected a score, a number, for a merged state, found that it raised {type(error).__name__}: "
            f"{error}"
        ) from error
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # torch's, of several numbers
        raise ValueError(
            f"validate: expected a score, a number, for a merged state, found that it returned {_shown(value)}"
        ) from error
    return -math.inf if math.isnan(number) else number


def check_search(search: object, known: Iterable[str]) -> dict[str, tuple[float, ...]]:
    """Return the values to try of each option, as tuples of floats.

    Parameters
    ----------
    search : Mapping[str, Sequence[float]]
        Option -> at least one value.
    known : Iterable[str]
        The options that can be searched. The range of the values is theirs to check.

    Raises
    ------
    ValueError
        It is no mapping, names no option or an unknown one, or has no value or something else than numbers for one.
    """
    names = list(known)
    if not isinstance(search, Mapping) or not search:
        raise ValueError(
            f"search: expected a mapping from {' or '.join(names)} to the values to try, such as "
            f"{{{names[0]!r}: (0, 0.5, 1)}}, found {_shown(search)}"
        )
    if unknown := [name for name in search if name not in names]:
        raise ValueError(f"search: expected {' or '.join(names)}, found {', '.join(map(repr, unknown))}")
    return {name: _numbers(name, values) for name, values in search.items()}


def _numbers(name: str, values: object) -> tuple[float, ...]:
    found = list(values) if isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping) else []
    wrong = [value for value in found if isinstance(value, bool) or not isinstance(value, Real)]
    if wrong or not found:
        raise ValueError(
            f"search, {name!r}: expected numbers to try, at least one, found {_shown(wrong[0] if wrong else values)}"
        )
    return tuple(float(value) for value in found)


def as_json(search: Mapping[str, Sequence[float]]) -> dict[str, list[float | str]]:
    """Return the values to try as JSON has them: lists, with "infinity" as a word."""
    return {name: ["infinity" if value == math.inf else value for value in values] for name, values in search.items()}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
