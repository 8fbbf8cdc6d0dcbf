"""Federations whose replies are all rejected: after how many rounds they end in an error, and what that says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Result

from fedfrom import FedFroM
from tests.inprocess import InProcessGrid
from tests.models import faulty, mixed_state, noisy, record_of, same_bits

HEAD = "base_model.model.head.weight"
Kinds = Mapping[int, str]


def prefixed(content: RecordDict) -> None:
    content["arrays"] = ArrayRecord({f"module.{key}": array for key, array in content["arrays"].items()})


def narrow(content: RecordDict) -> None:
    content["arrays"].update(record_of({HEAD: np.zeros((3, 10), np.float16)}))


def raising(content: RecordDict) -> None:
    raise RuntimeError("out of memory")


ALL = {"prefixed": dict.fromkeys(range(3), prefixed), "errors": dict.fromkeys(range(3), raising), "fine": {}}
ALL["one is fine"] = {0: prefixed, 1: prefixed}
ALL["errors and prefixed"] = {0: prefixed, 1: raising, 2: raising}


def in_rounds(kinds: Kinds, otherwise: str = "prefixed") -> Any:
    """Return a client that is of a kind in some rounds."""

    def client(message: Message, context: Context) -> Message:
        kind = kinds.get(int(message.content["config"]["server-round"]), otherwise)
        return faulty(ALL[kind])(message, context)

    return client


def run(kinds: Kinds, rounds: int, otherwise: str = "prefixed", **options: Any) -> tuple[FedFroM, Result]:
    strategy = FedFroM(fraction_evaluate=0.0, **options)
    grid = InProcessGrid(in_rounds(kinds, otherwise), 3)
    return strategy, strategy.start(grid, record_of(mixed_state()), num_rounds=rounds)


def trained(kinds: Kinds, rounds: int, found: str, **options: Any) -> list[int]:
    """Return the rounds that were trained before an error with these words."""
    heard: list[int] = []
    with pytest.raises(RuntimeError, match=found):
        run(kinds, rounds, on_round=lambda report: heard.append(report.server_round), **options)
    return heard


# --- In a row --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "most"), [({}, 3), ({"max_skipped": 1}, 1), ({"max_skipped": 5}, 5)])
def test_so_many_rounds_in_a_row_end_the_run(options: dict[str, Any], most: int) -> None:
    assert trained({}, 10, "max_skipped", **options) == list(range(1, most + 1))


def test_the_error_says_what_to_do() -> None:
    strategy = FedFroM(fraction_evaluate=0.0)
    grid = InProcessGrid(faulty({0: narrow, 1: prefixed, 2: prefixed}), 3)
    with pytest.raises(RuntimeError) as error:
        strategy.start(grid, record_of(mixed_state()), num_rounds=9)
    text = str(error.value)
    (node,) = [node for node in strategy.reports[3].rejected if f"node {node}'s: " in text]
    assert grid.partition_of[node] in (1, 2)  # the most frequent reason
    reason = strategy.reports[3].rejected[node]
    assert "expected the keys that were sent" in reason and "'module." in reason
    assert f"found 3: 6 of 9 for 'keys', such as node {node}'s: {reason}; " in text
    assert "compare the clients' keys with those of initial_arrays" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("kinds", "last"),
    [
        ({1: "prefixed"}, 3),
        ({3: "fine"}, 6),  # what is merged ends the row
        ({2: "errors", 4: "errors"}, 5),  # a round without replies is not one of the row, nor its end
        ({1: "errors", 2: "errors", 3: "errors", 4: "errors"}, 7),
        ({3: "errors and prefixed"}, 3),  # all that came was rejected
        ({2: "one is fine"}, 5),
    ],
    ids=str,
)
def test_what_counts_as_a_row(kinds: dict[int, str], last: int) -> None:
    assert trained(kinds, 10, "max_skipped") == list(range(1, last + 1))


def test_a_valid_reply_ends_the_row_though_too_few_came_to_merge_it() -> None:
    """The clients fit; that the others are missing or wrong is another matter."""
    assert trained({2: "one is fine"}, 10, "max_skipped", min_valid_replies=2) == list(range(1, 6))


# --- At the end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"max_skipped": None}], ids=str)
def test_a_run_that_merged_nothing_is_an_error_at_its_end(options: dict[str, Any]) -> None:
    assert trained({}, 2, "expected at least one round that merges.*in 2 rounds all.*6 of 6 for 'keys'", **options) == [
        1,
        2,
    ]
    # rounds of other kinds around it do not hide it
    found = "expected at least one round that merges.*in 1 round all.*3 of 3 for 'keys'"
    assert trained({2: "errors", 3: "one is fine"}, 3, found, min_valid_replies=2, **options) == [1, 2, 3]


def test_without_a_bound_no_row_is_too_long() -> None:
    assert trained({}, 7, "in 7 rounds all", max_skipped=None) == list(range(1, 8))
    strategy, result = run({1: "fine"}, 7, max_skipped=None)
    assert len(strategy.reports) == 7 and not same_bits(result.arrays, record_of(mixed_state()))


@pytest.mark.parametrize("kinds", [{1: "fine"}, {2: "fine"}, {3: "fine"}], ids=str)
def test_a_run_that_merged_something_is_none(kinds: Kinds) -> None:
    strategy, _ = run(kinds, 3)
    assert len(strategy.reports) == 3


def test_a_run_that_heard_nothing_is_none() -> None:
    """An outage: the initial arrays are all there is, where Flower's own loop leaves Result.arrays empty."""
    strategy, initial = FedFroM(), record_of(mixed_state())
    result = strategy.start(InProcessGrid(noisy, 3, silent=[0, 1, 2]), initial, num_rounds=2, timeout=0.1)
    assert same_bits(result.arrays, initial)
    assert [result.train_metrics_clientapp[i]["replies-valid"] for i in (1, 2)] == [0, 0]


def test_a_run_of_errors_alone_ends_with_the_most_frequent_one() -> None:
    """Some rounds of errors are an outage, which a run outlives; clients that fail in every round are no success."""
    errors = dict.fromkeys(range(1, 5), "errors")
    found = r"4 rounds merged nothing.*3 replies, errors alone.*node \d+'s: .*out of memory"
    assert trained(errors, 4, found) == [1, 2, 3, 4]


def test_a_strategy_that_starts_again_counts_anew() -> None:
    strategy = FedFroM(fraction_evaluate=0.0)
    for _ in range(2):
        for kinds, found in (({}, "max_skipped"), ({1: "fine"}, "max_skipped")):
            grid = InProcessGrid(in_rounds(kinds), 3)
            with pytest.raises(RuntimeError, match=found):
                strategy.start(grid, record_of(mixed_state()), num_rounds=9)
            assert len(strategy.reports) == 3 + len(kinds)


# --- With a checkpoint -----------------------------------------------------------------------------------------------


class Stopped(Exception):
    """Ends a run before its time."""


def stopped(folder: Path, kinds: Kinds, after: int, **options: Any) -> None:
    """Leave the checkpoint of a run that was stopped after so many rounds."""

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round > after:
            raise Stopped
        return None

    strategy = FedFroM(checkpoint=folder, fraction_evaluate=0.0, **options)
    grid = InProcessGrid(in_rounds(kinds), 3)
    with pytest.raises(Stopped):
        strategy.start(grid, record_of(mixed_state()), num_rounds=99, evaluate_fn=evaluate)


def test_with_clients_put_right_the_same_command_goes_on(tmp_path: Path) -> None:
    """The round of the error is repeated: neither is the new run refused at once, nor is it over before it began."""
    for rounds in (3, 10):
        folder = tmp_path / str(rounds)
        assert trained({}, rounds, "max_skipped", checkpoint=folder) == [1, 2, 3]
        assert trained({}, rounds, "max_skipped", checkpoint=folder) == [3]  # still wrong: no further round is needed
        strategy, result = run({}, rounds, otherwise="fine", checkpoint=folder)
        merged = [number for number, report in strategy.reports.items() if report.merge is not None]
        assert merged == list(range(3, rounds + 1)) and not same_bits(result.arrays, record_of(mixed_state()))


def test_with_clients_put_right_a_run_that_merged_nothing_goes_on(tmp_path: Path) -> None:
    assert trained({}, 2, "at least one round", checkpoint=tmp_path) == [1, 2]
    strategy, _ = run({}, 2, otherwise="fine", checkpoint=tmp_path)
    assert [report.merge is None for report in strategy.reports.values()] == [True, False]


def test_the_row_goes_on_over_a_resume(tmp_path: Path) -> None:
    stopped(tmp_path, {}, after=2)
    assert trained({3: "errors"}, 10, "found 3: 9 of 9", checkpoint=tmp_path) == [3, 4]


def test_the_bound_may_differ_after_a_resume(tmp_path: Path) -> None:
    stopped(tmp_path / "more", {}, after=2)
    assert trained({}, 10, "found 5", checkpoint=tmp_path / "more", max_skipped=5) == [3, 4, 5]
    stopped(tmp_path / "less", {}, after=2)
    # lower than what was: still no refusal before another round with replies
    assert trained({3: "errors"}, 10, "found 3", checkpoint=tmp_path / "less", max_skipped=1) == [3, 4]
    stopped(tmp_path / "none", {}, after=2)
    strategy, _ = run({9: "fine"}, 9, checkpoint=tmp_path / "none", max_skipped=None)
    assert strategy.reports[9].merge is not None


def test_what_was_merged_before_a_resume_counts(tmp_path: Path) -> None:
    stopped(tmp_path, {1: "fine"}, after=2)
    strategy, _ = run({}, 3, checkpoint=tmp_path)
    assert [report.merge is None for report in strategy.reports.values()] == [False, True, True]
    # with another bound what is finished is no error either
    run({}, 3, checkpoint=tmp_path, max_skipped=1)


def test_a_finished_run_that_merged_nothing_is_no_success_later(tmp_path: Path) -> None:
    stopped(tmp_path, {}, after=2)
    assert trained({}, 2, "at least one round", checkpoint=tmp_path) == []


# --- The setting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "3"])
def test_a_wrong_bound_is_named(wrong: Any) -> None:
    expected = f"max_skipped: expected a whole number of rounds >= 1 or None, found {wrong!r}"
    with pytest.raises(ValueError, match=expected):
        FedFroM(max_skipped=wrong)


def test_flowers_own_loop_is_not_ended() -> None:
    """Strategies that wrap this one bring it: what they do with skipped rounds is theirs."""
    from flwr.serverapp.strategy import Strategy

    strategy = FedFroM(fraction_evaluate=0.0)
    Strategy.start(strategy, InProcessGrid(in_rounds({}), 3), record_of(mixed_state()), 4)
    assert len(strategy.reports) == 4


def test_a_client_that_is_fine_is_fine() -> None:
    """The clients above differ by their faults alone."""
    _, result = run({}, 2, otherwise="fine")
    expected = FedFroM(fraction_evaluate=0.0).start(InProcessGrid(noisy, 3), record_of(mixed_state()), num_rounds=2)
    assert same_bits(result.arrays, expected.arrays)


def test_a_run_whose_merges_all_fail_ends_with_what_failed() -> None:
    """As where the function that scores states raises in every round: the initial arrays are no success."""

    def validate(state: Any) -> float:
        raise FileNotFoundError("held-out.tsv")

    with pytest.raises(RuntimeError, match=r"2 rounds merged nothing.*raised FileNotFoundError: held-out\.tsv"):
        run({}, 2, "fine", k="auto", validate=validate)
    scores = iter([None, 0.0, 0.0])
    strategy, _ = run({}, 2, "fine", k="auto", search={"k": (0, 1)}, validate=lambda state: next(scores))
    assert [report.merge is None for report in strategy.reports.values()] == [True, False]
