"""The strategies that are compared. Those with an option for the number of attackers are given that number."""

from collections.abc import Callable, Mapping
from typing import Any

from flwr.serverapp.strategy import Bulyan, FedAvg, FedMedian, FedTrimmedAvg, Krum, MultiKrum

from fedfrom import FedFroM

FEDFROM = "FedFroM"
OWN: Mapping[str, Callable[[int], Any]] = {
    FEDFROM: lambda f: FedFroM(),
    "FedFroM, clip=None": lambda f: FedFroM(clip=None),
    "FedFroM, select": lambda f: FedFroM(select="multikrum", attackers=f),
}
FLOWERS: Mapping[str, Callable[[int], Any]] = {
    "FedAvg": lambda f: FedAvg(),
    "FedMedian": lambda f: FedMedian(),
    "FedTrimmedAvg": lambda f: FedTrimmedAvg(beta=max(0.2, f / 10)),
    "Krum": lambda f: Krum(num_malicious_nodes=f),
    "MultiKrum": lambda f: MultiKrum(num_malicious_nodes=f, num_nodes_to_select=10 - f),
    "Bulyan": lambda f: Bulyan(num_malicious_nodes=f),
}
CONTENDERS: Mapping[str, Callable[[int], Any]] = {**OWN, **FLOWERS}


def applies(name: str, clients: int, attackers: int) -> bool:
    """Return whether a strategy is defined for these numbers of clients and attackers."""
    return name != "Bulyan" or clients >= 4 * attackers + 3
