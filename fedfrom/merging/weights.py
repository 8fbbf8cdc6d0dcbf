"""Eq. 1: how much each client counts, from the norms of the updates and the numbers of examples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Norms this close to the largest share the weight at k = infinity.
_TIE = 1e-6
SCOPES = ("layer", "model")


def weights(
    norms: Sequence[float] | Tensor,
    k: float,
    examples: Sequence[float] | None = None,
    examples_power: float = 0.0,
    given: Sequence[float] | None = None,
) -> Tensor:
    """Return FroM's weights (Eq. 1), w_i proportional to u_i n_i^p ||theta_i||_F^k, summing to 1.

    Formed in log space, so no norm and no k overflows. The extremes are exact: k = 0 gives the (example-weighted)
    mean, with ||0||^0 = 1; k = infinity gives the largest norm all the weight (ties within 1e-6 share it); where
    every norm is 0 the weights are those of k = 0. A client with u_i = 0 has none, and the others' are what they are
    without it.

    Parameters
    ----------
    norms : Sequence[float] | Tensor
        (n,) Frobenius norms of the deltas, finite, >= 0.
    k : float
        k >= 0, infinity included.
    examples : Sequence[float] | None (default: None)
        n_i > 0; None means all equal.
    examples_power : float (default: 0.0)
        p. The paper's is 0; FedAvg's, with k = 0, is 1.
    given : Sequence[float] | None (default: None)
        u_i >= 0, at least one above 0: the user's own weights. The paper has none: None means 1 each.

    Returns
    -------
    Tensor
        (n,) float64.
    """
    # a few numbers at a time, for which Python's own arithmetic is faster than any library's
    norms = norms.tolist() if isinstance(norms, Tensor) else [float(norm) for norm in norms]
    logs = [0.0] * len(norms)
    counted: Sequence[int] = range(len(norms))  # a client of weight 0 must not be the one that others are compared with
    if given is not None:
        counted = [i for i in counted if given[i] > 0]
        most = math.log(max(given))
        logs = [math.log(u) - most if u > 0 else -math.inf for u in given]
    if examples is not None and examples_power != 0:
        most = math.log(max(examples[i] for i in counted))  # a large power gives minus infinity, never infinity
        for i in counted:
            logs[i] += examples_power * (math.log(examples[i]) - most)
    largest = max(norms[i] for i in counted)
    for i in counted if k > 0 and largest > 0 else ():
        if k == math.inf:
            logs[i] = logs[i] if norms[i] >= largest * (1 - _TIE) else -math.inf
        else:  # the norms' quotients could leave the range of a float, and log 0 is none
            logs[i] += k * (math.log(norms[i]) - math.log(largest)) if norms[i] > 0 else -math.inf
    highest = max(logs)
    shares = [math.exp(log - highest) for log in logs]
    total = math.fsum(shares)  # exact: the order of clients changes no bit
    return torch.tensor([share / total for share in shares], dtype=torch.float64)


def mean_weight(given: Sequence[float] | None, examples: Sequence[float] | None, examples_power: float) -> float:
    """Return sum_i u_i n_i^p / sum_i n_i^p: what the sum of the clients' own weights is to that without them.

    A method that does not normalise multiplies by it. 1 without weights; c, exactly, where all of them are c.
    """
    if given is None:
        return 1.0
    shares = weights([1.0] * len(given), 0.0, examples, examples_power).tolist()
    most = max(given)  # in units of it no sum leaves the range of a float
    return most * (math.fsum(s * (u / most) for s, u in zip(shares, given, strict=True)) / math.fsum(shares))


def check_weighting(k: float | str, examples_power: float, scope: str) -> None:
    """Raise ValueError where k, p or the scope is out of range; k may be "auto"."""
    for name, value in {"k": 0.0 if k == "auto" else k, "examples_power": examples_power}.items():
        if not isinstance(value, int | float):
            raise ValueError(f"{name}: expected a number, found {value!r}")
    if not isinstance(k, str) and not k >= 0:
        raise ValueError(f"k: expected a number >= 0 (infinity included), found {k}")
    if not 0 <= examples_power < float("inf"):
        raise ValueError(f"examples_power: expected a finite number >= 0, found {examples_power}")
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, found {scope!r}")
