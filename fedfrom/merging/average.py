"""The averages that FroM is compared with: of the updates, and (what FedAvg does to LoRA) of their factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedfrom.merging.frobenius import check_weighting, weights
from fedfrom.merging.solve import Solver


@dataclass(frozen=True, kw_only=True)
class Average(Solver):
    """The (example-weighted) mean of the deltas: for LoRA the mean of the products, solved back by Eq. 6.

    FroM at k = 0. With examples_power = 1 this is FedAvg (McMahan et al., 2017) on full tensors and on products.

    Parameters
    ----------
    examples_power : float (default: 0.0)
        p: client i weighs n_i^p.
    rank, solver, iterations, tolerance, seed
        See `Solver`.
    """

    examples_power: float = 0.0
    k: ClassVar[float] = 0.0
    scope: ClassVar[str] = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weighting(0.0, self.examples_power, self.scope)

    def weights(self, norms: Tensor, examples: Sequence[float] | None) -> Tensor:
        """Return (n,) float64 weights n_i^p, summing to 1."""
        return weights(norms, 0.0, examples, self.examples_power)


@dataclass(frozen=True, kw_only=True)
class FactorAverage:
    """The mean of the factors, mean(B) and mean(A): what FedAvg does to LoRA (FedIT, Zhang et al., 2024).

    mean(B) mean(A) is not mean(BA): this is here to show the error. Every client must have one rank and one scaling.

    Parameters
    ----------
    examples_power : float (default: 0.0)
        p: client i weighs n_i^p; 1 is FedAvg's.
    """

    examples_power: float = 0.0
    on_factors: ClassVar[bool] = True
    rank: ClassVar[None] = None
    k: ClassVar[float] = 0.0
    scope: ClassVar[str] = "layer"

    def __post_init__(self) -> None:
        check_weighting(0.0, self.examples_power, self.scope)

    def weights(self, norms: Tensor, examples: Sequence[float] | None) -> Tensor:
        """Return (n,) float64 weights n_i^p, summing to 1."""
        return weights(norms, 0.0, examples, self.examples_power)
