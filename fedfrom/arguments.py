"""The text of a command line <-> values: options are read from text, and the command is written out again."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import typer

from fedfrom.closest import did_you_mean
from fedfrom.errors import BadInput


def read_config(context: typer.Context, path: str | None) -> str | None:
    """Read options from a YAML file; an option on the command line overrides the file's."""
    if path is None:
        return None
    try:
        import yaml
    except ModuleNotFoundError:
        raise BadInput("--config needs PyYAML: pip install 'fedfrom[cli]'") from None
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"--config {path}: expected YAML, found: {reason}; see fedfrom merge --help") from None
    if not isinstance(found, dict):
        raise BadInput(f"--config {path}: expected option: value, found {type(found).__name__}")
    known = {
        option.removeprefix("--"): parameter
        for parameter in context.command.params
        if isinstance(parameter, click.Option)
        for option in parameter.opts
        if parameter.name not in ("config", "help")
    }
    values: dict[str, Any] = {}
    for name, value in found.items():
        parameter = known.get(str(name).replace("_", "-"))
        if parameter is None or parameter.name is None:
            raise BadInput(
                f"--config {path}: unknown option {name!r}: expected one of {', '.join(sorted(known))}"
                f"{did_you_mean(str(name), known)}"
            )
        if name == "option":
            if not isinstance(value, dict):
                raise BadInput(f"--config {path}, option: expected name: value, found {value!r}")
            value = [f"{key}={entry}" for key, entry in value.items()]
        elif parameter.multiple:
            value = [str(entry) for entry in value] if isinstance(value, list) else [str(value)]
        elif isinstance(value, list):
            value = ",".join(map(str, value))
        elif isinstance(value, dict):
            raise BadInput(f"--config {path}, {name}: expected a value, found a mapping")
        elif not parameter.is_flag and value is not None:
            value = str(value)
        values[parameter.name] = value
    context.default_map = {**(context.default_map or {}), **values}
    return path


def number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise BadInput(f"{name}: expected a number, found {text!r}") from None


def numbers(name: str, text: str | None, inputs: Sequence[str]) -> list[float] | None:
    """Return one number for each input, read from text such as "2,1,1"; None where there is no text."""
    if text is None:
        return None
    found = [number(name, part) for part in text.split(",")]
    if len(found) != len(inputs):
        raise BadInput(f"{name}: expected one number an input, {len(inputs)}, found {len(found)}")
    return found


def power_of(text: str) -> float:
    if text == "auto":
        raise BadInput(
            "--k auto: needs validation data: give a number, let --tune ROWS choose the method, or call "
            "fedfrom.merge(..., k='auto', validate=...) in Python"
        )
    k = number("--k", text)
    if not k > -float("inf"):
        raise BadInput(f"--k: expected a number (inf included, -inf not), found {text}")
    return k


def rank_of(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return number("--rank", text)


def own_options(given: Sequence[str], taken: dict[str, Any]) -> dict[str, Any]:
    """Return --option name=value as a dict, numbers as numbers."""
    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise BadInput(f"--option: expected name=value, found {text!r}")
        if name in ("validate", "search"):
            raise BadInput(f"--option {name}: needs validation data: call fedfrom.merge in Python")
        if name in options or name in taken:
            raise BadInput(f"--option {name}: given twice")
        options[name] = _plain(value.strip())
    if isinstance(options.get("k"), str):
        options["k"] = power_of(options["k"])
    return options


def without_effect(given: dict[str, Any], own: dict[str, Any]) -> str:
    """Return a note that names the given options that have no effect on full models, or "" where there are none."""
    from fedfrom.merging.solve import RANK_OPTIONS

    options = [f"--{name} {value}" for name, value in given.items() if name in RANK_OPTIONS]
    options += [f"--option {name}={value}" for name, value in own.items() if name in RANK_OPTIONS]
    verb = "has" if len(options) == 1 else "have"
    return f"; {' and '.join(options)} {verb} no effect: full models have no rank" if options else ""


def _plain(text: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def method_of(name: str, options: dict[str, Any]) -> Any:
    from fedfrom.merging.methods.registry import make_method

    try:
        return make_method(name, **options)
    except TypeError:  # text was given where the method compares with a number
        text = ", ".join(f"{option}={value}" for option, value in options.items() if isinstance(value, str))
        raise BadInput(f"--option: expected a number, found {text}") from None
    except ValueError as error:
        raise BadInput(f"{error} (see fedfrom methods)") from None


def command_line(context: typer.Context) -> str:
    """Return the command line that repeats this run; options from a --config file are spelled out in it."""
    words, options = [], []
    for parameter in context.command.params:
        assert parameter.name is not None
        value = context.params.get(parameter.name)
        source = context.get_parameter_source(parameter.name)
        if isinstance(parameter, click.Argument):
            words += [value] if isinstance(value, str) else list(value or [])
        elif source is not None and source.name != "DEFAULT" and parameter.name not in ("config", "force"):
            if isinstance(value, bool):
                options += [parameter.opts[0]] if value else []
            else:
                for entry in value if isinstance(value, list | tuple) else [value]:
                    options += [parameter.opts[0], str(entry)]
    return shlex.join(["fedfrom", context.command.name or "", *words, *options])


@contextlib.contextmanager
def progress_bar(title: str, in_bytes: bool = False) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a function (done, total) that updates a progress bar on stderr; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress as bars
    from rich.console import Console

    rate = [bars.DownloadColumn(), bars.TransferSpeedColumn()] if in_bytes else [bars.MofNCompleteColumn()]
    columns = [bars.TextColumn("{task.description}"), bars.BarColumn(), *rate, bars.TimeRemainingColumn()]
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
