"""What every command line of the simulations has in common: bad arguments are one line, and exit code 2."""

import sys
from typing import Any, NoReturn

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
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(run)
    return app
