"""`fedfrom …`: the command line of `fedfrom.commands`, and how errors end it. Loads torch only when there is work."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import click
import typer

from fedfrom import __version__
from fedfrom.closest import did_you_mean
from fedfrom.commands.inspect import inspect
from fedfrom.commands.merge import merge
from fedfrom.commands.methods import methods
from fedfrom.commands.report import report

app = typer.Typer(
    name="fedfrom",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (report, merge, inspect, methods):
    app.command()(command)

# errors name the argument of the Python function: here, the option that sets it
_REMEDIES = {"dora=True": "--dora", "same_base=True": "--same-base"}


def _version(asked: bool) -> None:
    if asked:
        print(f"fedfrom {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Merge LoRA adapters and fine-tuned models with FroM, by the norms of their updates.

    \b
    fedfrom merge merged adapter-a adapter-b adapter-c
    fedfrom inspect adapter-a adapter-b adapter-c --plot inputs.png
    fedfrom methods
    """


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code: 0, 2 for bad input, 1 for other errors.

    Parameters
    ----------
    arguments : Sequence[str]
        The words after `fedfrom`. Every error is one line on stderr.
    """
    try:
        code: Any = app(list(arguments), prog_name="fedfrom", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return 2
    except click.ClickException as error:
        return _ended(f"{_said(error)} (see fedfrom --help)", error.exit_code)
    except ValueError as error:
        return _ended(error, 2)
    except BrokenPipeError:  # `fedfrom inspect … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        full = "; free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return _ended(f"{where}{error.strerror or error}{full}", 2)
    except (MemoryError, RuntimeError) as error:  # torch's: out of memory, a device that fails
        return _ended(str(error).partition("\n")[0] or "out of memory", 1)
    except click.Abort:
        return 1
    return code if isinstance(code, int) else 0


def _said(error: click.ClickException) -> str:
    """Return an error's message, with our suggestion of the closest name in place of click's and typer's own."""
    context = getattr(error, "ctx", None)
    if context is not None and isinstance(error, click.NoSuchOption):
        options = [option for parameter in context.command.get_params(context) for option in parameter.opts]
        return f"no such option: {error.option_name!r}{did_you_mean(error.option_name, options)}"
    unknown = re.match(r"No such command '(.*?)'", error.message)
    if context is not None and unknown and isinstance(context.command, click.Group):
        commands, name = sorted(context.command.commands), unknown[1]
        return f"expected one of {', '.join(commands)}, found {name!r}{did_you_mean(name, commands)}"
    return error.format_message()


def _ended(reason: object, code: int) -> int:
    text = " ".join(str(reason).split())
    for argument, option in _REMEDIES.items():
        text = text.replace(argument, option)
    print(f"error: {text}", file=sys.stderr)
    return code


def main() -> NoReturn:
    """Run the command line of this process and exit with its code."""
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(run(sys.argv[1:]))


def _terminated(number: int, frame: object) -> NoReturn:
    """End by an exception, so that unfinished files are removed."""
    sys.exit(128 + number)
