"""What clients weigh beside their norms, by their numbers of examples and the user's own weights; sums to 1."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedfrom.numeric import is_number

SCOPES = ("layer", "model")


def log_shares(
    n: int,
    examples: Sequence[float] | None = None,
    examples_power: float = 0.0,
    given: Sequence[float] | None = None,
) -> list[float]:
    """Return (n,) log(u_i n_i^p), up to a constant: minus infinity for a client whose own weight is 0.

    Logarithms, so that no power of a number of examples overflows.

    Parameters
    ----------
    n : int
        How many clients there are.
    examples : Sequence[float] | None (default: None)
        (n,) n_i > 0; None means all equal.
    examples_power : float (default: 0.0)
        p. The paper's is 0; FedAvg's is 1.
    given : Sequence[float] | None (default: None)
        (n,) u_i >= 0, at least one above 0: the user's own weights. The paper has none: None means 1 each.
    """
    logs = [0.0] * n
    counted: Sequence[int] = range(n)  # a client of weight 0 must not be the one that others are compared with
    if given is not None:
        counted = [i for i in counted if given[i] > 0]
        most = math.log(max(given))
        logs = [math.log(u) - most if u > 0 else -math.inf for u in given]
    if examples is not None and examples_power != 0:
        most = math.log(max(examples[i] for i in counted))  # a large power gives minus infinity, never infinity
        for i in counted:
            logs[i] += examples_power * (math.log(examples[i]) - most)
    return logs


def normalised(logs: Sequence[float]) -> Tensor:
    """Return (n,) float64 weights, proportional to exp(logs) and summing to 1; at least one log is finite."""
    highest = max(logs)
    shares = [math.exp(log - highest) for log in logs]
    total = math.fsum(shares)  # exact: the order of clients changes no bit
    return torch.tensor([share / total for share in shares], dtype=torch.float64)


def mean_weight(given: Sequence[float] | None, examples: Sequence[float] | None, examples_power: float) -> float:
    """Return sum_i u_i n_i^p / sum_i n_i^p: the mean of the user's own weights over the clients.

    A method that does not divide by the sum of the weights multiplies by it. 1 where the user gave no weights; exactly
    c where all of them are c.
    """
    if given is None:
        return 1.0
    shares = normalised(log_shares(len(given), examples, examples_power)).tolist()
    most = max(given)  # in units of it no sum leaves the range of a float
    return most * (math.fsum(s * (u / most) for s, u in zip(shares, given, strict=True)) / math.fsum(shares))


def check_weighting(k: float | str, examples_power: float, scope: str) -> None:
    """Raise ValueError where k, p or the scope is out of range; k may be "auto", and is not minus infinity.

    Minus infinity would be the smallest update above 0 alone, often one of a client that hardly trained.
    """
    for name, value in {"k": 0.0 if k == "auto" else k, "examples_power": examples_power}.items():
        if not is_number(value):
            raise ValueError(f"{name}: expected a number, found {value!r}")
    if not isinstance(k, str) and not k > -float("inf"):
        raise ValueError(f"k: expected a number (infinity included, minus infinity not), found {k}")
    if not 0 <= examples_power < float("inf"):
        raise ValueError(f"examples_power: expected a finite number >= 0, found {examples_power}")
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, found {scope!r}")
