"""`fedfrom merge OUT IN …`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

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
from fedfrom.commands.options import Base, Device, Dora, ForceBase, Inputs, SameBase
from fedfrom.commands.tuning import check_without_tuning, show, tuner_of
from fedfrom.errors import BadInput

_DTYPES = ("float64", "float32", "float16", "bfloat16")
# other names of the dtypes
_ALSO = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
_ALSO |= {"single": "float32", "fp64": "float64", "double": "float64"}


def merge(
    context: typer.Context,
    out: Annotated[str, typer.Argument(metavar="OUT", hidden=True)],
    inputs: Inputs,
    method: Annotated[
        str, typer.Option("--method", help="See fedfrom methods. [default: from]", show_default=False)
    ] = "from",
    k: Annotated[
        str | None,
        typer.Option("--k", help="Power of the norm in FroM's weights, up to inf. [default: 1, the paper's]"),
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
        typer.Option("--clip", help="Shortens updates of a layer to this multiple of the median norm there."),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="A method's own: --option density=0.3. Repeat for more.")
    ] = None,
    tune: Annotated[
        list[str] | None,
        typer.Option(
            "--tune",
            help="Rows to choose method and scale on: one CSV, TSV, JSONL or TXT file for all inputs, or one an input.",
        ),
    ] = None,
    refit_bias: Annotated[
        bool, typer.Option("--refit-bias", help="With --tune: fit the bias of each classifier's head to its rows.")
    ] = False,
    max_length: Annotated[
        int | None, typer.Option("--max-length", help="With --tune: tokens of a row, at most. [default: 256]")
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
    fedfrom merge merged adapter-a adapter-b --tune rows-a.csv --tune rows-b.csv
    """
    own_weights = numbers("--weights", weights, inputs)
    counts = numbers("--examples", examples, inputs)
    found = {
        "k": None if k is None else power_of(k),
        "rank": None if rank is None else rank_of(rank),
        "solver": solver,
        "scope": scope,
        "examples_power": 1.0 if counts is not None and examples_power is None else examples_power,
    }
    given = {name: value for name, value in found.items() if value is not None}
    own = own_options(option or [], given)
    rate: float | str = server_lr if server_lr == "safe" else number("--server-lr", server_lr)
    if dtype is not None and dtype not in _DTYPES:
        meant = did_you_mean(dtype, _DTYPES, _ALSO)
        raise BadInput(f"--dtype: expected one of {', '.join(_DTYPES)}, found {dtype!r}{meant}")
    options = {**given, **own}
    tuner = None
    if not tune:
        check_without_tuning(refit_bias, max_length)
    else:
        tuner = tuner_of(context, tune, method, options, rate, refit_bias, max_length)

    import torch

    from fedfrom.files.merge import merge_folders

    with progress_bar("Merging", in_bytes=True) if tuner is None else progress_bar("Tuning") as progress:
        if tuner is not None:
            tuner.progress, tuner.say = progress, None if progress is not None else _say
        report = merge_folders(
            out,
            inputs,
            method_of(method, options if tuner is None else {}),
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
            progress=progress if tuner is None else None,
            choose=tuner,
        )
    if tuner is not None and tuner.outcome is not None:
        show(tuner.outcome)
    without = sum(layer.kind == "tensor" and not layer.has_reference for layer in report.layers)
    averaged = f", {without} of them without a base and so averaged" if without else ""
    idle = "" if report.has_rank else without_effect(given, own)
    print(f"{out}: {len(inputs)} inputs, {len(report.layers)} layers{averaged}{idle}")
    print(report.summary())


def _say(line: str) -> None:
    """Print a line of progress, where there is no terminal to draw a bar on."""
    print(line, file=sys.stderr, flush=True)
