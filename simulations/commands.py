"""The command lines of the simulations: options from a dataclass, and each error on one line with an exit code."""

import contextlib
import dataclasses
import inspect
import signal
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NoReturn

import click
import typer

from fedfrom.errors import BadInput
from simulations.fields import flag, read

Command = Callable[..., None]


def execute(app: typer.Typer, name: str) -> NoReturn:
    """Run a command and exit. The parser's own errors take one line as well.

    Parameters
    ----------
    app : typer.Typer
        The command.
    name : str
        The command's name in its help.
    """
    # so that folders and processes that a `with` ends are ended too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        code: Any = app(prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        code = _ended(f"{error.format_message()} (see {name} --help)", error.exit_code).exit_code
    except click.Abort:
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def errors_on_one_line() -> Iterator[None]:
    """End the command with code 2 where the user's input can't be used, and with code 1 where the run fails."""
    try:
        yield
    except BadInput as error:
        raise _ended(error, 2) from None
    except PermissionError as error:
        reason = f"{error.filename}: can't be read or written: {error.strerror}; check its rights"
        raise _ended(reason, 2) from None
    except RuntimeError as error:
        raise _ended(error, 1) from None


def _ended(reason: object, code: int) -> typer.Exit:
    """Print one line on stderr and return the exception that ends a command with this code."""
    print(f"error: {' '.join(str(reason).split())}", file=sys.stderr)
    return typer.Exit(code)


def command(run: Any) -> typer.Typer:
    """Return a command of one function, whose arguments are its options."""
    return commands([run])


def commands(runs: Sequence[Any]) -> typer.Typer:
    """Return a command of one function, or with a subcommand for each of several, named for them."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    for run in runs:
        app.command()(run)
    return app


def takes(
    options: type, preset: Mapping[str, Any] | None = None, /, **flags: str
) -> Callable[[Callable[..., None]], Command]:
    """Make a function of a dataclass a command whose options are the dataclass's fields.

    Parameters
    ----------
    options : type
        A dataclass of `simulations.fields.option` and `argument` fields. The function is given an instance of it.
    preset : Mapping[str, Any] | None (default: None)
        Values that the flag "quick" sets. Options that the user gives come first.
    **flags : str
        Help of each flag by its name. The function is given each flag but "quick" as a keyword.

    Returns
    -------
    Callable
        Decorates the function. The decorated function takes every option by its name, None where it is not given.
    """

    def decorate(run: Callable[..., None]) -> Command:
        def decorated(**given: Any) -> None:
            chosen = {name: bool(given.pop(name, False)) for name in flags}
            quick = dict(preset or {}) if chosen.pop("quick", False) else {}
            asked = {name: value for name, value in given.items() if value is not None}
            with errors_on_one_line():
                run(read(options, {**quick, **asked}), **chosen)

        decorated.__name__, decorated.__doc__ = run.__name__, run.__doc__
        hints = typing.get_type_hints(options)
        parameters = [
            _parameter(field, hints[field.name]) for field in dataclasses.fields(options) if "help" in field.metadata
        ]
        for name, help in flags.items():
            parameters.append(_keyword(name, Annotated[bool, typer.Option(flag(name), help=help)], False))
        decorated.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        decorated.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return decorated

    return decorate


def _parameter(field: Any, kind: Any) -> inspect.Parameter:
    listed = typing.get_origin(kind) is tuple
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
    help = field.metadata["help"]
    if metavar := field.metadata.get("metavar"):
        declared = typer.Argument(metavar=metavar, help=help, show_default=False)
        if listed:
            return _keyword(field.name, Annotated[list[typing.get_args(kind)[0]] | None, declared], None)  # type: ignore[misc]
        return _keyword(field.name, Annotated[kind, declared], inspect.Parameter.empty)
    default: Any = ",".join(map(str, field.default)) if listed else field.default
    shown = "" if default in (None, "") or kind is bool else f" [default: {default}]"
    name = flag(field.name)
    declared = typer.Option(f"{name}/--no-{name[2:]}" if kind is bool else name, help=help + shown, show_default=False)
    return _keyword(field.name, Annotated[(str if listed else kind) | None, declared], None)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
