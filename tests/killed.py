"""Runs that are killed: `python -m tests.killed FOLDER …` forks them from one process that has imported everything.

Each run is a process of its own: a server with its clients on the in-process Grid, a checkpoint after every round. It
is killed by SIGKILL, at a random instant or just before one of its steps on the disk, and started again with the same
folder. One line of JSON says what came of each.
"""

import argparse
import hashlib
import json
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.serverapp.strategy import Result

from fedfrom import FedFroM
from tests.inprocess import InProcessGrid
from tests.models import arrays_of, mixed_state, noisy, record_of

Step = Callable[[], None]
STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def drawing(message: Message, context: Context) -> Message:
    """Answer as `noisy`, with noise from the global generators too: what a run's own seed can't bring back."""
    reply = noisy(message, context)
    if message.metadata.message_type == "train":
        noise = random.random() + np.random.random() + float(torch.rand(1, dtype=torch.float64))  # noqa: NPY002
        moved = arrays_of(reply.content["arrays"])
        moved = {key: value + noise if value.dtype.kind == "f" else value for key, value in moved.items()}
        reply.content["arrays"] = record_of({key: moved[key].astype(moved[key].dtype) for key in moved})
    return reply


def score(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Return a number that tells one model from another."""
    return MetricRecord({"sum": sum(float(array.numpy().astype(np.float64).sum()) for array in arrays.values())})


def evaluated(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Return the score, and a number that the global generator drew."""
    return MetricRecord({**score(server_round, arrays), "drawn": random.random()})


def run(
    folder: Path | None,
    rounds: int,
    evaluate_fn: Callable[[int, ArrayRecord], MetricRecord] = evaluated,
    grid: type[InProcessGrid] = InProcessGrid,
    **options: Any,
) -> tuple[FedFroM, Result]:
    """Run or resume, seeded as scripts are: at their start, wherever a checkpoint then goes on."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    strategy = FedFroM(checkpoint=folder, fraction_train=0.5, **options)
    arrays = record_of(mixed_state() | {"wide": np.ones((64, 128), np.float32)})
    return strategy, strategy.start(grid(drawing, 4), arrays, num_rounds=rounds, evaluate_fn=evaluate_fn)


def outcome(strategy: FedFroM, result: Result) -> dict[str, Any]:
    """Return all that two runs must have in common, as plain data: not times, nor node ids, which are chance."""
    arrays = [[key, a.dtype, list(a.shape), hashlib.sha256(a.data).hexdigest()] for key, a in result.arrays.items()]
    metrics = {
        name: {number: dict(record) for number, record in rounds.items()}
        for name, rounds in vars(result).items()
        if name != "arrays"
    }
    for record in metrics["train_metrics_clientapp"].values():
        del record["merge-seconds"]
    reports = {number: report.merge.to_dict()["layers"] for number, report in strategy.reports.items()}
    return json.loads(json.dumps({"arrays": arrays, "metrics": metrics, "reports": reports}))


def fork(work: Step) -> int:
    """Return the id of a child process that does the work and then ends without ado."""
    process = os.fork()
    if process == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return process


def was_killed(process: int) -> bool:
    """Wait for a child and return whether SIGKILL ended it; raise where it failed."""
    status = os.waitpid(process, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    if os.WEXITSTATUS(status) != 0:
        raise RuntimeError("a run failed; see above")
    return False


def kill_before(step: int, folder: Path) -> None:
    """Have this process kill itself just before its n-th step, from 0, on what is in the folder."""
    left = step

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        if event in STEPS and str(folder) in str(arguments[0]):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(hook)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.killed")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--instants", type=int, default=0, help="kill at so many random instants")
    parser.add_argument("--every", type=int, default=0, help="kill before every so-manieth step on the disk")
    arguments = parser.parse_args()
    rounds, folder = arguments.rounds, arguments.folder
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)

    def finished(path: Path | None, out: Path) -> dict[str, Any]:
        assert not was_killed(fork(lambda: out.write_text(json.dumps(outcome(*run(path, rounds))))))
        return json.loads(out.read_text())

    def report(path: Path, **more: Any) -> None:
        names = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
        same = finished(path, folder / "out.json") == expected
        print(json.dumps({"same": same, "left": names, **more}), flush=True)

    expected = finished(None, folder / "expected.json")
    assert len(expected["reports"]) == rounds
    start = time.perf_counter()
    assert finished(folder / "whole", folder / "out.json") == expected, "checkpoints change the run"
    seconds = time.perf_counter() - start

    draw = random.Random(0)
    killed = tries = 0
    while killed < arguments.instants:
        path = folder / f"instant-{tries}"
        process = fork(lambda path=path: run(path, rounds) and None)
        time.sleep(draw.uniform(0, seconds))
        os.kill(process, signal.SIGKILL)  # not yet waited for, so the id is still its own
        if was_killed(process):
            killed += 1
            report(path, instant=killed)
        tries += 1
        assert tries < 10 * arguments.instants + 10, "runs end before they are killed"

    step = 0
    while arguments.every:
        path = folder / f"step-{step}"
        process = fork(lambda path=path, step=step: (kill_before(step, path), run(path, rounds, checkpoints_kept=1))[0])
        if not was_killed(process):
            break
        report(path, step=step)
        step += arguments.every


if __name__ == "__main__":
    main()
