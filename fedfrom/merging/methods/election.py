"""The election that TIES and DARE-TIES share: a sign for each entry, and the mean of the updates that agree with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedfrom.merging.methods.base import ProductMethod
from fedfrom.merging.updates import Change, Destination, Updates


def elect_and_average(deltas: Sequence[Tensor], coefficients: Sequence[float], majority: str = "total") -> Tensor:
    """Return the disjoint mean of n trimmed deltas: of each entry, those whose sign is the elected one.

    PEFT's convention: the sign is elected before the coefficients are applied, that of the sum ("total") or of most
    ("frequency"), + where they cancel; the sum of the agreeing entries is divided by their count. (mergekit applies
    weights first and divides by their sum; with unit weights and "total" the two are one.)
    """
    votes = torch.stack([delta if majority == "total" else delta.sign() for delta in deltas]).sum(dim=0)
    elected = torch.where(votes >= 0, 1, -1)
    total, count = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for c, delta in zip(coefficients, deltas, strict=True):
        agrees = delta.sign() == elected
        total += c * delta * agrees
        count += agrees
    return total / count.clamp_min(1)


@dataclass(frozen=True, kw_only=True)
class SignElection(ProductMethod):
    """The disjoint mean of the updates' entries: see `elect_and_average`. What trims or drops entries comes before.

    Parameters
    ----------
    majority : str (default: "total")
        The elected sign: "total", of the sum, the paper's, or "frequency", of most.
    examples_power, rank, solver, iterations, tolerance, seed, gauge
        See `ProductMethod`.
    """

    majority: str = "total"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.majority not in ("total", "frequency"):
            raise ValueError(f"majority: expected total or frequency, found {self.majority!r}")

    def change(self, updates: Updates, coefficients: Tensor, destination: Destination) -> Change:
        """Return theta* by election and disjoint mean."""
        c = coefficients.tolist()
        return updates.entrywise(lambda rows, start: elect_and_average(rows, c, self.majority))
