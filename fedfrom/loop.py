"""The loop over a run's rounds: training, evaluation, checkpoints, and resuming from a checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from fedfrom.checkpoint import Checkpoint, Checkpoints
from fedfrom.fingerprint import run_settings
from fedfrom.random_states import random_states, set_random_states
from fedfrom.rounds import RoundReport
from fedfrom.skipped import Skipped
from fedfrom.wire.digests import digests
from fedfrom.wire.pulling import send_and_receive

log = logging.getLogger("flwr")  # where Flower's own strategies log


class RoundLoop(FedAvg):
    """FedAvg with a loop of its own, which pulls replies one by one, and resumes a killed run from its checkpoint.

    `begin`, `state` and `restore` say what is carried from round to round. A subclass that carries more extends them.

    Attributes
    ----------
    reports : dict[int, RoundReport]
        The report of each training round, by round.
    checkpoint : str | Path | None
        Folder of the run's checkpoints.
    checkpoints_kept : int
        Number of newest checkpoints that stay.
    max_skipped : int | None
        Number of rounds in a row, all of whose replies were rejected, that ends the run.
    on_round : Callable[[RoundReport], object] | None
        Called with each round's report.
    """

    reports: dict[int, RoundReport]
    checkpoint: str | Path | None
    checkpoints_kept: int
    max_skipped: int | None
    on_round: Callable[[RoundReport], object] | None
    _skipped: Skipped

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds: Flower's signature, and a Result whose arrays are filled even where rounds are skipped.

        With `checkpoint`, a round is whole once its server evaluation is over and its checkpoint is on the disk; round
        0 is the evaluation before the first round. If the run is killed at any instant, the next run with that folder
        resumes after the last whole round, and does not repeat its evaluation. The run resumes with the arrays,
        metrics, reports and random states (of Python, NumPy and torch, which it sets) of that round, so that clients
        that depend on these alone bring it to the same arrays, to the bit. Clients save their own state themselves.

        A resumed run takes only the expected keys, shapes and dtypes from `initial_arrays`; a warning says where its
        numbers are not those that the run started from. Its num_rounds, timeout and max_skipped may differ, as may the
        other settings that change no number; the rest may not, except functions, which can't be compared. Where all
        rounds are done, a log line says so and the result is returned at once. The folder is locked during the run.

        A checkpoint that can't be written before training starts ends the run. Later that is logged as an error, the
        last checkpoint stays, and training goes on: the next round tries again.

        Parameters
        ----------
        grid : Grid
            Sends messages to the nodes.
        initial_arrays : ArrayRecord
            The global adapter's or model's arrays.
        num_rounds : int (default: 3)
            Number of rounds.
        timeout : float (default: 3600)
            Seconds to wait for the replies of a round.
        train_config, evaluate_config : ConfigRecord | None (default: None)
            Sent to the clients; "server-round" is added.
        evaluate_fn : Callable[[int, ArrayRecord], MetricRecord | None] | None (default: None)
            Evaluates the global arrays on the server, before the first round (round 0) and after each.

        Returns
        -------
        Result
            The final arrays, and the metrics of all rounds, those before a resume included.

        Raises
        ------
        ValueError
            No reply to the initial arrays could be merged. Or the checkpoint is damaged, belongs to a run with other
            settings, or has more than num_rounds rounds; or its folder is in use or holds other files: see
            `fedfrom.checkpoint.Checkpoints`.
        OSError
            The checkpoint can't be written before training starts.
        RuntimeError
            Too few nodes connected within `node_timeout`; or all replies of `max_skipped` rounds in a row were
            rejected; or replies or errors came, and no round merged anything. With `checkpoint`, the same command
            repeats the last round.
        """
        megabytes = sum(len(array.data) for array in initial_arrays.values()) / 2**20
        log.info("Starting %s strategy: %d rounds, %.2f MB of arrays", type(self).__name__, num_rounds, megabytes)
        self.summary()
        train_config = ConfigRecord() if train_config is None else train_config
        evaluate_config = ConfigRecord() if evaluate_config is None else evaluate_config
        result = Result(arrays=initial_arrays)
        self.begin()
        start, done = time.perf_counter(), -1
        with ExitStack() as stack:
            checkpoints = None
            if self.checkpoint is not None:
                settings = run_settings(self, initial_arrays, train_config, evaluate_config)
                checkpoints = stack.enter_context(
                    Checkpoints(self.checkpoint, self.checkpoints_kept, settings, digests(initial_arrays))
                )
                if (saved := self._resume(checkpoints, num_rounds)) is not None:
                    result, done = saved.result, saved.server_round
            if done == num_rounds:
                self._skipped.check(None, is_last=True)
            for server_round in range(done + 1, num_rounds + 1):
                if server_round > 0:
                    log.info("")
                    log.info("[ROUND %d/%d]", server_round, num_rounds)
                    self._train_and_evaluate(server_round, result, grid, timeout, train_config, evaluate_config)
                self._evaluate_on_server(server_round, result, evaluate_fn)
                self._tell(server_round, result)
                # before the checkpoint: a run that is started again, with corrected clients, repeats this round
                self._skipped.check(self.max_skipped, server_round == num_rounds)
                if checkpoints is not None:
                    self._save(checkpoints, server_round, result)
        log.info("")
        log.info("Strategy execution finished in %.2fs", time.perf_counter() - start)
        log.info("")
        log.info("Final results:")
        for line in str(result).splitlines():
            log.info("\t%s", line)
        return result

    def _train_and_evaluate(
        self,
        server_round: int,
        result: Result,
        grid: Grid,
        timeout: float,
        train_config: ConfigRecord,
        evaluate_config: ConfigRecord,
    ) -> None:
        """Let the clients train, then evaluate, and put the new arrays and metrics into `result`."""
        messages = self.configure_train(server_round, result.arrays, train_config, grid)
        replies = send_and_receive(grid, messages, timeout) if messages else []
        arrays, metrics = self.aggregate_train(server_round, replies)
        if arrays is not None:
            result.arrays = arrays
        if metrics is not None:
            self._log_training(server_round, metrics)
            result.train_metrics_clientapp[server_round] = metrics

        messages = self.configure_evaluate(server_round, result.arrays, evaluate_config, grid)
        replies = send_and_receive(grid, messages, timeout) if messages else []
        metrics = self.aggregate_evaluate(server_round, replies)
        if metrics is not None:
            log.info("\t└──> Evaluation: %s", _rounded(metrics))
            result.evaluate_metrics_clientapp[server_round] = metrics

    def _log_training(self, server_round: int, metrics: MetricRecord) -> None:
        """Log the round's line and the clients' own metrics; all of them in full at debug level."""
        own = dict(metrics)
        if (report := self.reports.get(server_round)) is not None:
            log.info("\t└──> Merge: %s", report.line())
            figures = report.metrics()
            own = {name: value for name, value in own.items() if name not in figures}
        if own:
            log.info("\t└──> Training: %s", _rounded(own))
        log.debug("\t└──> Aggregated MetricRecord: %s", metrics)

    def _evaluate_on_server(
        self,
        server_round: int,
        result: Result,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None,
    ) -> None:
        if evaluate_fn is None:
            return
        metrics = evaluate_fn(server_round, result.arrays)
        log.info("Global evaluation, round %d: %s", server_round, None if metrics is None else _rounded(metrics))
        if metrics is not None:
            result.evaluate_metrics_serverapp[server_round] = metrics

    def _tell(self, server_round: int, result: Result) -> None:
        """Add the round's metrics to its report, and call `on_round` with the report."""
        if (report := self.reports.get(server_round)) is None:
            return
        found = {
            "train": result.train_metrics_clientapp,
            "evaluate": result.evaluate_metrics_clientapp,
            "server": result.evaluate_metrics_serverapp,
        }
        scores = {kind: dict(rounds[server_round]) for kind, rounds in found.items() if server_round in rounds}
        self.reports[server_round] = report = replace(report, scores=scores)
        if self.on_round is not None:
            try:
                self.on_round(report)
            except Exception:
                log.exception("on_round: round %d: training goes on", server_round)

    # --- What is carried from round to round --------------------------------------------------------------------------

    def begin(self) -> None:
        """Forget what was carried from an earlier run."""
        self.reports, self._skipped = {}, Skipped()

    def state(self) -> dict[str, Any]:
        """Return what is carried from round to round, as plain data with str keys: part of a checkpoint."""
        reports = {str(server_round): report.to_dict() for server_round, report in self.reports.items()}
        return {"reports": reports, "skipped": self._skipped.to_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned when the checkpoint was written."""
        self.reports = {int(number): RoundReport.from_dict(report) for number, report in state["reports"].items()}
        self._skipped = Skipped.from_dict(state.get("skipped", Skipped().to_dict()))

    # --- Checkpoints -------------------------------------------------------------------------------------------------

    def _resume(self, checkpoints: Checkpoints, num_rounds: int) -> Checkpoint | None:
        """Return the checkpoint to resume from, with the strategy's state restored; None where there is none."""
        saved = checkpoints.newest()
        if saved is None:
            return None
        if saved.server_round > num_rounds:
            raise ValueError(
                f"num_rounds: expected {saved.server_round} or more, the rounds that the checkpoint in "
                f"{checkpoints.path} has completed, found {num_rounds}"
            )
        if saved.server_round < num_rounds:
            checkpoints.rehearse(saved)
        self.restore(saved.state)
        set_random_states(saved.random)
        if saved.server_round < num_rounds:
            log.info("Going on after round %d, from the checkpoint in %s", saved.server_round, checkpoints.path)
        else:
            log.info(
                "Nothing is left to do: the checkpoint in %s has all %d rounds, which are returned as they are; raise "
                "num_rounds to go on, or give another folder to start anew",
                checkpoints.path,
                num_rounds,
            )
        return saved

    def _save(self, checkpoints: Checkpoints, server_round: int, result: Result) -> None:
        try:
            checkpoints.save(Checkpoint(server_round, result, self.state(), random_states()))
        except OSError as error:
            if server_round == 0:
                raise
            log.error("checkpoint of round %d: %s; training goes on, the one before stays", server_round, error)


def _rounded(metrics: Mapping[str, Any]) -> str:
    """Return metrics as text, numbers with four digits."""
    return ", ".join(f"{k}: {v:.4g}" if isinstance(v, float) else f"{k}: {v}" for k, v in metrics.items())
