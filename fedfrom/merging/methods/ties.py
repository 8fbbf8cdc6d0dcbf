"""TIES: trim each update to its largest entries, elect a sign for each entry, average those that agree with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedfrom.merging.linalg.entries import Entries
from fedfrom.merging.methods.base import Context, ProductMethod
from fedfrom.merging.weights import SCOPES


def check_density(density: float) -> None:
    """Raise ValueError where the share of entries to keep is not in (0, 1]."""
    if not 0 < density <= 1:
        raise ValueError(f"density: expected a share of the entries to keep, 0 < density <= 1, found {density}")


def trim(delta: Tensor, density: float) -> Tensor:
    """Return the delta with its floor(density * numel) largest entries by magnitude, 0 elsewhere; new memory.

    float32 or float64. Of entries that are equally large, the first in C order are kept.
    """
    flat = delta.reshape(-1)
    least, end = Entries([flat], [None], [1.0], flat.dtype).threshold(0, int(density * flat.numel()))
    return keep_from(flat, least, end).reshape(delta.shape)


def keep_from(delta: Tensor, threshold: float, end: int | None = None) -> Tensor:
    """Return the delta with its entries of at least that magnitude, 0 elsewhere; new memory.

    Parameters
    ----------
    delta : Tensor
        A row, where an end is given.
    end : int | None
        Those that equal the threshold are kept before this position, in C order, alone; None: all are.
    """
    magnitudes = delta.abs()
    kept = magnitudes >= threshold
    if end is not None and end < delta.numel():
        end = max(0, end)
        kept.view(-1)[end:] = magnitudes.view(-1)[end:] > threshold
    return delta * kept


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
class Ties(ProductMethod):
    """TIES-Merging (Yadav et al., 2023, arXiv 2306.01708, Algorithm 1), in PEFT's convention.

    A tensor is merged a block at a time, in two passes over it for the thresholds and one for the rest. Of entries that
    are equally large the first are kept, in C order; in the scope "model" all of them.

    Elementwise, so adapters go through their dense products: O(n d_out d_in) time and memory a layer, and a dense SVD
    to solve them back. Clients send nothing more than their state.

    Parameters
    ----------
    density : float (default: 0.2)
        Share of entries that are kept, 0 < density <= 1.
    scope : str (default: "layer")
        Where the largest entries are sought: "layer", PEFT's, or "model", the paper's, over the whole update.
    majority : str (default: "total")
        The elected sign: "total", of the sum, the paper's, or "frequency", of most.
    coefficient : float (default: 1.0)
        The paper's lambda.
    examples_power : float (default: 0.0)
        p: client i's entries are multiplied by n_i^p relative to the clients' mean, after the election. `merge`'s
        `weights` multiply them then too, as in PEFT, and are not divided by their sum: a client of weight 0 still
        votes, and is counted.
    rank, solver, iterations, tolerance, seed
        See `Solver`.
    """

    linear: ClassVar[bool] = False
    entrywise: ClassVar[bool] = True

    density: float = 0.2
    scope: str = "layer"  # type: ignore[misc]
    majority: str = "total"
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density(self.density)
        if self.scope not in SCOPES:
            raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, found {self.scope!r}")
        if self.majority not in ("total", "frequency"):
            raise ValueError(f"majority: expected total or frequency, found {self.majority!r}")
        if not math.isfinite(self.coefficient):
            raise ValueError(f"coefficient: expected a finite number, found {self.coefficient}")

    def coefficients(self, weights: Tensor, mean_weight: float = 1.0) -> Tensor:
        """Return (n,) float64: lambda each where all weights are 1."""
        return self.coefficient * weights * (len(weights) * mean_weight)

    def kept(self, entries: int) -> int:
        """Return how many of so many entries are kept."""
        return int(self.density * entries)

    def prepare(self, entries: Entries, context: Context) -> Context:
        """Return the context with the thresholds of this tensor, where the whole model has none.

        Exact, and a block at a time: see `kth_largest`.
        """
        if context.thresholds is not None:
            return context
        found = [entries.threshold(i, self.kept(entries.numel())) for i in range(len(entries))]
        return replace(context, thresholds=[least for least, _ in found], ends=[end for _, end in found])

    def combine(self, deltas: list[Tensor], coefficients: Tensor, context: Context) -> Tensor:
        """Return theta* by trim, elect and disjoint mean."""
        if context.thresholds is None:
            deltas = [trim(delta, self.density) for delta in deltas]
        else:
            ends = [None] * len(deltas) if context.ends is None else [end - context.start for end in context.ends]
            deltas = list(map(keep_from, deltas, context.thresholds, ends))
        return elect_and_average(deltas, coefficients.tolist(), self.majority)
