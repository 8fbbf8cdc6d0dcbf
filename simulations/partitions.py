"""The partition of the training examples over the clients, by the partitioners of flwr-datasets."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedfrom.errors import BadInput
from simulations.options import OWN, Options
from simulations.tasks import Task

if TYPE_CHECKING:
    import datasets

# Fewest examples of a client; flwr-datasets draws a Dirichlet partition again until all clients have them.
SMALLEST = 8
GROUP = "group"


@dataclass(frozen=True)
class Share:
    """One client's training examples and their task."""

    task: Task
    examples: datasets.Dataset

    @property
    def label_counts(self) -> dict[str, int]:
        """Number of examples of each class; for regression, of each score cut to a whole number."""
        counts = Counter(self.examples[self.task.stratum])
        names = self.task.label_names
        classes = range(len(names)) if names else sorted(counts)
        return {names[c] if names else str(c): counts.get(c, 0) for c in classes}


def split(options: Options, tasks: list[Task]) -> list[Share]:
    """Divide the training examples over the clients.

    Returns
    -------
    list[Share]
        One share for each client; every training example is in exactly one. The same options give the same shares in
        every process. With `--partition own` a site reads a folder of its own, and all its examples are the one share.

    Raises
    ------
    BadInput
        There are fewer examples than clients, or fewer values of the natural column; or no draw of the Dirichlet
        distribution gives every client enough examples.
    """
    if options.partition == "tasks":
        return [Share(task, task.train) for task in tasks]
    if options.partition == OWN:
        return [Share(tasks[0], tasks[0].train)]
    task = tasks[0]
    if len(task.train) < options.clients:
        raise BadInput(f"--clients {options.clients}: task {task.name} has {len(task.train)} training examples only")
    partitioner = _partitioner(options, task)
    # Rows in a seeded order: partitioners without a draw keep the order of the rows.
    shuffled = task.train.shuffle(seed=options.seed)
    partitioner.dataset = _grouped(shuffled, options, task) if options.partition == "natural" else shuffled
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each failed draw warns; only the failure of all draws matters
        try:
            return [Share(task, partitioner.load_partition(client)) for client in range(options.clients)]
        except ValueError:
            raise BadInput(
                f"--alpha {options.alpha}: no draw for {options.clients} clients leaves each {SMALLEST} of "
                f"{len(task.train)} examples; take a larger alpha or fewer clients"
            ) from None


def _partitioner(options: Options, task: Task) -> Any:
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, NaturalIdPartitioner

    if options.partition == "iid":
        return IidPartitioner(num_partitions=options.clients)
    if options.partition == "dirichlet":
        return DirichletPartitioner(
            num_partitions=options.clients,
            partition_by=task.stratum,
            alpha=float(options.alpha),
            min_partition_size=SMALLEST,
            self_balancing=False,
            seed=options.seed,
        )
    column = options.partition_by or task.natural_key
    others = sorted(set(task.train.column_names) - {"text", "pair"})
    if column not in others:
        named = f"--partition-by {column}" if column else f"--partition natural: task {task.name} has no natural column"
        raise BadInput(f"{named}; choose --partition-by from {', '.join(others)}")
    values = len(task.train.unique(column))
    if values < options.clients:
        raise BadInput(f"--clients {options.clients}: column {column!r} has {values} values only")
    return NaturalIdPartitioner(partition_by=GROUP)


def _grouped(examples: datasets.Dataset, options: Options, task: Task) -> datasets.Dataset:
    """Deal the values of the natural column to the clients, in their order of occurrence.

    flwr-datasets groups values by a given group size, which can't make every number of groups.
    """
    column = options.partition_by or task.natural_key
    client_of = {value: order % options.clients for order, value in enumerate(examples.unique(column))}
    return examples.add_column(GROUP, [client_of[value] for value in examples[column]])
