"""Eq. 1: how much each client counts, from the norms of the updates and the numbers of examples."""

from __future__ import annotations

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
) -> Tensor:
    """Return FroM's weights (Eq. 1), w_i proportional to n_i^p ||theta_i||_F^k, summing to 1.

    Formed in log space, so no norm and no k overflows. The extremes are exact: k = 0 gives the (example-weighted)
    mean, with ||0||^0 = 1; k = infinity gives the largest norm all the weight (ties within 1e-6 share it); where
    every norm is 0 the weights are those of k = 0.

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

    Returns
    -------
    Tensor
        (n,) float64.
    """
    norms = torch.as_tensor(norms, dtype=torch.float64)
    logs = torch.zeros_like(norms)
    if examples is not None and examples_power != 0:
        counts = torch.as_tensor(examples, dtype=torch.float64)
        logs = examples_power * (torch.log(counts) - torch.log(counts.max()))
    if k > 0 and float(norms.max()) > 0:
        if k == float("inf"):
            heard = norms >= norms.max() * (1 - _TIE)
        else:
            logs = logs + k * (torch.log(norms) - torch.log(norms.max()))
            heard = norms > 0
        # log 0 = -infinity times k is right, but set apart so that no NaN can come of it
        logs = torch.where(heard, logs, torch.full_like(logs, -float("inf")))
    # summed in an order of their own, so that the order of clients changes no bit
    order = torch.argsort(logs)
    result = torch.empty_like(logs)
    result[order] = torch.softmax(logs[order], dim=0)
    return result


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
