"""How a command's options are declared, as the fields of a dataclass, and how they are read, checked and written."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from fedfrom.errors import BadInput

T = TypeVar("T")


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """Declare one option of a dataclass.

    Parameters
    ----------
    default : Any
        Its value where the option is not given.
    help : str
        The sentence that `--help` shows.
    least, most : float | None (default: None)
        Bounds of a number, both included.
    above : float | None (default: None)
        Bound of a finite number, excluded.
    choices : tuple[str, ...] (default: ())
        All values of a text; empty: any text.

    Notes
    -----
    `check_bounds` checks the bounds. Those of a tuple hold for each of its entries. None is never out of bounds.
    """
    bounds = {"least": least, "most": most, "above": above, "choices": choices}
    return dataclasses.field(default=default, metadata={"help": help, **bounds})


def argument(metavar: str, help: str, **default: Any) -> Any:
    """Declare one positional argument of a command: its name in `--help`, its help, and perhaps `default=`."""
    return dataclasses.field(**default, metadata={"help": help, "metavar": metavar})


def read(kind: type[T], values: Mapping[str, Any]) -> T:
    """Return a dataclass of options from names and values, as `Options.from_mapping` does."""
    hints = typing.get_type_hints(kind)
    given = {name.replace("-", "_"): value for name, value in values.items() if value is not None}
    for name in given:
        if name not in hints:
            raise BadInput(f"unknown option {name!r}")
    return kind(**{name: _converted(name, value, hints[name]) for name, value in given.items()})


def as_json(options: Any) -> dict[str, Any]:
    """Return a dataclass of options as plain JSON types."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(options).items()}


def flag(name: str) -> str:
    """Return a field's name as a command line has it: `--batch-size` for batch_size."""
    return "--" + name.replace("_", "-")


def check_bounds(options: Any) -> None:
    """Check every option of a dataclass against the bounds that `option` declared.

    Raises
    ------
    BadInput
        An option is out of its bounds.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None and (expected := _expected(one, **field.metadata)):
                raise BadInput(f"{flag(field.name)}: expected {expected}, found {one!r}")


def _expected(
    value: Any,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
    **_: Any,
) -> str:
    """Return what was expected in place of a value that is out of bounds; empty where the value is fine."""
    if choices and value not in choices:
        return f"one of {', '.join(choices)}"
    if least is not None and not value >= least:  # so that a NaN is refused too
        return f"{least} or more"
    if most is not None and not value <= most:
        return f"{most} or less"
    if above is not None and not above < value < float("inf"):
        return "a positive number" if above == 0 else f"a number above {above}"
    return ""


def _converted(name: str, value: Any, kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
        if value == "":
            return None
    try:
        if typing.get_origin(kind) is tuple:
            items = value.split(",") if isinstance(value, str) else value
            return tuple(typing.get_args(kind)[0](item) for item in items if item != "")
        if kind is bool and isinstance(value, str):
            return {"true": True, "false": False}[value.lower()]
        if kind is int and isinstance(value, float) and value != int(value):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError, KeyError, OverflowError):
        raise BadInput(f"{flag(name)}: can't read {value!r}") from None
