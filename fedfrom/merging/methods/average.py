"""The averages that FroM is compared with: of the updates, and (what FedAvg does to LoRA) of their factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedfrom.merging.methods.base import Method, ProductMethod


@dataclass(frozen=True, kw_only=True)
class Average(ProductMethod):
    """The (example-weighted) mean of the deltas: for LoRA the mean of the products, solved back by Eq. 6.

    FroM at k = 0. With examples_power = 1 this is FedAvg (McMahan et al., 2017) on full tensors and on products; of
    models fine-tuned from one pretrained model it is their uniform soup (Wortsman et al., 2022, arXiv 2203.05482).

    Parameters
    ----------
    examples_power : float (default: 0.0)
        p: client i weighs n_i^p.
    rank, solver, iterations, tolerance, seed, gauge
        See `Solver`.
    """

    is_mean: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class FactorAverage(Method):
    """The mean of the factors, mean(B) and mean(A): what FedAvg does to LoRA (FedIT, Zhang et al., 2024).

    mean(B) mean(A) is not mean(BA): this is here to show the error. Every client must have one rank and one scaling.

    Parameters
    ----------
    examples_power : float (default: 0.0)
        p: client i weighs n_i^p; 1 is FedAvg's.
    """

    on_factors: ClassVar[bool] = True
