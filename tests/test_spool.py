"""Replies one by one, in memory or on disk: the same bits, and nothing left behind."""

import errno
import gc
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from hypothesis import given, settings
from hypothesis import strategies as st

import fedfrom.stored
import fedfrom.wire.spool
from fedfrom import FedFroM, FedMerge, FroM, merge
from fedfrom.merging.clients import Client, Round
from fedfrom.merging.linalg import blocks, norms
from fedfrom.merging.merge import merge_clients
from fedfrom.wire.pulling import LONGEST, SHORTEST, send_and_receive
from fedfrom.wire.spool import SpooledState, SpoolError
from tests.inprocess import InProcessGrid
from tests.merging.samples import DTYPES, adapter_cases, tensor_case, tensor_cases
from tests.models import arrays_of, mixed_state, noisy, record_of, same_bits

METHODS: list[dict[str, Any]] = [
    {"method": "from", "k": 0.5, "examples_power": 0.5, "clip": 1.0},
    {"method": "from", "k": 1.0, "scope": "model", "server_lr": "safe"},
    {"method": "average", "examples_power": 1.0},
    {"method": "ties", "density": 0.3},
    {"method": "ties", "scope": "model"},
    {"method": "dare-from"},
    {"method": "factor-average"},
]
LARGE = {f"large.{i}.weight": (shape, i) for i, shape in enumerate([(300, 1001), (70_000,), (2, 65_536)])}


def large_state(seed: int = 0, dtype: type = np.float32) -> dict[str, np.ndarray]:
    """Several blocks and a rest, sampled and not, beside small ones."""
    draw = np.random.default_rng(seed)
    more = {key: draw.normal(size=shape).astype(dtype) for key, (shape, _) in LARGE.items()}
    return {**mixed_state(seed=seed, dtype=dtype), **more}


# --- merge(): states on disk and in memory --------------------------------------------------------------------------


def assert_merges_as_in_memory(folder: Path, states: list[Any], **arguments: Any) -> None:
    spooled = [SpooledState(state, folder, f"client {i}") for i, state in enumerate(states)]
    merged, report = merge(states, **arguments)
    found, own = merge(spooled, **arguments)
    assert list(found) == list(merged) and own == report
    for key, value in merged.items():
        assert torch.equal(found[key], value) and found[key].dtype == value.dtype, key
    for state, on_disk in zip(states, spooled, strict=True):
        assert all(torch.equal(on_disk[key], value) for key, value in state.items())
        on_disk.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spool")


@pytest.mark.parametrize("options", METHODS, ids=str)
@settings(max_examples=15)
@given(data=st.data())
def test_states_on_disk_merge_to_the_same_bits(folder: Path, options: dict[str, Any], data: st.DataObject) -> None:
    starts = ["fresh", "trained"] if options["method"] == "factor-average" else ["fresh", "trained", "cut", "configs"]
    dtype = data.draw(st.sampled_from(DTYPES))
    start = data.draw(st.sampled_from(starts))
    case = data.draw(tensor_cases(dtype=dtype) | adapter_cases(dtype=dtype, start=start, out=None))
    assert_merges_as_in_memory(folder, **{**case.arguments(), **options})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", METHODS, ids=str)
def test_large_tensors_on_disk_merge_to_the_same_bits(folder: Path, options: dict[str, Any], dtype: Any) -> None:
    for shape in [(300, 1001), (70_000,)]:
        case = tensor_case(3, shape=shape, n=3, dtype=dtype, moved=0.1)
        assert_merges_as_in_memory(folder, **{**case.arguments(), **options})


def test_tensors_of_any_layout_and_kind(folder: Path) -> None:
    g = torch.Generator().manual_seed(0)
    states = [
        {
            "t": torch.randn(500, 300, generator=g).T,
            "empty": torch.zeros(0, 3),
            "number": torch.tensor(float(i)),
            "count": torch.tensor(7 + i),
            "mask": torch.tensor([True, False]),
            "bn.running_var": torch.rand(3, generator=g),
        }
        for i in range(3)
    ]
    assert_merges_as_in_memory(folder, states)
    assert_merges_as_in_memory(folder, states[1:], reference=states[0])


def test_no_tensor_of_the_states_size_is_read(folder: Path) -> None:
    """Whole blocks at most, of each client in turn, beside the result."""
    case = tensor_case(1, shape=(1000, 1000), n=5, dtype=torch.float32)
    spooled = [SpooledState(state, folder, "client") for state in case.states]
    sizes: list[int] = []
    reader = fedfrom.stored.StoredTensor.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fedfrom.stored.StoredTensor,
            "read",
            lambda self, start, stop, out=None: sizes.append(stop - start) or reader(self, start, stop, out),
        )
        merge(spooled, case.reference)
    assert max(sizes) <= blocks.BLOCK and sum(sizes) == 2 * 5 * 10**6  # the norms, and the sum
    sizes.clear()
    known = [{name: norms.delta_norm(x, case.reference[name]) for name, x in s.items()} for s in case.states]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fedfrom.stored.StoredTensor,
            "read",
            lambda self, start, stop, out=None: sizes.append(stop - start) or reader(self, start, stop, out),
        )
        clients = [Client(state, norms=own) for state, own in zip(spooled, known, strict=True)]
        found, _ = merge_clients(clients, Round(case.reference), FroM())
    assert sum(sizes) == 5 * 10**6  # once, where the norms are known
    expected, _ = merge(case.states, case.reference)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("threads", [2, 3])
def test_no_bit_depends_on_the_number_of_threads(threads: int) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = {"small": (5,), "middling": (300, 301), "large": (1100, 2000)}
    *states, W = [{key: torch.randn(shape, generator=g) for key, shape in shapes.items()} for _ in range(4)]
    expected, report = merge(states, W, k=0.5, clip=1.0)
    torch.set_num_threads(threads)
    try:
        found, own = merge(states, W, k=0.5, clip=1.0)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)
    assert own == report and all(torch.equal(found[key], value) for key, value in expected.items())


# --- Rounds ----------------------------------------------------------------------------------------------------------

STRATEGIES: dict[str, Any] = {
    "FedFroM": FedFroM,
    "whole updates": lambda **o: FedFroM(scope="model", lora_config={"r": 4, "lora_alpha": 4}, **o),
    "ties": lambda **o: FedMerge("ties", **o),
    "tsv": lambda **o: FedMerge("tsv", **o),
    "core-ties": lambda **o: FedMerge("core-ties", **o),
    "ctm": lambda **o: FedMerge("ctm", rank=2, **o),
    "factor-average": lambda **o: FedMerge("factor-average", **o),
    "multikrum": lambda **o: FedFroM(select="multikrum", attackers=1, **o),
}


def outcome(strategy: FedMerge, rounds: int = 2, client: Any = noisy, **options: Any) -> tuple[Any, ...]:
    """Everything that a run comes to, but for the clock's."""
    initial = record_of(large_state())
    result = strategy.start(InProcessGrid(client, 5, **options), initial, num_rounds=rounds)
    reports = {r: {**report.to_dict(), "seconds": 0, "scores": {}} for r, report in strategy.reports.items()}
    return {key: array.data for key, array in result.arrays.items()}, reports, result.evaluate_metrics_clientapp


@pytest.mark.parametrize("name", STRATEGIES)
def test_rounds_through_the_disk_are_those_through_memory(name: str, tmp_path: Path) -> None:
    expected = outcome(STRATEGIES[name](memory_budget=None))
    size = sum(value.nbytes for value in large_state().values())
    for budget in (0, 2.5 * size, 2**32):
        assert outcome(STRATEGIES[name](memory_budget=budget, spool=tmp_path)) == expected
        assert outcome(STRATEGIES[name](memory_budget=budget, spool=tmp_path), reply_order=3) == expected
    assert not list(tmp_path.iterdir())


def spooled(strategy: FedMerge, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note how many bytes each reply took on disk."""
    sizes: list[int] = []
    inner = SpooledState.__init__

    def noting(self: SpooledState, state: Any, folder: Path, who: str) -> None:
        inner(self, state, folder, who)
        sizes.append(sum(tensor.nbytes for tensor in state.values()))

    monkeypatch.setattr(SpooledState, "__init__", noting)
    return sizes


@pytest.mark.parametrize(("budget", "on_disk"), [(0, 5), (2.5, 3), (5, 0), (None, 0)])
def test_what_is_beyond_the_budget_goes_to_disk(
    budget: float | None, on_disk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(value.nbytes for value in large_state().values())
    strategy = FedFroM(memory_budget=None if budget is None else budget * size, spool=tmp_path / "new" / "folder")
    sizes = spooled(strategy, monkeypatch)
    outcome(strategy, rounds=1)
    assert sizes == [size] * on_disk
    with pytest.raises(ValueError, match="memory_budget: expected bytes >= 0 or None, found -1"):
        FedFroM(memory_budget=-1)


def asked(strategy: FedMerge, clients: int = 3) -> list[Message]:
    grid = InProcessGrid(noisy, clients)
    messages = strategy.configure_train(1, record_of(large_state()), ConfigRecord(), grid)
    return list(grid.send_and_receive(messages))


def test_a_list_of_replies_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever hands over a list holds it."""
    strategy = FedFroM(memory_budget=0, spool=tmp_path)
    replies, sizes = asked(strategy), spooled(strategy, monkeypatch)
    expected, _ = strategy.aggregate_train(1, replies)
    assert sizes == []
    found, _ = strategy.aggregate_train(1, iter(replies))
    assert len(sizes) == 3 and same_bits(found, expected)


def test_one_reply_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Merged or rejected, the one before is gone when the next is asked for, without a collection of cycles."""
    strategy = FedFroM(memory_budget=0, spool=tmp_path)
    replies = asked(strategy)
    del replies[1].content.metric_records[next(iter(replies[1].content.metric_records))]["num-examples"]
    held: list[weakref.ref] = []
    gc.collect()
    gc.disable()

    def arriving() -> Iterator[Message]:
        while replies:
            assert all(ref() is None for ref in held)
            held.append(weakref.ref(replies[0].content["arrays"]))
            yield replies.pop(0)

    try:
        strategy.aggregate_train(1, arriving())
        assert all(ref() is None for ref in held)
    finally:
        gc.enable()
    assert len(held) == 3 and strategy.reports[1].valid == 2


def node_of(grid: InProcessGrid, partition: int) -> int:
    return next(node for node, own in grid.partition_of.items() if own == partition)


def test_a_file_that_was_cut_short_costs_its_own_reply_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cutting(clients: Any, *others: Any) -> Any:
        for client in clients:
            if client.name == f"node {node}":
                os.ftruncate(client.state._file.file.fileno(), 1000)
        return merge_clients(clients, *others)

    grid = InProcessGrid(noisy, 4)
    node = node_of(grid, 2)
    strategy = FedFroM(memory_budget=0, spool=tmp_path)
    monkeypatch.setattr("fedfrom.outcome.merge_clients", cutting)
    result = strategy.start(grid, record_of(large_state()), num_rounds=1)
    report = strategy.reports[1]
    assert list(report.rejected) == [node] and report.reasons == {"spool": 1} and not report.missing
    for word in (f"node {node}", str(tmp_path), "expected", "found", "cut it short"):
        assert word in report.rejected[node]
    without = FedFroM().start(InProcessGrid(noisy, 4, silent=[2]), record_of(large_state()), num_rounds=1)
    assert same_bits(result.arrays, without.arrays)


def full(self: Any, data: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_replies_that_the_disk_does_not_take_are_rejected_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(value.nbytes for value in large_state().values())
    (tmp_path / "file").write_text("not a folder")
    for spool, patched in ((tmp_path / "file", False), (tmp_path / "file" / "in", False), (tmp_path, True)):
        grid, strategy = InProcessGrid(noisy, 4), FedFroM(memory_budget=2 * size, spool=spool)
        with monkeypatch.context() as patch:
            if patched:
                patch.setattr(fedfrom.wire.spool._File, "write", full)
            result = strategy.start(grid, record_of(large_state()), num_rounds=1)
        report = strategy.reports[1]
        last = {grid.partition_of[node] for node in report.rejected}
        assert report.reasons == {"spool": 2} and len(last) == 2
        for node, reason in report.rejected.items():
            for word in (f"node {node}", str(spool), "expected", "found"):
                assert word in reason
            assert not patched or ("No space" in reason and "memory_budget" in reason)
        without = FedFroM().start(InProcessGrid(noisy, 4, silent=last), record_of(large_state()), num_rounds=1)
        assert same_bits(result.arrays, without.arrays)


def test_the_disk_has_its_room_back_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[SpooledState] = []
    inner = SpooledState.__init__

    def noting(self: SpooledState, *arguments: Any) -> None:
        inner(self, *arguments)
        states.append(self)

    def stopped(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(SpooledState, "__init__", noting)
    strategy = FedFroM(memory_budget=0, spool=tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("fedfrom.outcome.merge_clients", stopped)
        strategy.start(InProcessGrid(noisy, 3), record_of(large_state()), num_rounds=1)
    assert len(states) == 3 and not list(tmp_path.iterdir())
    for state in states:
        with pytest.raises(SpoolError, match="closed"):
            state["base_model.model.head.weight"]

    def broken() -> Iterator[Message]:
        yield from replies
        raise ConnectionError

    strategy = FedFroM(memory_budget=0, spool=tmp_path)
    replies = asked(strategy)
    with pytest.raises(ConnectionError):
        strategy.aggregate_train(1, broken())
    assert len(states) == 6
    for state in states[3:]:
        with pytest.raises(SpoolError, match="closed"):
            state["base_model.model.head.weight"]


# --- Pulling ---------------------------------------------------------------------------------------------------------


class Watched(InProcessGrid):
    """Notes what is pulled at once, and answers later."""

    def __init__(self, *arguments: Any, after: dict[int, float] | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.after, self.pulls, self.pauses = after or {}, list[int](), list[float]()
        inner = self.clock.sleep
        self.clock.sleep = lambda seconds: (self.pauses.append(seconds), inner(seconds))[1]  # type: ignore[method-assign]

    def pull_messages(self, message_ids: Any) -> Any:
        ids = list(message_ids)
        self.pulls.append(len(ids))
        ready = []
        for message_id in ids:
            if self.clock.now >= self.after.get(self.partition(message_id), 0):
                ready.append(message_id)
        return super().pull_messages(ready) if ready else []


def messages_for(grid: InProcessGrid) -> list[Message]:
    return FedFroM().configure_train(1, record_of(mixed_state()), ConfigRecord(), grid)


def partitions(grid: InProcessGrid, replies: Any) -> list[int]:
    return [grid.partition_of[reply.metadata.src_node_id] for reply in replies]


def test_replies_come_one_by_one_as_they_are_ready() -> None:
    grid = Watched(noisy, 4, after={0: 5.0, 1: 40.0, 2: 1.0})
    found = list(send_and_receive(grid, messages_for(grid), 3600))
    assert partitions(grid, found) == [3, 2, 0, 1]
    assert set(grid.pulls) == {1}
    assert 40 <= grid.clock.now <= 41 and min(grid.pauses) >= SHORTEST and max(grid.pauses) <= LONGEST
    # the second that a reply took was not waited for much longer
    assert len(grid.pauses) < 300


def test_messages_are_sent_at_once_and_replies_pulled_when_asked_for() -> None:
    grid = Watched(noisy, 3)
    replies = send_and_receive(grid, messages_for(grid), 10)
    assert len([t for t in grid.traffic if t.direction == "down"]) == 3 and not grid.pulls
    next(iter(replies))
    assert len(grid.pulls) == 1


@pytest.mark.parametrize(("timeout", "expected"), [(0, [3]), (4.9, [3, 2]), (5.0, [3, 2, 0]), (None, [3, 2, 0, 1])])
def test_who_replies_too_late_is_left_out(timeout: float | None, expected: list[int]) -> None:
    grid = Watched(noisy, 4, after={0: 5.0, 1: 40.0, 2: 1.0})
    assert partitions(grid, send_and_receive(grid, messages_for(grid), timeout)) == expected
    if timeout is not None:
        assert grid.clock.now == pytest.approx(timeout)


def test_time_in_which_replies_are_worked_on_does_not_count() -> None:
    grid = Watched(noisy, 3, after={1: 3.0})
    found = []
    for reply in send_and_receive(grid, messages_for(grid), 5):
        found.append(reply)
        grid.clock.now += 100
        grid.after[1] = max(grid.after[1], 3.0)
    assert len(found) == 3


def test_messages_that_could_not_be_sent_are_not_waited_for() -> None:
    class Refusing(Watched):
        def push_messages(self, messages: Any) -> Any:
            return [None, *list(super().push_messages(messages))[1:]]

    grid = Refusing(noisy, 3)
    assert len(list(send_and_receive(grid, messages_for(grid), 10))) == 2 and grid.clock.now == 0


def test_a_grid_without_a_clock_is_waited_for_in_real_time() -> None:
    grid = InProcessGrid(noisy, 2, silent=[0])
    del grid.clock
    assert len(list(send_and_receive(grid, messages_for(grid), 0.05))) == 1


def test_arrays_are_what_they_were(tmp_path: Path) -> None:
    initial = record_of(large_state())
    before: ArrayRecord = record_of(arrays_of(initial))
    FedFroM(memory_budget=0, spool=tmp_path).start(InProcessGrid(noisy, 3), initial, num_rounds=1)
    assert same_bits(initial, before)
