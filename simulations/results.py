"""The results folder: JSON, pictures and the final adapters. It appears complete or not at all."""

import json
import math
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from fedfrom.atomic import publish, staging_folder
from fedfrom.errors import BadInput
from fedfrom.pages.page_of_runs import PAGE, write_report
from fedfrom.pages.runs import FILE, FORMAT, folder_name
from simulations.options import Options

PACKAGES = ("fedfrom", "flwr", "flwr-datasets", "torch", "peft", "transformers", "datasets", "ray")


class Folder:
    """A results folder, checked before the run and filled at its end.

    All files are written into a hidden folder beside it, which is renamed when it is complete. Earlier results are
    replaced. Any other folder that is not empty is refused.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(os.path.expanduser(path))

    def __enter__(self) -> "Folder":
        if os.path.exists(self.path) and not self.path.is_dir():
            raise BadInput(f"--out {self.path}: is a file")
        try:
            if os.path.isdir(self.path) and any(self.path.iterdir()) and not (self.path / FILE).is_file():
                raise BadInput(f"--out {self.path}: holds something else than earlier results; name another folder")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._staging = staging_folder(self.path)
        except BadInput:
            raise
        except OSError as error:
            raise BadInput(f"--out {self.path}: can't be written: {error.strerror or error}") from None
        except ValueError as error:  # a name that no file can have
            raise BadInput(f"--out {str(self.path)!r}: can't be written: {error}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)

    def publish(
        self, experiment: Any, histories: Sequence[Any], seconds_before: Mapping[str, float] | None = None
    ) -> None:
        """Write the results and rename the folder into place.

        Parameters
        ----------
        experiment, histories : Experiment, Sequence[History]
            The run and its strategies.
        seconds_before : Mapping[str, float] | None (default: None)
            Seconds before the first strategy began, by part.
        """
        from simulations import figures

        found = summary(experiment, histories) | {"seconds-before": dict(seconds_before or {})}
        text = json.dumps(_plain(found), indent=1, allow_nan=False)
        (self._staging / FILE).write_text(text + "\n", encoding="utf-8")
        figures.draw_comparison(experiment, histories, self._staging / "comparison.png")
        figures.draw_updates(experiment, histories, self._staging / "updates.png")
        if experiment.shares:  # empty with --partition own
            figures.draw_partition(experiment, self._staging / "partition.png")
        for history in histories:
            save_model(experiment.options, experiment.model, history.state, self._staging / folder_name(history.label))
            for client, state in history.client_states.items():
                model = experiment.client_model(client)
                save_model(experiment.options, model, state, client_folder(self._staging, history.label, client))
        publish(self._staging, self.path)


def write_page(folder: Path) -> str:
    """Write the report page, and return a line with its path, or with the reason where it can't be written.

    A failure is no error: the results of a long run are kept.
    """
    try:
        return f"Report in {write_report([folder], folder / PAGE)}"
    except BadInput as error:
        return f"No report: {error}"


def client_folder(run: Path, label: str, client: int) -> Path:
    """Return the folder in which `--save-clients` saves a client's adapter of a strategy's last round."""
    return run / f"{folder_name(label)}-clients" / f"client-{client}"


def save_model(options: Options, model: Any, state: Mapping[str, Any], folder: Path) -> None:
    """Write a state as a PEFT adapter, or for full fine-tuning as a checkpoint.

    Parameters
    ----------
    options : Options
        `full` tells which of the two.
    model : nn.Module
        A model of these options and the state's rank. The state is loaded into it.
    state : Mapping[str, Tensor]
        From `models.trained_state`.
    folder : Path
        A new folder.
    """
    from safetensors.torch import save_file

    from simulations import models

    folder.mkdir(parents=True)
    models.load_trained_state(model, state)
    model = model.cpu()
    if options.full:
        weights = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        model.config.to_json_file(folder / "config.json")
        return
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def load_model(folder: str | Path, strategy: str) -> Any:
    """Return the final model of a strategy from a results folder, on the base model of its run.

    Parameters
    ----------
    folder : str | Path
        A results folder.
    strategy : str
        The strategy's label, as in `--strategies`.

    Raises
    ------
    BadInput
        The folder has no results of this strategy, or the base model is missing.
    """
    try:
        found = json.loads((Path(folder) / FILE).read_text(encoding="utf-8"))
        options, names = Options.from_mapping(found["options"]), found["tasks"][0]["labels"]
        weights = Path(folder) / folder_name(strategy)  # a path in the file could lead anywhere
        found["strategies"][strategy]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{folder}: no results of strategy {strategy} ({type(error).__name__}: {error})") from None
    return load_weights(options, len(names), weights)


def load_weights(options: Options, labels: int, weights: Path) -> Any:
    """Return the model of a folder with a PEFT adapter or a checkpoint, on the base model of a run.

    Parameters
    ----------
    options : Options
        The run's.
    labels : int
        Number of classes of its tasks, 0 for regression.
    weights : Path
        Weights that a run saved, or a merge of such weights, at any rank.

    Raises
    ------
    BadInput
        The folder holds no weights of the run's kind, or weights of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from simulations import models

    name = "model.safetensors" if options.full else "adapter_model.safetensors"
    if not (weights / name).is_file():  # PEFT would look for a pickle
        raise BadInput(f"{weights}: expected {name}, found none")
    base = models.base_model(options, models.Head(labels or 1, not labels))
    try:
        if options.full:
            base.load_state_dict(load_file(weights / name))
            return base
        from peft import PeftModel

        return PeftModel.from_pretrained(base, str(weights))
    except (SafetensorError, OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
        raise BadInput(f"{weights}: expected weights of the run's model, found {_line(error)}") from None


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def summary(experiment: Any, histories: Sequence[Any]) -> dict[str, Any]:
    """Return the content of results.json as plain JSON types."""
    options = experiment.options
    return {
        "format": FORMAT,
        "options": options.to_dict(),
        "versions": {**{name: _version(name) for name in PACKAGES}, "python": platform.python_version()},
        "tasks": [
            {
                "name": task.name,
                "source": task.source,
                "metric": task.metric,
                "labels": list(task.label_names),
                "training-examples": len(task.train) if experiment.shares else None,
                "held-out-examples": len(task.held_out),
                "constant-answer": task.baseline,
            }
            for task in experiment.tasks
        ],
        "metric": experiment.metric,
        "constant-answer": experiment.baseline,
        "target": experiment.target,
        "partition": [
            {
                "client": client,
                "task": share.task.name,
                "examples": len(share.examples),
                "labels": share.label_counts,
                "rank": None if options.full else options.client_rank(client),
            }
            for client, share in enumerate(experiment.shares)
        ],
        "strategies": {
            history.label: {"folder": folder_name(history.label), **history.to_dict(experiment.target)}
            for history in histories
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    """Return the value in JSON's types. NaN and infinity, which JSON lacks, become text."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(entry) for entry in (sorted(value) if isinstance(value, set) else value)]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
