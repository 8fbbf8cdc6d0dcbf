"""KnOTS: the updates in one shared basis, so that what is merged there is aligned."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fedfrom.merging.linalg.alignment import align
from fedfrom.merging.linalg.lowrank import LowRank
from fedfrom.merging.methods.base import ProductMethod
from fedfrom.merging.methods.dare import DareTies
from fedfrom.merging.methods.task_arithmetic import TaskArithmetic
from fedfrom.merging.methods.ties import Ties
from fedfrom.merging.updates import Change, DenseChange, DenseUpdates, Destination, Updates

CONVENTIONS = ("paper", "released")
_RELEASED_CUT = 1e-5  # of the released code: singular values up to it are left out, whatever the unit


class Aligned(ProductMethod):
    """Merges the V_i of LoRA modules by the method that it is mixed into, which gets plain tensors as they are."""

    convention: ClassVar[str] = "paper"

    def change(self, updates: Updates, coefficients: Tensor, destination: Destination) -> Change:
        """Return theta* = U diag(S) V, V the merged V_i; as released U V, V the merged diag(S) V_i."""
        if updates.products is None:
            return super(Aligned, self.knowing(None)).change(updates, coefficients, destination)
        left, parts = updates.once(("knots", self.convention), partial(self.aligned, updates))
        if left.shape[1] == 0:
            return updates.sum(torch.zeros_like(coefficients))
        # what is known goes by client as given, the parts by the order of sums
        known = None if self.known is None else [self.known[i] / updates.entry_unit for i in updates.order]
        V = super(Aligned, self.knowing(known)).change(parts, coefficients, destination)
        assert isinstance(V, DenseChange)  # as `DenseUpdates` give it
        return updates.formed(LowRank(left, V.tensor))

    def aligned(self, updates: Updates) -> tuple[Tensor, DenseUpdates]:
        """Return (U diag(S), the V_i) of a LoRA module, as released (U, the diag(S) V_i); in units."""
        assert updates.products is not None
        if self.convention == "paper":
            U, S, parts = align(updates.products, updates.tolerance)
            return U * S, DenseUpdates(parts, updates.name)
        U, S, parts = align(updates.products)
        kept = int((S * updates.entry_unit > _RELEASED_CUT).sum())
        return U[:, :kept], DenseUpdates([S[:kept, None] * V_i[:kept] for V_i in parts], updates.name)


@dataclass(frozen=True, kw_only=True)
class AlignedEntries(Aligned):
    """KnOTS before a method that looks at entries, to which it matters whether S is on them.

    Parameters
    ----------
    convention : str (default: "paper")
        "paper": the V_i are merged without S and trimmed layer by layer; directions that are rounding in the inputs'
        dtype are left out. "released" (github.com/gstoica27/KnOTS): diag(S) V_i are merged, trimmed over all LoRA
        modules at once (plain tensors each for itself), and directions with S <= 1e-5 left out. Where that code
        differs further, this one keeps to `Ties`: even elections go to +, not to the sign of most entries, and
        the floor of density times the entries are kept, not one more.
    """

    convention: str = "paper"  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.convention not in CONVENTIONS:
            raise ValueError(f"convention: expected one of {', '.join(CONVENTIONS)}, found {self.convention!r}")


@dataclass(frozen=True, kw_only=True)
class KnotsTA(TaskArithmetic):
    """KnOTS (Stoica et al., 2025, arXiv 2410.19735), then Task Arithmetic: Task Arithmetic by another name.

    U diag(S) sum_i c_i V_i is sum_i c_i theta_i, so the sum is formed without the basis.

    Parameters
    ----------
    coefficient, form, examples_power, validate, search, rank, solver, iterations, tolerance, seed, gauge
        See `TaskArithmetic`.
    """


@dataclass(frozen=True, kw_only=True)
class KnotsTies(AlignedEntries, Ties):
    """KnOTS (Stoica et al., 2025, arXiv 2410.19735), then TIES on the V parts.

    As released the entries of all layers' diag(S) V_i are held at once while the thresholds are sought: n R d_in
    numbers a layer, R the sum of the clients' ranks. `align` then runs twice a layer.

    Parameters
    ----------
    convention : str (default: "paper")
        See `AlignedEntries`.
    density, majority, coefficient, examples_power, validate, search, rank, solver, iterations, tolerance, seed, gauge
        See `Ties`; entries are trimmed by layer in the paper's convention, as V's are not comparable between layers.
    scope : str (default: "layer")
        That, and nothing else: over all layers is convention="released".
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope != "layer":
            raise ValueError(
                f"scope: expected layer for KnOTS, which trims over all layers with convention='released', found "
                f"{self.scope!r}"
            )

    def survey(self, layers: Iterable[Updates]) -> list[float] | None:
        """Return (n,) the magnitude that the kept entries of each client's diag(S) V_i of all layers reach."""
        if self.convention == "paper":
            return None
        magnitudes: dict[int, list[Tensor]] = {}
        for layer in layers:
            if layer.products is not None:
                for place, part in zip(layer.order, self.aligned(layer)[1].matrices(), strict=True):
                    magnitudes.setdefault(place, []).append(part.abs().flatten() * layer.entry_unit)

        def threshold(place: int) -> float:
            every = torch.cat(magnitudes.pop(place))
            kept = int(self.density * len(every))
            return float(every.kthvalue(len(every) - kept + 1).values) if kept else math.inf

        return [threshold(place) for place in sorted(magnitudes)] or None


@dataclass(frozen=True, kw_only=True)
class KnotsDareTies(AlignedEntries, DareTies):
    """KnOTS (Stoica et al., 2025, arXiv 2410.19735), then DARE and TIES' election on the V parts.

    Parameters
    ----------
    convention : str (default: "paper")
        See `AlignedEntries`.
    density, majority, coefficient, form, examples_power, validate, search
    rank, solver, iterations, tolerance, seed, gauge
        See `DareTies`.
    """
