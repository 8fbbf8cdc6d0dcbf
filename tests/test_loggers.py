"""Loggers for `on_round=`: each writes every round's numbers where its own package reads them."""

import builtins
import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import MetricRecord

from fedfrom import FedFroM, loggers
from tests.inprocess import InProcessGrid
from tests.models import mixed_state, noisy, record_of


def run(on_round: Any, rounds: int = 2, **settings: Any) -> FedFroM:
    strategy = FedFroM(on_round=on_round, **settings)
    strategy.start(
        InProcessGrid(noisy, 3),
        record_of(mixed_state(dtype=np.float64)),
        num_rounds=rounds,
        evaluate_fn=lambda server_round, arrays: MetricRecord({"accuracy": server_round / 10}),
    )
    return strategy


def test_a_table_has_a_line_a_round_and_goes_on_with_the_run(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "rounds.csv"
    run(loggers.CSV(path), checkpoint=tmp_path / "checkpoint")
    strategy = run(loggers.CSV(path), 3, checkpoint=tmp_path / "checkpoint")
    rows = list(csv.DictReader(path.open()))
    assert [row["round"] for row in rows] == ["1", "2", "3"]
    for row in rows:
        numbers = strategy.reports[int(row["round"])].numbers()
        assert {name: float(row[name]) for name in numbers} == numbers and row.keys() - {"round"} == numbers.keys()


def test_a_table_takes_new_columns_replaces_a_round_and_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "rounds.csv"
    path.write_text("round,train/loss\n1,0.5\n2,0.25\n")
    strategy = run(lambda report: None, 2)
    loggers.CSV(path)(strategy.reports[2])
    first, second = csv.DictReader(path.open())
    assert first["train/loss"] == "0.5" and first["server/accuracy"] == ""
    assert float(second["train/loss"]) == strategy.reports[2].numbers()["train/loss"]
    path.write_text("name,age\nann,3\n")
    with pytest.raises(ValueError, match=r"rounds\.csv: expected a table of rounds with a column 'round'"):
        loggers.CSV(path)
    assert path.read_text() == "name,age\nann,3\n"


@pytest.mark.parametrize("layers", [False, True])
def test_tensorboard_reads_every_number(layers: bool, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    strategy = run(loggers.TensorBoard(tmp_path, layers=layers))
    read = events.EventAccumulator(str(tmp_path)).Reload()
    for server_round, report in strategy.reports.items():
        for name, value in report.numbers().items():
            assert read.Scalars(name)[server_round - 1].value == pytest.approx(value, rel=1e-6)
    weights = [tag for tag in read.Tags()["scalars"] if tag.startswith("weights/")]
    merged = strategy.reports[1].merge
    weighed = [layer for layer in merged.layers if layer.weights] if merged else []
    assert weighed and len(weights) == (3 * len(weighed) if layers else 0)


def test_weights_and_biases_keeps_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = loggers.WandB(project="rounds", mode="offline", dir=str(tmp_path))
    strategy = run(logger)
    assert loggers.WandB().run is wandb.run  # the open one
    summary = {name: logger.run.summary[name] for name in strategy.reports[2].numbers()}
    assert summary == strategy.reports[2].numbers()
    wandb.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_mlflow_has_every_number_at_its_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # its databases need more than mlflow-skinny
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    logger = loggers.MLflow(run_name="rounds")
    strategy = run(logger)
    mlflow.end_run()
    client = mlflow.MlflowClient()
    for name in strategy.reports[1].numbers():
        found = {entry.step: entry.value for entry in client.get_metric_history(logger.run.info.run_id, name)}
        assert found == {number: report.numbers()[name] for number, report in strategy.reports.items()}


def test_a_missing_package_is_said_before_the_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__
    monkeypatch.setattr(loggers, "import_module", lambda name: real(f"no_{name}"))
    with pytest.raises(ImportError, match="expected the package wandb, found none: pip install wandb"):
        loggers.WandB()


def test_several_loggers_hear_each_round(tmp_path: Path) -> None:
    heard: list[int] = []
    run(loggers.several(loggers.CSV(tmp_path / "a.csv"), lambda report: heard.append(report.server_round)))
    assert heard == [1, 2] and len((tmp_path / "a.csv").read_text().splitlines()) == 3
