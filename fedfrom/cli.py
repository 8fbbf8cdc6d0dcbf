"""`fedfrom …`: merging and looking at adapters and checkpoints on disk. Loads torch only when there is work."""

from __future__ import annotations

import errno
import inspect as inspection_of
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import click
import typer

from fedfrom import __version__
from fedfrom.arguments import (
    command_line,
    method_of,
    number,
    numbers,
    own_options,
    power_of,
    progress_bar,
    rank_of,
    read_config,
    without_effect,
)
from fedfrom.closest import did_you_mean
from fedfrom.errors import BadInput
from fedfrom.pages.command import report

app = typer.Typer(
    name="fedfrom",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(report)
# where a refusal of `merge` names its own argument, the option that is meant
_REMEDIES = {"dora=True": "--dora", "same_base=True": "--same-base"}
_DTYPES = ("float64", "float32", "float16", "bfloat16")
# what else people call them
_ALSO = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
_ALSO |= {"single": "float32", "fp64": "float64", "double": "float64"}


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code: 0, 2 for bad input, 1 for what else went wrong.

    Parameters
    ----------
    arguments : Sequence[str]
        What follows `fedfrom`. Every error is one line on stderr.
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
    """Return what was wrong, with the closest name in place of those that click and typer suggest, each for itself."""
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
    """End as an exception, so that what was begun is removed."""
    sys.exit(128 + number)


# --- Options ---------------------------------------------------------------------------------------------------------


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


Inputs = Annotated[
    list[str],
    typer.Argument(metavar="IN...", hidden=True),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="The pretrained model: full checkpoints' updates, and adapters' saved modules, are taken from it.",
    ),
]
Device = Annotated[
    str, typer.Option("--device", help="Where layers are merged: cpu, cuda, … [default: cpu]", show_default=False)
]
ForceBase = Annotated[
    bool, typer.Option("--force-base", help="The adapters' base models go by different names, but are the same.")
]
Dora = Annotated[bool, typer.Option("--dora", help="Accept DoRA: its magnitudes are averaged, 6 to 17 % off.")]
SameBase = Annotated[
    bool,
    typer.Option("--same-base", help="Accept PiSSA and its kin: all adapters share one base model altered by it."),
]


# --- Commands --------------------------------------------------------------------------------------------------------


@app.command()
def merge(
    context: typer.Context,
    out: Annotated[str, typer.Argument(metavar="OUT", hidden=True)],
    inputs: Inputs,
    method: Annotated[
        str, typer.Option("--method", help="See fedfrom methods. [default: from]", show_default=False)
    ] = "from",
    k: Annotated[
        str | None, typer.Option("--k", help="Power of the norm in FroM's weights, 0 to inf. [default: 1, the paper's]")
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            "--rank", help="Of the merged adapter: 16, or a share of the energy, 0.99. [default: the largest input's]"
        ),
    ] = None,
    solver: Annotated[
        str | None, typer.Option("--solver", help="svd, exact, or alternating, the paper's Algorithm 1. [default: svd]")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option("--weights", help="What each input's share is multiplied by: 2,1,1. [default: 1 each]"),
    ] = None,
    examples: Annotated[
        str | None, typer.Option("--examples", help="Numbers of examples, one an input: 1000,200,50.")
    ] = None,
    examples_power: Annotated[
        float | None,
        typer.Option("--examples-power", help="p: an input weighs examples^p. [default: 1 with --examples, else 0]"),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option("--scope", help="layer: weights from each layer's norms; model: one an input. [default: layer]"),
    ] = None,
    base: Base = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of the result: float32, bfloat16, … [default: the inputs']")
    ] = None,
    device: Device = "cpu",
    server_lr: Annotated[
        str,
        typer.Option(
            "--server-lr",
            help="What the merged update is multiplied by, or safe: see fedfrom.merge. [default: 1]",
            show_default=False,
        ),
    ] = "1.0",
    clip: Annotated[
        float | None,
        typer.Option("--clip", help="No update of a layer counts for more than so many times the median norm there."),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="A method's own: --option density=0.3. Repeat for more.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT, an earlier result.")] = False,
    force_base: ForceBase = False,
    dora: Dora = False,
    same_base: SameBase = False,
    config: Annotated[
        str | None,
        typer.Option("--config", help="A YAML file with any of these options.", callback=read_config, is_eager=True),
    ] = None,
) -> None:
    """Merge adapters or checkpoints IN … into the new folder OUT.

    IN is the folder of a PEFT adapter or of a Hugging Face checkpoint, or the name of one on the Hub, owner/name or
    owner/name@revision; only safetensors are read, never pickles. OUT appears when it is complete, or not at all.
    Adapters are merged as products BA, whatever their ranks, alphas and patterns; PEFT loads the result. Checkpoints
    are read and written a tensor at a time, so that models larger than memory can be merged.

    \b
    fedfrom merge merged adapter-a adapter-b adapter-c
    fedfrom merge merged adapter-a adapter-b --k 0.5 --rank 0.99
    fedfrom merge merged adapter-a adapter-b --weights 2,1
    fedfrom merge merged adapter-a adapter-b --examples 1000,250
    fedfrom merge merged model-a model-b --base pretrained --method ties --option density=0.3
    fedfrom merge merged owner/adapter-a owner/adapter-b@v2 --config merge.yaml
    """
    own_weights = numbers("--weights", weights, inputs)
    counts = numbers("--examples", examples, inputs)
    options = {
        "k": None if k is None else power_of(k),
        "rank": None if rank is None else rank_of(rank),
        "solver": solver,
        "scope": scope,
        "examples_power": 1.0 if counts is not None and examples_power is None else examples_power,
    }
    given = {name: value for name, value in options.items() if value is not None}
    own = own_options(option or [], given)
    rate: float | str = server_lr if server_lr == "safe" else number("--server-lr", server_lr)
    if dtype is not None and dtype not in _DTYPES:
        meant = did_you_mean(dtype, _DTYPES, _ALSO)
        raise BadInput(f"--dtype: expected one of {', '.join(_DTYPES)}, found {dtype!r}{meant}")

    import torch

    from fedfrom.files.merge import merge_folders

    with progress_bar("Merging", in_bytes=True) as progress:
        report = merge_folders(
            out,
            inputs,
            method_of(method, {**given, **own}),
            base=base,
            examples=counts,
            weights=own_weights,
            server_lr=rate,
            clip=clip,
            dtype=None if dtype is None else getattr(torch, dtype),
            device=device,
            force=force,
            force_base=force_base,
            dora=dora,
            same_base=same_base,
            command=command_line(context),
            progress=progress,
        )
    without = sum(layer.kind == "tensor" and not layer.has_reference for layer in report.layers)
    averaged = f", {without} of them without a base and so averaged" if without else ""
    dropped = max((layer.energy_dropped for layer in report.layers), default=0.0)
    cut = f", cut to a rank that drops up to {dropped:.0%} of a layer's energy" if dropped >= 0.005 else ""
    idle = "" if report.has_adapters else without_effect(given, own)
    print(f"{out}: {len(inputs)} inputs, {len(report.layers)} layers{averaged}{cut}{idle}")


@app.command()
def inspect(
    inputs: Inputs,
    k: Annotated[
        str,
        typer.Option(
            "--k", help="Power of the norm in the weights that are predicted. [default: 1]", show_default=False
        ),
    ] = "1.0",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    plot: Annotated[
        str | None, typer.Option("--plot", help="Draw norms, weights, interference and cosines into FILE.png.")
    ] = None,
    every_layer: Annotated[bool, typer.Option("--all", help="Show all layers, not the 10 that disagree most.")] = False,
    base: Base = None,
    device: Device = "cpu",
    force_base: ForceBase = False,
    dora: Dora = False,
    same_base: SameBase = False,
) -> None:
    """Show how adapters or checkpoints IN … compare, layer by layer, before they are merged.

    IN is a folder or a name on the Hub, as in fedfrom merge. Shown are
    ranks, norms, effective ranks (the stable rank: the sum of an update's squared singular values divided by the
    largest of them), pairwise cosines, FroM's weights, and the share of the updates' energy that their merge loses.

    \b
    fedfrom inspect adapter-a adapter-b
    fedfrom inspect adapter-a adapter-b --k 0.5 --all
    fedfrom inspect model-a model-b --base pretrained --json > found.json
    fedfrom inspect adapter-a adapter-b --plot inputs.png
    """
    power = power_of(k)
    from fedfrom.files.inspection import inspect_folders

    if plot is not None:
        from fedfrom.files.figure import check_plot

        check_plot(Path(plot))
    with progress_bar("Reading") as progress:
        found = inspect_folders(inputs, power, base, device, force_base, dora, same_base, progress)
    if plot is not None:
        from fedfrom.files.figure import draw

        draw(found, Path(plot))
    if as_json:
        print(json.dumps(found.to_dict(), indent=1, allow_nan=False))
        return
    from rich.console import Console

    from fedfrom.files.tables import tables

    # a pipe has no width to fit into
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    for table in tables(found, every_layer):
        console.print(table)


@app.command()
def methods() -> None:
    """List the merging methods, what each does, and its options with their defaults."""
    from dataclasses import MISSING, fields

    from fedfrom.merging.methods.base import Method
    from fedfrom.merging.methods.registry import method_class
    from fedfrom.merging.methods.registry import methods as names

    for name in names():
        kind: type[Method] = method_class(name)
        first = (inspection_of.getdoc(kind) or "").partition("\n")[0]
        print(f"{name}: {first}")
        options = [
            f"{field.name}={field.default}"
            for field in fields(kind)
            if field.default is not MISSING and field.name not in ("validate", "search")
        ]
        python_only = kind.needs or name == "greedy-soup"
        print(f"    {' '.join(options)}" + ("  [from Python alone: needs data]" if python_only else ""))
