"""What every command line of the simulations has in common: bad arguments are one line, and exit code 2."""

import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn

import click
import typer


def execute(app: typer.Typer, name: str) -> NoReturn:
    """Run a command and exit; what its parser refuses is said in one line, as what the command itself refuses.

    Parameters
    ----------
    app : typer.Typer
        The command.
    name : str
        What its help calls it.
    """
    try:
        code: Any = app(prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        code = ended(f"{error.format_message()} (see {name} --help)", error.exit_code).exit_code
    except click.Abort:
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def ended(reason: object, code: int) -> typer.Exit:
    """Say on one line why a command ends, and return what ends it with that exit code."""
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


def with_options(run: Callable[..., None], options: type, **flags: str) -> Callable[..., None]:
    """Return a function of keywords as a command whose options are a dataclass's fields, and flags.

    Parameters
    ----------
    run : Callable[..., None]
        Is handed each option's value by its name, None where it was not given, so that a preset can change what was
        left open; and each flag as a bool.
    options : type
        A dataclass of `simulations.options.option` fields.
    **flags : str
        The help of each flag, by name.
    """
    hints = typing.get_type_hints(options)
    parameters = [
        _parameter(field, hints[field.name]) for field in dataclasses.fields(options) if "help" in field.metadata
    ]
    for name, help in flags.items():
        parameters.append(_keyword(name, Annotated[bool, typer.Option(f"--{name}", help=help)], False))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameter(field: Any, kind: Any) -> inspect.Parameter:
    listed = typing.get_origin(kind) is tuple
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
    default: Any = field.default
    if listed:
        default = ",".join(map(str, default))
    shown = "" if default in (None, "") or kind is bool else f" [default: {default}]"
    name = "--" + field.name.replace("_", "-")
    declared = typer.Option(
        f"{name}/--no-{name[2:]}" if kind is bool else name, help=field.metadata["help"] + shown, show_default=False
    )
    return _keyword(field.name, Annotated[(str if listed else kind) | None, declared], None)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
