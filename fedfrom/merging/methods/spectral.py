"""What TSV-M and the Iso methods share: one core from the clients' cores, and the tensors that have none."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fedfrom.merging.linalg.directions import Triplets, triplets
from fedfrom.merging.methods.choosing import Chooses
from fedfrom.merging.methods.task_arithmetic import check_coefficient
from fedfrom.merging.updates import Change, Destination, Updates


class Tasks(NamedTuple):
    """The T updates of a layer that are not zero, nor of weight 0, as cores.

    Attributes
    ----------
    cores : Sequence[Tensor]
        M_t (p, q), float64 or float32, theta_t = U M_t V^T.
    scales : Sequence[float]
        What theta_t is multiplied by: the client's weight, 1 where nothing was asked for.
    bounds : Sequence[int | None]
        What the rank of theta_t is at most, where that is known.
    side : int
        min(d_out, d_in) of the layer, which its cores may fall short of.
    rank : int | float
        That the result will be cut to: see `Destination`.
    tolerance : float
        Share of the largest singular value at and below which a direction is rounding in the inputs' dtype.
    """

    cores: Sequence[Tensor]
    scales: Sequence[float]
    bounds: Sequence[int | None]
    side: int
    rank: int | float
    tolerance: float

    def triplets(self) -> list[Triplets]:
        """Return the singular triplets of each theta_t (not scaled), rounding left out."""
        return [triplets(M, self.tolerance, bound) for M, bound in zip(self.cores, self.bounds, strict=True)]

    def sum(self) -> Tensor:
        """Return sum_t scale_t M_t, (p, q) float64."""
        total = torch.zeros_like(self.cores[0], dtype=torch.float64)
        for scale, M in zip(self.scales, self.cores, strict=True):
            total.add_(M, alpha=scale)
        return total


def averaged(updates: Updates, coefficients: Tensor, coefficient: float) -> Change:
    """Return the mean of the updates, weighted by their (n,) coefficients, times one coefficient."""
    total = float(coefficients.sum())
    return updates.sum(coefficients * (coefficient / total) if total else coefficients)


@dataclass(frozen=True, kw_only=True)
class Spectral(Chooses):
    """A method that merges the singular directions of weight matrices.

    It merges LoRA modules and the 2-D weights of linear layers. What has no input and output directions is averaged,
    times the coefficient: embedding tables and LoRA on them, norms, biases, and convolutions of full models. T counts
    the clients whose update of the layer is not zero and whose weight is not 0.

    Of a LoRA module no d_out x d_in matrix is formed. Of a plain matrix all clients' are held at once. Clients send
    nothing more than their state.

    Parameters
    ----------
    coefficient : float | str (default: 1.0)
        What theta* is multiplied by, finite; "auto" chooses it by `validate`: see `TaskArithmetic`. The directions are
        found once for all candidates.
    examples_power : float (default: 0.0)
        p: theta_t is multiplied by n_t^p relative to the clients' mean, before it is merged. `merge`'s `weights`
        multiply theta_t then too, and are not divided by their sum; in what is averaged they are.
    validate, search
        See `Chooses`.
    rank, solver, iterations, tolerance, seed, gauge
        See `Solver`.
    """

    coefficient: float | str = 1.0  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_coefficient(self.coefficient)

    def coefficients(self, weights: Tensor, mean_weight: float = 1.0) -> Tensor:
        """Return (n,) float64: 1 each where all weights are 1; `change` multiplies by the coefficient."""
        return weights * (len(weights) * mean_weight)

    def change(self, updates: Updates, coefficients: Tensor, destination: Destination) -> Change:
        """Return theta* by way of the cores; the mean of what is no weight of a linear layer."""
        cores = updates.cores() if updates.is_linear else None
        if cores is None:
            return averaged(updates, coefficients, float(self.coefficient))
        c, sizes = coefficients.tolist(), updates.sizes
        tasks = [i for i in range(len(updates)) if c[i] != 0 and sizes[i] > 0]
        if not tasks:
            return updates.sum(coefficients)
        products = updates.products
        given = Tasks(
            [cores.matrices[i] for i in tasks],
            [c[i] for i in tasks],
            [None if products is None else products[i].rank for i in tasks],
            min(updates.shape),
            destination.rank,
            updates.tolerance,
        )
        # candidates of other coefficients have the same directions
        alike = replace(self, coefficient=1.0, validate=None, search=None)
        merged = updates.once((alike, tuple(c), destination.rank), partial(self.merged, given))
        return cores.lift((float(self.coefficient) * merged).to(cores.matrices[0].dtype))

    @abstractmethod
    def merged(self, tasks: Tasks) -> Tensor:
        """Return the core of theta* at coefficient 1, (p, q) float64."""
