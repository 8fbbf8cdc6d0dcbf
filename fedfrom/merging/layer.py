"""One layer of a merge: its updates, what its clients weigh there, and the tensors and the report that come of it."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from fedfrom.merging.clients import Round
from fedfrom.merging.clipping import clip_factors
from fedfrom.merging.linalg.scale import power_of_two
from fedfrom.merging.report import LayerReport
from fedfrom.merging.sources import Inputs
from fedfrom.merging.updates import Change, Destination, Updates

if TYPE_CHECKING:
    from fedfrom.merging.stability import Weighing

MOST_COSINES = 32  # clients whose pairwise cosines a report holds: their number grows with the square


@dataclass(frozen=True)
class Merged:
    """One layer's merge, as `LayerUpdates.finish` returns it.

    Attributes
    ----------
    tensors : dict[str, Tensor]
        T by key: new memory, in the dtype and shapes in which the layer leaves.
    inner : float
        <sum_i w_i theta_i, theta*>, in units.
    square : float
        ||theta*||_F^2, in units.
    rank, residual, optimum, energy, iterations
        Of Eq. 6: see `Solution`. All 0 of plain tensors, whose T is exact.
    cosines : list[float]
        (n,) cos(theta_i, theta*), in the order of sums; empty where theta* is a weighted sum, of which the updates'
        inner products tell them.
    """

    tensors: dict[str, Tensor]
    inner: float
    square: float
    rank: int = 0
    residual: float = 0.0
    optimum: float = 0.0
    energy: float = 0.0
    iterations: int = 0
    cosines: list[float] = field(default_factory=list)


class LayerUpdates(Updates):
    """The updates of one layer that a merge reads and writes.

    Parameters
    ----------
    inputs : Inputs
        What the clients sent and were sent.
    name : str
        The layer.
    shared : Round
        What the clients share.

    Attributes
    ----------
    kind : str
        See `LayerReport`.
    has_reference : bool
        Whether the layer has a W.
    norms, clip_factors : list[float]
        (n,) ||theta_i||_F as sent, and what clipping multiplies them by, in the order in which clients were given.
    unit : float
        A power of two of about the layer's size: what is in units is divided by it, so that no square leaves float64's
        range.
    gram : Tensor | None
        (n, n) float64 inner products of the updates: of an adapter in units; of a plain tensor each row and column
        times any factor above 0, as its cosines alone are used. None where there is a sketch.
    sketch : Tensor | None
        (n, m) float64 numbers of each update whose inner products are about those of the updates.
    """

    kind: str
    has_reference: bool

    def __init__(self, inputs: Inputs, name: str, shared: Round) -> None:
        self.inputs, self.name, self.shared = inputs, name, shared

    def _clip(self, norms: list[float], clip: float | None, base: float = 0.0) -> None:
        """Set the norms, what clipping leaves of them, the unit, and the sizes in it; `order` is known.

        Parameters
        ----------
        norms : list[float]
            (n,) ||theta_i||_F as sent.
        clip : float | None
            The bound: see `clip_factors`.
        base : float (default: 0.0)
            ||W||_F, where the unit has to hold W too.
        """
        self.norms, self.clip_factors = norms, clip_factors(norms, clip)
        self.clipped_norms = [norm * factor for norm, factor in zip(norms, self.clip_factors, strict=True)]
        self.unit = power_of_two([*self.clipped_norms, base])
        self.sizes = [self.clipped_norms[i] / self.unit for i in self.order]

    @property
    @abstractmethod
    def gram(self) -> Tensor | None: ...

    @property
    @abstractmethod
    def sketch(self) -> Tensor | None: ...

    @property
    @abstractmethod
    def ranks(self) -> list[int]:
        """Of the clients' adapters, in the order in which clients were given; empty of a plain tensor."""

    @abstractmethod
    def destination(self, weighing: Weighing) -> Destination:
        """Return where the layer is going."""

    @abstractmethod
    def finish(self, change: Change, weighing: Weighing, destination: Destination) -> Merged:
        """Return T = W + alpha theta*, of an adapter solved back to its rank (Eq. 6)."""

    def merge(self, weighing: Weighing) -> tuple[dict[str, Tensor], LayerReport]:
        """Return what a method with these weights makes of the layer: tensors by key, and the report."""
        destination = self.destination(weighing)
        change = weighing.method.change(self, weighing.coefficients, destination)
        merged = self.finish(change, weighing, destination)
        return merged.tensors, self._report(weighing, merged, change)

    def multiple(self, coefficients: Tensor, weights: Tensor) -> float | None:
        """Return f where sum_i c_i theta_i is f times the weighted mean sum_i w_i theta_i; None where it is not."""
        if coefficients is weights:  # as of most methods
            return 1.0
        pairs = list(zip(coefficients.tolist(), weights.tolist(), self.sizes, strict=True))
        c, w = [c for c, _, size in pairs if size > 0], [w for _, w, size in pairs if size > 0]
        total = math.fsum(w)
        if total == 0:
            return None if any(c) else 0.0
        f = math.fsum(c) / total
        return f if all(abs(c_i - f * w_i) <= 1e-9 * abs(f) for c_i, w_i in zip(c, w, strict=True)) else None

    @property
    def is_update(self) -> bool:
        """Whether there is an update that a norm could weigh, and the server scale."""
        return True

    def _cosines_to(self, change: Change, weighing: Weighing, merged: Merged) -> list[float]:
        """Return (n,) cos(theta_i, theta*), in the order of sums; empty where that is not known."""
        if change.coefficients is None:
            return merged.cosines
        if weighing.cosines is None:
            return []
        c = [own * size for own, size in zip(change.coefficients.tolist(), self.sizes, strict=True)]
        most = max(map(abs, c)) or 1.0  # in units of it no square leaves float64's range
        parts = np.array([own / most for own in c])
        inner = weighing.cosines @ parts
        square = float(parts @ inner)  # of the same entries as the cosines, so that none is above 1
        scale = 1 / math.sqrt(square) if square > 0 else 0.0
        return [min(1.0, max(-1.0, x * scale)) for x in inner.tolist()]

    def _report(self, weighing: Weighing, merged: Merged, change: Change) -> LayerReport:
        squares = self.weighted_energy(weighing.weights)  # sum_i w_i ||theta_i||^2
        spread = max(0.0, squares - 2 * merged.inner + merged.square)  # sum_i w_i ||theta_i - theta*||^2
        place = sorted(range(len(self)), key=self.order.__getitem__)
        k, weights, cosines = weighing.method.k, weighing.weights.tolist(), weighing.cosines
        size = math.fsum(self.sizes) / len(self)
        to_merged = self._cosines_to(change, weighing, merged) if self.is_update else []
        return LayerReport(
            name=self.name,
            kind=self.kind,
            norms=self.norms,
            weights=[weights[i] for i in place],
            clients_effective=weighing.clients_effective,
            has_reference=self.has_reference,
            ranks_in=self.ranks,
            rank_out=merged.rank,
            energy_dropped=merged.residual / merged.energy if merged.energy else 0.0,
            objective=(merged.residual + weighing.server_lr**2 * spread) * self.unit * self.unit,
            excess=max(0.0, merged.residual - merged.optimum) / squares if squares else 0.0,
            interference=spread / squares if squares else 0.0,
            iterations=merged.iterations,
            lambda_max=weighing.lambda_max,
            cosines=[] if cosines is None or len(place) > MOST_COSINES else cosines[place][:, place].tolist(),
            size_ratio=math.sqrt(merged.square) / size if self.is_update and size > 0 else 0.0,
            cosines_merged=[to_merged[i] for i in place] if to_merged else [],
            k="infinity" if k == float("inf") else k,
            server_lr=weighing.server_lr,
            step=weighing.method.step,
            clipped=[] if all(factor == 1.0 for factor in self.clip_factors) else self.clip_factors,
        )
