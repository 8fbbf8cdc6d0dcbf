"""`python -m simulations.evaluate`: scores adapters on the held-out examples of a run, beside the run's own scores."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfrom.errors import BadInput
from simulations import commands, environment
from simulations.fields import argument
from simulations.options import Options


@dataclass(frozen=True)
class Evaluation:
    """The folders that are scored."""

    results: Path = argument("RESULTS", "A results folder.")
    folders: tuple[Path, ...] = argument(
        "[FOLDER]...", "Adapters (or checkpoints, after --full) of its model.", default=()
    )


@commands.takes(Evaluation)
def run(asked: Evaluation) -> None:
    """Score the final models of a run, and any other FOLDER, on the run's own held-out examples.

    The first lines are the run's strategies, each with the score in the run's report: both are equal on one machine.

    Example: python -m simulations.evaluate results/simulation runs/merged
    """
    found, options = _settings(asked.results)
    environment.prepare(options.needs_hub)
    from fedfrom.pages.runs import folder_name
    from simulations.experiment import Experiment
    from simulations.results import load_model, load_weights
    from simulations.running import quiet

    with quiet(options.verbose):
        experiment = Experiment.prepare(options)
    for label, history in found["strategies"].items():
        score = experiment.evaluate_model(load_model(asked.results, label))["score"]
        name = asked.results / folder_name(label)
        print(f"{score:.6f}  {name} (the report says {history['final']:.6f})", flush=True)
    labels = len(found["tasks"][0]["labels"])
    for folder in asked.folders:
        score = experiment.evaluate_model(load_weights(options, labels, folder))["score"]
        print(f"{score:.6f}  {folder}", flush=True)


def _settings(results: Path) -> tuple[dict[str, Any], Options]:
    from fedfrom.pages.runs import read_runs

    try:
        (read,) = read_runs([results])
        options = Options.from_mapping(read.found["options"])
        _ = read.found["tasks"][0]["labels"], [each["final"] for each in read.found["strategies"].values()]
    except (LookupError, TypeError, AttributeError) as error:
        raise BadInput(f"{results}: expected a run's options and scores, found none ({error}); run it again") from None
    return read.found, options


def main() -> None:
    """Run the command line."""
    commands.execute(commands.command(run), "python -m simulations.evaluate")


if __name__ == "__main__":
    main()
