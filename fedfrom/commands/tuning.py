"""`fedfrom merge … --tune DATA`: the options that go with it, and what it prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from fedfrom.arguments import method_of
from fedfrom.commands.console import console
from fedfrom.errors import BadInput

if TYPE_CHECKING:  # tuning imports torch
    from fedfrom.tuning.outcome import Outcome
    from fedfrom.tuning.tune import Tuner

_OF_ALL = ("rank", "solver", "examples_power")  # options that every method has
_MAX_LENGTH = 256


def was_given(context: typer.Context, name: str) -> bool:
    """Return whether an option was given, on the command line or in the --config file."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def check_without_tuning(refit_bias: bool, max_length: int | None) -> None:
    """Raise BadInput where there is nothing to tune on, but something is given that goes with it."""
    option = "--refit-bias" if refit_bias else "--max-length" if max_length is not None else None
    if option is not None:
        raise BadInput(
            f"{option}: expected with --tune DATA alone, found without: name a file of rows, or leave it out"
        )


def tuner_of(
    context: typer.Context,
    files: Sequence[str],
    method: str,
    options: Mapping[str, Any],
    rate: float | str,
    refit_bias: bool,
    max_length: int | None,
) -> Tuner:
    """Return what chooses method and scale; where --method or --server-lr is given, the other alone.

    Parameters
    ----------
    context : typer.Context
        Of the command.
    files : Sequence[str]
        --tune.
    method : str
        --method.
    options : Mapping[str, Any]
        The method's options that were given.
    rate : float | str
        --server-lr.
    refit_bias, max_length
        --refit-bias and --max-length.

    Raises
    ------
    BadInput
        Options of one method are given, but no method; or there is no such scale or length.
    """
    common = {name: value for name, value in options.items() if name in _OF_ALL}
    alone = {name: value for name, value in options.items() if name not in _OF_ALL}
    if not was_given(context, "method") and alone:
        name = next(iter(alone))
        option = f"--{name}" if name in ("k", "scope") else f"--option {name}"
        raise BadInput(
            f"{option}: expected with --method alone, as --tune tries several methods, found without: say which method "
            "it is for"
        )
    if rate == "safe":
        raise BadInput("--server-lr safe: expected a number with --tune, which tries scales: give one, or leave it out")
    if max_length is not None and max_length < 2:
        raise BadInput(f"--max-length: expected at least 2 tokens, found {max_length}")
    checked = method_of(method, dict(options)) if was_given(context, "method") else None

    from fedfrom.tuning.candidates import Candidate
    from fedfrom.tuning.tune import Tuner

    return Tuner(
        files=files,
        base=context.params.get("base"),
        asked=None if checked is None else Candidate(method, checked, alone),
        scale=float(rate) if was_given(context, "server_lr") else None,
        common=common,
        refit_bias=refit_bias,
        max_length=_MAX_LENGTH if max_length is None else max_length,
        device=context.params["device"] if was_given(context, "device") else None,
    )


def show(outcome: Outcome) -> None:
    """Print the tables and the sentences."""
    terminal = console()
    for table in outcome.tables():
        terminal.print(table)
    for sentence in outcome.sentences():
        print(sentence)
