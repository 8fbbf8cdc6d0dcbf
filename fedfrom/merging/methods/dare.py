"""DARE: drop most entries of each update at random, rescale the rest, then merge by another method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedfrom.merging.linalg.lowrank import random_uniform
from fedfrom.merging.methods.base import ProductMethod
from fedfrom.merging.methods.election import SignElection
from fedfrom.merging.methods.frobenius import FroM
from fedfrom.merging.methods.task_arithmetic import TaskArithmetic
from fedfrom.merging.methods.ties import check_density
from fedfrom.merging.updates import Change, Destination, Updates


def drop(delta: Tensor, density: float, seed: str) -> Tensor:
    """Return the delta with each entry kept with probability `density` and divided by it: in the mean, the delta.

    Parameters
    ----------
    delta : Tensor
        Any shape; not changed.
    density : float
        1 - p in the paper, 0 < density <= 1.
    seed : str
        The same mask on every machine for the same text.
    """
    if density == 1:
        return delta
    kept = random_uniform(delta.numel(), seed).to(delta.device).reshape(delta.shape) < density
    return torch.where(kept, delta / density, torch.zeros_like(delta))


@dataclass(frozen=True, kw_only=True)
class Dropping(ProductMethod):
    """Drops entries before the method that it is mixed into merges the rest (Yu et al., 2024, Eq. 3).

    A mask comes from the seed, the layer's name, the client's place in the order of the updates and the place of the
    block of entries: blocks can be drawn in any order.

    Parameters
    ----------
    density : float (default: 0.2)
        1 - p: the share of entries that is kept, 0 < density <= 1.
    """

    density: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density(self.density)

    def change(self, updates: Updates, coefficients: Tensor, destination: Destination) -> Change:
        """Return theta* of what is left of the updates."""

        def dropped(i: int, row: Tensor, start: int) -> Tensor:
            return drop(row, self.density, f"{self.seed}:{updates.name}:{i}:{start}")

        return super().change(updates.edited(dropped), coefficients, destination)


@dataclass(frozen=True, kw_only=True)
class Dare(Dropping, TaskArithmetic):
    """DARE (Yu et al., 2024, arXiv 2311.03099, Eq. 3), then Task Arithmetic.

    On dense products for adapters: O(n d_out d_in) a layer. Clients send nothing more than their state.

    Parameters
    ----------
    density : float (default: 0.2)
        1 - p: the share of entries that is kept, 0 < density <= 1.
    coefficient, form, examples_power, validate, search, rank, solver, iterations, tolerance, seed, gauge
        See `TaskArithmetic`.
    """


@dataclass(frozen=True, kw_only=True)
class DareTies(Dropping, SignElection, TaskArithmetic):
    """DARE in place of TIES' trimming: drop and rescale, then elect signs and take the disjoint mean, as PEFT does.

    Parameters
    ----------
    density, coefficient, form, examples_power, validate, search, rank, solver, iterations, tolerance, seed, gauge
        See `Dare`.
    majority : str (default: "total")
        See `Ties`.
    """


@dataclass(frozen=True, kw_only=True)
class DareFroM(Dropping, FroM):
    """DARE, then FroM.

    The weights are from the norms before dropping: it multiplies every squared norm by 1 / density in the mean, so they
    are the same up to chance.

    Parameters
    ----------
    density : float (default: 0.2)
        See `Dare`.
    k, coefficient, examples_power, scope, validate, search, rank, solver, iterations, tolerance, seed, gauge
        See `FroM`.
    """
