"""TIES: trim each update to its largest entries, elect a sign for each entry, average those that agree with it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedfrom.merging.linalg.entries import Histogram, kth_largest
from fedfrom.merging.methods.choosing import Chooses
from fedfrom.merging.methods.election import SignElection
from fedfrom.merging.methods.task_arithmetic import check_coefficient
from fedfrom.merging.updates import Change, Destination, Updates
from fedfrom.numeric import is_number


def check_density(density: float) -> None:
    """Raise ValueError where the share of entries to keep is not in (0, 1]."""
    if not is_number(density) or not 0 < density <= 1:
        raise ValueError(
            f"density: expected a number, the share of the entries to keep, 0 < density <= 1, found {density!r}"
        )


def keep_from(row: Tensor, threshold: float, end: int) -> Tensor:
    """Return a row of entries with those of at least that magnitude, 0 elsewhere; new memory.

    Parameters
    ----------
    row : Tensor
        (entries,).
    threshold : float
        The magnitude.
    end : int
        From this place on an entry that equals the threshold is not kept.
    """
    magnitudes = row.abs()
    kept = magnitudes >= threshold
    if end < len(row):
        end = max(0, end)
        kept[end:] = magnitudes[end:] > threshold
    return row * kept


@dataclass(frozen=True, kw_only=True)
class Ties(SignElection, Chooses):
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
    coefficient : float | str (default: 1.0)
        The paper's lambda; "auto" chooses it by `validate`: see `TaskArithmetic`.
    examples_power : float (default: 0.0)
        p: client i's entries are multiplied by n_i^p relative to the clients' mean, after the election. `merge`'s
        `weights` multiply them then too, as in PEFT, and are not divided by their sum: a client of weight 0 still
        votes, and is counted.
    validate, search
        See `Chooses`.
    rank, solver, iterations, tolerance, seed, gauge
        See `Solver`.
    """

    density: float = 0.2
    scope: str = "layer"  # type: ignore[misc]
    coefficient: float | str = 1.0  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density(self.density)
        check_coefficient(self.coefficient)

    def coefficients(self, weights: Tensor, mean_weight: float = 1.0) -> Tensor:
        """Return (n,) float64: lambda each where all weights are 1."""
        return float(self.coefficient) * weights * (len(weights) * mean_weight)

    def change(self, updates: Updates, coefficients: Tensor, destination: Destination) -> Change:
        """Return theta* by trim, elect and disjoint mean."""
        if self.known is None:
            count = int(self.density * updates.numel)
            # candidates of other coefficients keep the same entries
            kept = updates.once(("largest", count), lambda: [updates.largest(i, count) for i in range(len(updates))])
        else:
            kept = [(self.known[i] / updates.entry_unit, updates.numel) for i in updates.order]

        def trim(i: int, row: Tensor, start: int) -> Tensor:
            least, end = kept[i]
            return keep_from(row, least, end - start)

        return super().change(updates.edited(trim), coefficients, destination)

    def survey(self, layers: Iterable[Updates]) -> list[float] | None:
        """Return (n,) the magnitude that the kept entries of each client's whole update reach, with scope="model".

        In the order in which clients were given.
        """
        if self.scope != "model":
            return None
        found = [(layer.numel, layer.dtype, len(layer)) for layer in layers]
        if not found:
            return None
        kept = int(self.density * sum(numel for numel, _, _ in found))
        dtype = torch.float64 if any(own == torch.float64 for _, own, _ in found) else torch.float32

        def threshold(client: int) -> float:
            def counts(histogram: Histogram) -> Iterator[Tensor]:
                for layer in layers:
                    yield from layer.counts(layer.order.index(client), histogram, dtype)

            return kth_largest(counts, kept, dtype)[0] if kept else math.inf

        return [threshold(client) for client in range(found[0][2])]
