"""`python -m simulations.paper`: the command line."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from simulations import commands, environment
from simulations.errors import BadInput
from simulations.paper.options import PaperOptions
from simulations.study import Study

D = PaperOptions()
# Minutes instead of an hour: every row, table and picture, and no result worth reading.
QUICK: dict[str, Any] = {
    "layers": 1,
    "seeds": 2,
    "base_steps": 20,
    "steps": (15, 10, 5),
    "validation_examples": 40,
    "reported_examples": 60,
    "candidates": 2,
    "statistics_batches": 1,
}


def run(
    out: Annotated[str, typer.Option(help="Folder of tables and pictures, and in work of all that is kept.")] = (
        "results/paper"
    ),
    glue_dir: Annotated[str, typer.Option(help="Folder with GLUE's TSV files (or set FEDFROM_GLUE_DIR).")] = "",
    model: Annotated[str, typer.Option(help="minilm, a folder, or a Hub name.")] = D.model,
    layers: Annotated[int | None, typer.Option(help="Transformer layers kept, 0: all. [default: 3 for minilm]")] = None,
    pooling: Annotated[str, typer.Option(help="mean, head or auto.")] = D.pooling,
    apart: Annotated[
        bool,
        typer.Option(help="Encode the two sentences apart where the model pools by the mean, or read them together."),
    ] = D.apart,
    kinds: Annotated[str, typer.Option(help="lora (adapters), full (weights), or both.")] = ",".join(D.kinds),
    seeds: Annotated[int | None, typer.Option(help=f"Seeds of training: 0, 1, ... [default: {D.seeds}]")] = None,
    base_steps: Annotated[
        int | None, typer.Option(help=f"Steps of the base model on MNLI. [default: {D.base_steps}]")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(help=f"Steps on QNLI, RTE, WNLI. [default: {','.join(map(str, D.steps))}]")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples in a training step.")] = D.batch_size,
    max_length: Annotated[int, typer.Option(help="Longest input, in tokens.")] = D.max_length,
    lora_r: Annotated[int, typer.Option(help="LoRA's rank.")] = D.lora_r,
    lora_alpha: Annotated[float, typer.Option(help="LoRA's alpha.")] = D.lora_alpha,
    lora_lr: Annotated[float, typer.Option(help="Learning rate of adapters.")] = D.lora_lr,
    full_lr: Annotated[float, typer.Option(help="Learning rate of full fine-tuning, and of the base.")] = D.full_lr,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Train the word embeddings too, if full.")] = False,
    validation_examples: Annotated[
        int | None, typer.Option(help=f"Of a task's dev, to choose by, at most. [default: {D.validation_examples}]")
    ] = None,
    reported_examples: Annotated[
        int | None, typer.Option(help=f"Of a task's dev, to report, at most. [default: {D.reported_examples}]")
    ] = None,
    candidates: Annotated[
        int | None, typer.Option(help=f"Settings tried for each method. [default: {D.candidates}]")
    ] = None,
    statistics_batches: Annotated[
        int | None, typer.Option(help=f"Batches of Gram and Fisher statistics. [default: {D.statistics_batches}]")
    ] = None,
    precision: Annotated[str, typer.Option(help="float32, bfloat16, or auto (the latter if fast).")] = D.precision,
    processes: Annotated[int, typer.Option(help="Processes at a time, 0: one a core.")] = D.processes,
    report: Annotated[bool, typer.Option("--report", help="Only write tables and pictures of what is there.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Minutes: shows that it works, not what it gives.")] = False,
) -> None:
    """Merge adapters (and full models) of QNLI, RTE and WNLI under one MNLI head by every method, on paired seeds.

    Stopped at any time, the same command goes on with what is missing.
    """
    given: dict[str, Any] = dict(locals())
    for name in ("out", "report", "quick"):
        del given[name]
    try:
        given["kinds"] = tuple(kinds.split(","))
        given["steps"] = None if steps is None else _numbers("--steps", steps)
        asked = {name: value for name, value in given.items() if value is not None}
        options = PaperOptions(**{**(QUICK if quick else {}), **asked}).checked()
        environment.prepare(options.simulation("lora", 0).needs_hub)
        from simulations.paper.pieces import pieces
        from simulations.paper.precision import settled

        options = settled(options)
        work = pieces(options)
        names, costs = [piece.name for piece in work], {piece.name: piece.cost for piece in work}
        study = Study(Path(out) / "work", options.settings(), names, costs=costs)
        start = time.perf_counter()
        if not report:
            from simulations.paper.running import run as run_pieces

            run_pieces(options, study)
        from simulations.paper.report import write

        write(options, study, Path(out))
        print(f"Tables and pictures in {out} after {time.perf_counter() - start:.0f} s")
    except BadInput as error:
        raise commands.ended(error, 2) from None


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise BadInput(f"{name}: expected whole numbers, found {text!r}") from None


if __name__ == "__main__":
    commands.execute(commands.command(run), "python -m simulations.paper")
