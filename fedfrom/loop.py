"""The loop over a run's rounds: training, evaluation, waiting for replies, checkpoints, and going on from one."""

from __future__ import annotations

import inspect
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
from fedfrom.random_states import random_states, set_random_states
from fedfrom.rounds import RoundReport
from fedfrom.settings import RUN
from fedfrom.skipped import Skipped
from fedfrom.wire.digests import digests
from fedfrom.wire.pulling import send_and_receive

log = logging.getLogger("flwr")  # where Flower's own strategies log


class RoundLoop(FedAvg):
    """FedAvg with a loop of its own, which pulls replies one by one and can be killed and go on.

    A strategy that is one says what it carries from round to round: `begin`, `state` and `restore`.

    Attributes
    ----------
    reports : dict[int, RoundReport]
        What each training round's merge did, by round.
    checkpoint : str | Path | None
        The run's folder.
    checkpoints_kept : int
        How many of the newest checkpoints stay.
    max_skipped : int | None
        After how many rounds in a row whose replies were all rejected the run ends.
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

        With `checkpoint`, a round is whole once its server evaluation is over and its checkpoint has got its name; so
        is round 0, the evaluation before the first round. Killed at any instant, the next run with that folder goes on
        after the last whole round, whose evaluation it does not repeat: with the arrays, metrics, reports and random
        states (of Python, NumPy and torch, which it sets) of then, so that clients that depend on these alone bring it
        to the same arrays, to the bit. What clients keep is theirs to save. `initial_arrays` then only says what keys,
        shapes and dtypes to expect, and where its numbers are not those that the run started from, a warning says that
        they are not used; num_rounds, timeout and max_skipped may differ, other settings may not (functions can't be
        compared). Where all rounds are done, it says so and returns at once. The folder is locked meanwhile.

        A checkpoint that can't be written ends the run before training starts. From then on it is logged as an error,
        the one before stays, and training goes on: the next round tries again.

        Parameters
        ----------
        grid : Grid
            What sends messages to the nodes.
        initial_arrays : ArrayRecord
            The global adapter's or model's arrays.
        num_rounds : int (default: 3)
            How many rounds.
        timeout : float (default: 3600)
            Seconds to wait for the replies of a round.
        train_config, evaluate_config : ConfigRecord | None (default: None)
            Sent to the clients; "server-round" is added.
        evaluate_fn : Callable[[int, ArrayRecord], MetricRecord | None] | None (default: None)
            Evaluates the global arrays on the server, before the first round (round 0) and after each.

        Returns
        -------
        Result
            The final arrays and the metrics of all rounds, those before a resume too.

        Raises
        ------
        ValueError
            No reply to the initial arrays could be merged; or the checkpoint is damaged, of a run with other settings
            or of more than num_rounds rounds, or its folder is in use or holds something else: see
            `fedfrom.checkpoint.Checkpoints`.
        OSError
            Before training: the checkpoint can't be written.
        RuntimeError
            Too few nodes came in `node_timeout`; or all replies of `max_skipped` rounds in a row were rejected, or
            replies or errors came and no round merged anything. With `checkpoint` the same command repeats the last
            round.
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
                settings = self._settings(initial_arrays, train_config, evaluate_config)
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
                # before the round is whole: a run that is started again, with clients put right, repeats it
                self._skipped.check(self.max_skipped, server_round == num_rounds)
                if checkpoints is not None:
                    self._save(checkpoints, server_round, result)
        log.info("")
        log.info("Strategy execution finished in %.2fs", time.perf_counter() - start)
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
        """Let the clients train, then evaluate, and put into `result` what came of it."""
        messages = self.configure_train(server_round, result.arrays, train_config, grid)
        replies = send_and_receive(grid, messages, timeout) if messages else []
        arrays, metrics = self.aggregate_train(server_round, replies)
        if arrays is not None:
            result.arrays = arrays
        if metrics is not None:
            log.info("\t└──> Aggregated MetricRecord: %s", metrics)
            result.train_metrics_clientapp[server_round] = metrics

        messages = self.configure_evaluate(server_round, result.arrays, evaluate_config, grid)
        replies = send_and_receive(grid, messages, timeout) if messages else []
        metrics = self.aggregate_evaluate(server_round, replies)
        if metrics is not None:
            log.info("\t└──> Aggregated MetricRecord: %s", metrics)
            result.evaluate_metrics_clientapp[server_round] = metrics

    def _evaluate_on_server(
        self,
        server_round: int,
        result: Result,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None,
    ) -> None:
        if evaluate_fn is None:
            return
        metrics = evaluate_fn(server_round, result.arrays)
        log.info("Global evaluation, round %d: %s", server_round, metrics)
        if metrics is not None:
            result.evaluate_metrics_serverapp[server_round] = metrics

    def _tell(self, server_round: int, result: Result) -> None:
        """Put what the round scored into its report, and hand that to `on_round`."""
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

    def _settings(
        self, initial_arrays: ArrayRecord, train_config: ConfigRecord, evaluate_config: ConfigRecord
    ) -> dict[str, Any]:
        """Return what a resumed run must share with the one before: the constructors' arguments, arrays and configs."""
        inits = [vars(kind)["__init__"] for kind in type(self).__mro__ if "__init__" in vars(kind)]
        names = {name for init in inits for name in inspect.signature(init).parameters}
        arguments = {name: getattr(self, name) for name in sorted(names - RUN) if hasattr(self, name)}
        if arguments.get("lora_config") is not None:  # who wrote it is no setting
            arguments["lora_config"] = {k: v for k, v in arguments["lora_config"].items() if k != "peft_version"}
        configs = {"train_config": train_config, "evaluate_config": evaluate_config}
        sent = {
            name: {key: value for key, value in config.items() if key != "server-round"}
            for name, config in configs.items()
        }
        arrays = {key: f"{array.dtype} {tuple(array.shape)}" for key, array in initial_arrays.items()}
        return {"strategy": type(self).__name__, **arguments, **sent, "initial_arrays": arrays}

    def _resume(self, checkpoints: Checkpoints, num_rounds: int) -> Checkpoint | None:
        """Return the checkpoint to go on from and become what the strategy was then; None where there is none."""
        saved = checkpoints.newest()
        if saved is None:
            return None
        if saved.server_round > num_rounds:
            raise ValueError(
                f"num_rounds: expected {saved.server_round} or more, the rounds that the checkpoint in "
                f"{checkpoints.path} has behind it, found {num_rounds}"
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
