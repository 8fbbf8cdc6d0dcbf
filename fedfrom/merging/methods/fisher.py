"""Fisher merging: each entry averaged by how much each client's loss cares for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedfrom.merging.methods.base import Method
from fedfrom.merging.updates import Change, Destination, Updates
from fedfrom.numeric import is_number


@dataclass(frozen=True, kw_only=True)
class Fisher(Method):
    """theta* = sum_i w_i F_i theta_i / sum_i w_i F_i entry by entry (Matena & Raffel, 2022, arXiv 2111.09832, Eq. 4).

    F_i is the diagonal of client i's Fisher matrix: the mean over its examples of the squared gradient. Needs
    `fedfrom.client.fisher`. On LoRA it is taken of the factors A and B, one by one: the result depends on the gauge
    (the same product BA written with other factors merges to another one), and all clients must have one rank and
    scaling.

    Parameters
    ----------
    floor : float (default: 1e-12)
        Added to every F_i, > 0: entries that no loss cares for are averaged. Far below what adapters have: the median
        of MiniLM's query adapters is about 1e-7, which the 1e-6 of other implementations would drown.
    examples_power : float (default: 0.0)
        p: w_i proportional to n_i^p.
    """

    on_factors: ClassVar[bool] = True
    needs: ClassVar[str | None] = "fisher"

    floor: float = 1e-12

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.floor) or not 0 < self.floor < float("inf"):
            raise ValueError(f"floor: expected a finite number > 0, found {self.floor!r}")

    def change(self, updates: Updates, coefficients: Tensor, destination: Destination) -> Change:
        """Return theta* (Eq. 4); without statistics the mean."""
        fisher = updates.statistics("fisher")
        if fisher is None:
            return updates.sum(coefficients)
        diagonals, c = [own.reshape(-1) for own in fisher], coefficients.tolist()

        def average(rows: list[Tensor], start: int) -> Tensor:
            total = torch.zeros(rows[0].shape, dtype=torch.float64, device=rows[0].device)
            weight = torch.zeros_like(total)
            for c_i, row, F in zip(c, rows, diagonals, strict=True):
                importance = c_i * (F[start : start + len(row)].to(torch.float64) + self.floor)
                total += importance * row
                weight += importance
            return (total / weight).to(rows[0].dtype)

        return updates.entrywise(average)
