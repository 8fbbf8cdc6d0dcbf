"""DARE: drop most entries of each update at random, rescale the rest, then merge by another method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedfrom.merging.linalg.entries import Entries
from fedfrom.merging.linalg.lowrank import generator, random_uniform
from fedfrom.merging.methods.base import Context
from fedfrom.merging.methods.frobenius import FroM
from fedfrom.merging.methods.task_arithmetic import TaskArithmetic
from fedfrom.merging.methods.ties import check_density, elect_and_average


def drop(delta: Tensor, density: float, seed: str | torch.Generator) -> Tensor:
    """Return the delta with each entry kept with probability `density` and divided by it: in the mean, the delta.

    Parameters
    ----------
    delta : Tensor
        Any shape; not changed.
    density : float
        1 - p in the paper, 0 < density <= 1.
    seed : str | torch.Generator
        The same mask on every machine for the same text; a generator that started from it draws block after block.
    """
    if density == 1:
        return delta
    kept = random_uniform(delta.numel(), seed).to(delta.device).reshape(delta.shape) < density
    return torch.where(kept, delta / density, torch.zeros_like(delta))


@dataclass(frozen=True, kw_only=True)
class Dare(TaskArithmetic):
    """DARE (Yu et al., 2024, arXiv 2311.03099, Eq. 3), then Task Arithmetic.

    On dense products for adapters: O(n d_out d_in) a layer. The masks come from the seed, the layer's name and the
    client's place in the order of the norms. Clients send nothing more than their state.

    Parameters
    ----------
    density : float (default: 0.2)
        1 - p: the share of entries that is kept, 0 < density <= 1.
    coefficient, form, examples_power, rank, solver, iterations, tolerance, seed
        See `TaskArithmetic`.
    """

    linear: ClassVar[bool] = False
    entrywise: ClassVar[bool] = True
    density: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density(self.density)

    def prepare(self, entries: Entries, context: Context) -> Context:
        """Return the context with a generator for each client's mask."""
        return replace(context, draws=[generator(seed) for seed in _seeds(len(entries), self.seed, context)])

    def combine(self, deltas: list[Tensor], coefficients: Tensor, context: Context) -> Tensor:
        """Return theta*."""
        return super().combine(_drop_all(deltas, self.density, self.seed, context), coefficients, context)


@dataclass(frozen=True, kw_only=True)
class DareTies(Dare):
    """DARE in place of TIES' trimming: drop and rescale, then elect signs and take the disjoint mean, as PEFT does.

    Parameters
    ----------
    density, coefficient, form, examples_power, rank, solver, iterations, tolerance, seed
        See `Dare`.
    majority : str (default: "total")
        See `Ties`.
    """

    majority: str = "total"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.majority not in ("total", "frequency"):
            raise ValueError(f"majority: expected total or frequency, found {self.majority!r}")

    def combine(self, deltas: list[Tensor], coefficients: Tensor, context: Context) -> Tensor:
        """Return theta*."""
        dropped = _drop_all(deltas, self.density, self.seed, context)
        return elect_and_average(dropped, coefficients.tolist(), self.majority)


@dataclass(frozen=True, kw_only=True)
class DareFroM(FroM):
    """DARE, then FroM.

    The weights are from the norms before dropping: it multiplies every squared norm by 1 / density in the mean, so they
    are the same up to chance.

    Parameters
    ----------
    density : float (default: 0.2)
        See `Dare`.
    k, examples_power, scope, validate, search, rank, solver, iterations, tolerance, seed
        See `FroM`.
    """

    linear: ClassVar[bool] = False
    entrywise: ClassVar[bool] = True
    density: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density(self.density)

    def prepare(self, entries: Entries, context: Context) -> Context:
        """Return the context with a generator for each client's mask."""
        return replace(context, draws=[generator(seed) for seed in _seeds(len(entries), self.seed, context)])

    def combine(self, deltas: list[Tensor], coefficients: Tensor, context: Context) -> Tensor:
        """Return theta*."""
        return super().combine(_drop_all(deltas, self.density, self.seed, context), coefficients, context)


def _drop_all(deltas: list[Tensor], density: float, seed: int, context: Context) -> list[Tensor]:
    seeds: Sequence[str | torch.Generator] = context.draws or _seeds(len(deltas), seed, context)
    return [drop(delta, density, each) for delta, each in zip(deltas, seeds, strict=True)]


def _seeds(clients: int, seed: int, context: Context) -> list[str]:
    return [f"{seed}:{context.name}:{i}" for i in range(clients)]
