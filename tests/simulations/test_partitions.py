"""Partitions: every example with exactly one client, the same for the same seed."""

from collections import Counter

import pytest

from fedfrom.errors import BadInput
from simulations import partitions, tasks
from simulations.options import Options


def split(folder: str, **more) -> list[partitions.Share]:
    options = Options.from_mapping({"task": "stsb", "glue_dir": folder, **more}).validated()
    return partitions.split(options, tasks.load(options))


@pytest.mark.parametrize(
    "how",
    [
        {"partition": "iid"},
        {"partition": "dirichlet", "alpha": 5.0},
        {"partition": "dirichlet", "alpha": 5.0, "task": "mnli"},
        {"partition": "natural"},
        {"partition": "natural", "partition_by": "year", "clients": 2, "task": "stsb"},
    ],
)
def test_every_example_is_with_one_client(how: dict, tiny_glue: str) -> None:
    if how.get("partition_by") == "year":
        with pytest.raises(BadInput, match="1 values only"):
            split(tiny_glue, **how)
        return
    shares = split(tiny_glue, clients=3, **how)
    held = [index for share in shares for index in share.examples["index"]]
    assert sorted(map(int, held)) == list(range(90))
    assert len(shares) == 3
    assert all(sum(share.label_counts.values()) == len(share.examples) >= partitions.SMALLEST for share in shares)


def test_the_seed_fixes_who_holds_what(tiny_glue: str) -> None:
    def held(**more) -> list[list[str]]:
        return [list(share.examples["index"]) for share in split(tiny_glue, clients=3, alpha=5.0, **more)]

    assert held(seed=1) == held(seed=1) != held(seed=2)


def test_iid_shares_are_of_equal_size(tiny_glue: str) -> None:
    assert [len(share.examples) for share in split(tiny_glue, clients=4, partition="iid")] == [23, 23, 22, 22]


def test_no_natural_value_is_with_two_clients(tiny_glue: str) -> None:
    shares = split(tiny_glue, clients=3, partition="natural")
    holders = Counter(genre for share in shares for genre in set(share.examples["genre"]))
    assert holders == {f"genre{number}": 1 for number in range(4)}


def test_a_smaller_alpha_is_more_uneven(tiny_glue: str) -> None:
    def spread(alpha: float) -> float:
        sizes = [len(s.examples) for seed in range(5) for s in split(tiny_glue, clients=3, alpha=alpha, seed=seed)]
        return sum((size - 30) ** 2 for size in sizes)

    assert spread(2.0) > spread(1000.0)


def test_one_task_a_client(tiny_glue: str) -> None:
    shares = split(tiny_glue, task="qnli,rte,wnli", partition="tasks")
    assert [share.task.name for share in shares] == ["qnli", "rte", "wnli"]
    assert all(len(share.examples) == 90 for share in shares)


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"clients": 91}, "--clients 91"),
        ({"clients": 20, "alpha": 0.01}, "--alpha 0.01"),
        ({"partition": "natural", "clients": 5}, "column 'genre' has 4 values"),
        ({"partition": "natural", "task": "sst2"}, "no natural column"),
        ({"partition": "natural", "partition_by": "film"}, "--partition-by film; choose .* from .*genre"),
    ],
)
def test_impossible_partitions_are_named(how: dict, named: str, tiny_glue: str) -> None:
    with pytest.raises(BadInput, match=named):
        split(tiny_glue, **how)
