"""The local engine: its Grid over a pool of processes, faults as on a deployment, and the same results as Ray's."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from rich.console import Console

from fedfrom import FedFroM
from simulations import client_app
from simulations.engines.grid import LocalGrid
from simulations.engines.jobs import Job
from simulations.engines.workers import InTurn, Pool
from simulations.experiment import Experiment
from simulations.history import History
from simulations.narration import Narrator
from simulations.options import Options
from simulations.running import simulate
from tests.folders import same_bits
from tests.models import same_bits as same_records
from tests.simulations.pool_clients import answer, load, load_for_ever, load_nothing

TIMEOUT = 5.0


@pytest.fixture
def pool() -> Iterator[Pool]:
    with closing(Pool(load, 2, TIMEOUT)) as workers:
        yield workers


def ask(grid: LocalGrid, **faults: str) -> dict[int, Message]:
    """Send every node one message, and return the replies by partition; `fault_0="die"` asks it of partition 0."""
    config = ConfigRecord({name.replace("_", "-"): fault for name, fault in faults.items()})
    content = RecordDict({"arrays": ArrayRecord([np.zeros(3, np.float32)]), "config": config})
    replies = grid.send_and_receive([Message(content, node, "train") for node in grid.partition_of], timeout=120)
    return {grid.partition_of[reply.metadata.src_node_id]: reply for reply in replies}


def processes(replies: dict[int, Message]) -> set[int]:
    return {int(reply.content["metrics"]["process"]) for reply in replies.values() if reply.has_content()}


def test_clients_run_in_processes_that_stay(pool: Pool) -> None:
    grid = LocalGrid(pool, 5)
    first, second = ask(grid), ask(grid)
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4]
    for client, reply in first.items():
        assert reply.content["arrays"].to_numpy_ndarrays()[0].tolist() == [client + 1] * 3
    assert processes(first) | processes(second) <= {child.pid for child in multiprocessing.active_children()}
    assert len(processes(first) | processes(second)) == 2
    assert all(reply.content["metrics"]["count"] == 2 for reply in second.values())


def test_a_client_that_raises_dies_or_hangs_gives_an_error_reply_and_its_process_is_replaced(pool: Pool) -> None:
    grid = LocalGrid(pool, 5)
    before = processes(ask(grid))
    replies = ask(grid, fault_0="raise", fault_1="die", fault_3="hang")
    assert {
        client: (reply.error.code, reply.error.reason) for client, reply in replies.items() if reply.has_error()
    } == {
        0: (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "RuntimeError: out of memory"),
        1: (ErrorCode.CLIENT_APP_CRASHED, "the client's process ended with exit code 7"),
        3: (ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "the client did not reply within 5 s"),
    }
    after = ask(grid)
    assert {client: reply.content["metrics"]["count"] for client, reply in after.items()} == {
        0: 2,
        1: 2,
        2: 3,
        3: 2,
        4: 3,
    }
    gone = before - {child.pid for child in multiprocessing.active_children()}
    assert len(gone) >= 1 and not processes(after) & gone


def test_a_round_goes_on_without_the_clients_that_fail(pool: Pool) -> None:
    initial, config = ArrayRecord({"w": Array(np.ones(4, np.float32))}), {"fault-0": "raise", "fault-2": "die"}

    def merged(faults: dict[str, str], workers: Pool | InTurn, silent: set[int] = frozenset()) -> tuple:
        strategy = FedFroM(fraction_evaluate=0.0)
        grid = LocalGrid(workers, 4)
        result = strategy.start(grid, initial, num_rounds=2, train_config=ConfigRecord(faults), timeout=60)
        return result.arrays, [report.failed for report in strategy.reports.values()]

    arrays, failures = merged(config, pool)
    assert [len(each) for each in failures] == [2, 2]

    def without(message: Message, context) -> Message:
        if context.node_config["partition-id"] in (0, 2):
            raise RuntimeError("gone")
        return answer(message, context)

    assert same_records(arrays, merged({}, InTurn(without))[0])


def test_a_process_that_dies_while_it_is_free_costs_no_client_a_round(pool: Pool) -> None:
    grid = LocalGrid(pool, 3)
    before = processes(ask(grid))
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.5)
    replies = ask(grid)
    assert not any(reply.has_error() for reply in replies.values()) and not processes(replies) & before


def test_a_large_message_does_not_wait_for_a_process_that_hangs_while_it_loads() -> None:
    with closing(Pool(load_for_ever, 1, 2.0)) as workers:
        grid = LocalGrid(workers, 1)
        content = RecordDict({"arrays": ArrayRecord([np.zeros(5_000_000, np.float32)]), "config": ConfigRecord()})
        (reply,) = grid.send_and_receive([Message(content, node, "train") for node in grid.partition_of], timeout=60)
    assert reply.error.code == ErrorCode.REPLY_MESSAGE_UNAVAILABLE


def test_every_process_that_cannot_load_its_client_says_why() -> None:
    with closing(Pool(load_nothing, 2, TIMEOUT)) as workers:
        replies = ask(LocalGrid(workers, 3))
    assert {(reply.error.code, reply.error.reason) for reply in replies.values()} == {
        (ErrorCode.LOAD_CLIENT_APP_EXCEPTION, "ImportError: no such model")
    }


def test_a_closed_pool_leaves_no_process() -> None:
    before = set(multiprocessing.active_children())
    workers = Pool(load, 2, TIMEOUT)
    grid = LocalGrid(workers, 2)
    content = RecordDict({"arrays": ArrayRecord([np.zeros(3)]), "config": ConfigRecord({"fault-0": "hang"})})
    grid.push_messages([Message(content, node, "train") for node in grid.partition_of])
    time.sleep(0.5)
    workers.close()
    assert set(multiprocessing.active_children()) == before


def test_messages_of_one_content_share_its_bytes() -> None:
    """Waiting messages take the memory of one, whatever the number of clients."""
    jobs: list[Job] = []

    class Waiting(InTurn):
        def submit(self, job: Job) -> None:
            jobs.append(job)

    grid = LocalGrid(Waiting(answer), 100)
    contents = [RecordDict({"arrays": ArrayRecord([np.zeros(1000)])}) for _ in range(2)]
    grid.push_messages([Message(contents[i % 2], node, "train") for i, node in enumerate(grid.partition_of)])
    assert len(jobs) == 100 and len({id(job.content) for job in jobs}) == 2
    assert max(len(job.envelope) for job in jobs) < 500 < 8000 < len(jobs[0].content)


def histories(tiny: dict, engine: str, **more: object) -> list[History]:
    client_app._workers.clear()
    out = Path(tiny["out"])
    options = Options.from_mapping({**tiny, "engine": engine, "processes": 2, "out": f"{out}-{engine}", **more})
    narrator = Narrator(Console(quiet=True))
    return simulate(Experiment.prepare(options), narrator)


@pytest.mark.slow
@pytest.mark.simulation
@pytest.mark.parametrize(
    "more",
    [
        {"strategies": "from,fedavg,from:k=1:fraction_train=0.5", "lora_dropout": 0.1, "federated_evaluation": True},
        {"strategies": "from", "ranks": "2,4,8", "task": "qnli,rte,wnli", "partition": "tasks"},
        {"strategies": "from,regmean", "full": True},
    ],
    ids=["lora", "unequal ranks", "full"],
)
def test_the_local_engine_gives_what_a_simulation_on_ray_gives(tiny: dict, more: dict) -> None:
    assert_same(histories(tiny, "local", **more), histories(tiny, "ray", **more))


def assert_same(ours: list[History], theirs: list[History]) -> None:
    for one, two in zip(ours, theirs, strict=True):
        assert one.label == two.label and same_bits(one.state, two.state)
        for mine, other in zip(one.rounds, two.rounds, strict=True):
            assert mine.scores == other.scores and mine.weights == other.weights
            assert (mine.bytes_up, mine.bytes_down) == (other.bytes_up, other.bytes_down)
            assert {client: numbers["loss"] for client, numbers in mine.clients.items()} == {
                client: numbers["loss"] for client, numbers in other.clients.items()
            }
            assert mine.distance_from_mean == other.distance_from_mean
