"""Functions for `on_round=` that write each round's numbers where experiments are compared.

Each takes a round's report, `FedFroM(on_round=CSV("rounds.csv"))`, and imports its package when it is made, so that a
missing package is an error before the first round. The numbers are those of `RoundReport.numbers`: "train/loss",
"server/accuracy" and the like, by round. `several` makes one function of a few.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

from fedfrom.atomic import write_whole
from fedfrom.rounds import RoundReport

__all__ = ["CSV", "MLflow", "TensorBoard", "WandB", "several"]

_ROUND = "round"


def several(*loggers: Callable[[RoundReport], object]) -> Callable[[RoundReport], None]:
    """Return one function for `on_round=` that calls each of these, also where one of them raises.

    Examples
    --------
    >>> heard = []
    >>> several(heard.append, heard.append)("report")
    >>> heard
    ['report', 'report']
    """

    def on_round(report: RoundReport) -> None:
        with ExitStack() as stack:  # which calls all, the first put in last, and raises what was raised
            for logger in reversed(loggers):
                stack.callback(logger, report)

    return on_round


class CSV:
    """A file with a line for each round and a column for each number; a number that a round lacks is empty.

    The file is written whole after each round. A run that goes on from a checkpoint adds to the file that is there, and
    a round that is repeated replaces its line: name a new file for a new run.

    Parameters
    ----------
    path : str | Path
        The file. Its folder is made where it is missing.

    Raises
    ------
    ValueError
        The file is there, and not one of this kind.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(os.path.expanduser(path))
        self._rows: dict[int, dict[str, str]] = {}
        if self.path.exists():
            rows = list(csv.DictReader(io.StringIO(self.path.read_text(encoding="utf-8"))))
            if any(not (row.get(_ROUND) or "").isdecimal() for row in rows):
                raise ValueError(
                    f"{self.path}: expected a table of rounds with a column {_ROUND!r}, found another: name a new file"
                )
            self._rows = {int(row[_ROUND]): row for row in rows}

    def __call__(self, report: RoundReport) -> None:
        """Add the round's line."""
        numbers = {name: repr(value) for name, value in report.numbers().items()}
        self._rows[report.server_round] = {_ROUND: str(report.server_round), **numbers}
        columns = dict.fromkeys(name for _, row in sorted(self._rows.items()) for name in row)
        text = io.StringIO()
        table = csv.DictWriter(text, list(columns), lineterminator="\n")
        table.writeheader()
        table.writerows(row for _, row in sorted(self._rows.items()))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, text.getvalue())


class TensorBoard:
    """Scalars in a folder that `tensorboard --logdir` shows; with `layers` each client's weight of each layer too.

    Parameters
    ----------
    folder : str | Path
        Of the event files.
    layers : bool (default: False)
        Write "weights/LAYER/NODE" too: layers times clients of them.

    Raises
    ------
    ImportError
        The package tensorboard is missing.
    """

    def __init__(self, folder: str | Path, layers: bool = False) -> None:
        self._layers = layers
        self._writer = _package("tensorboard", "torch.utils.tensorboard").SummaryWriter(str(folder))

    def __call__(self, report: RoundReport) -> None:
        """Write the round's scalars."""
        for name, value in report.numbers().items():
            self._writer.add_scalar(name, value, report.server_round)
        for layer in report.merge.layers if self._layers and report.merge is not None else []:
            for node, weight in zip(report.nodes, layer.weights, strict=False):
                self._writer.add_scalar(f"weights/{layer.name}/{node}", weight, report.server_round)
        self._writer.flush()


class WandB:
    """A run of Weights & Biases; with mode="offline" it stays on this machine until `wandb sync`.

    Parameters
    ----------
    **init
        Arguments of `wandb.init`: project, name, mode, dir and so on. Without any, a run that is already open is used.

    Raises
    ------
    ImportError
        The package wandb is missing.
    """

    def __init__(self, **init: Any) -> None:
        wandb = _package("wandb", "wandb")
        self.run = wandb.run if wandb.run is not None and not init else wandb.init(**init)

    def __call__(self, report: RoundReport) -> None:
        """Log the round's numbers at the round's step."""
        self.run.log(report.numbers(), step=report.server_round, commit=True)


class MLflow:
    """The active run of MLflow, or a new one; `mlflow.set_tracking_uri` and `set_experiment` say where.

    Parameters
    ----------
    **start
        Of `mlflow.start_run`, where none is active.

    Raises
    ------
    ImportError
        The package mlflow (or mlflow-skinny) is missing.
    """

    def __init__(self, **start: Any) -> None:
        self._mlflow = _package("mlflow-skinny", "mlflow")
        self.run = self._mlflow.active_run() or self._mlflow.start_run(**start)

    def __call__(self, report: RoundReport) -> None:
        """Log the round's numbers at the round's step."""
        numbers = report.numbers()
        self._mlflow.log_metrics(numbers, step=report.server_round, run_id=self.run.info.run_id)


def _package(package: str, module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"fedfrom.loggers: expected the package {package}, found none: pip install {package}"
        ) from error
