"""What a merge did, layer by layer, as plain numbers that json can write."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np

from fedfrom.merging.linalg.scale import power_of_two


@dataclass(frozen=True)
class LayerReport:
    """One layer's merge.

    Attributes
    ----------
    name : str
        Module path of an adapter, key of a plain tensor.
    kind : str
        "adapter", "tensor", "buffer" (a running statistic: the mean, after clipping) or "kept" (integers).
    norms : list[float]
        ||theta_i||_F by client, in the order given; empty where nothing is weighed.
    weights : list[float]
        w_i by client, summing to 1.
    clients_effective : float
        1 / sum w_i^2: n for equal weights, 1 where one client has all.
    has_reference : bool
        False: a plain tensor without a reference has no delta and is merged with k = 0; an adapter's is zero.
    ranks_in : list[int]
        By client; empty for plain tensors.
    rank_out : int
        Rank that Eq. 6 was solved at; 0 for plain tensors.
    energy_dropped : float
        Share of ||T||_F^2 that the truncation to rank_out loses, in [0, 1]. Of adapters of so many clients that no
        matrix is formed (135 on a layer of 4096 x 4096) this, `objective` with a reference and the merge's own
        share of `interference` hold an estimate of what lies beyond the leading directions, some percent off at most.
    objective : float
        Eq. 6 (for plain tensors Eq. 5's): sum_i w_i ||merged - T_i||_F^2.
    excess : float
        How far the objective is above that of the best matrix of this rank, relative to sum_i w_i ||theta_i||_F^2.
    interference : float
        sum_i w_i ||theta* - theta_i||^2 / sum_i w_i ||theta_i||^2: the share of the updates' energy that the merge
        loses, in [0, 1] for FroM and averages; 0 where all updates are alike.
    iterations : int
        Of Algorithm 1.
    lambda_max : float
        Largest eigenvalue of the weighted cosine Gram matrix sqrt(w_i w_j) cos(theta_i, theta_j), in [0, 1]: 1 where
        all updates lie on one line, whatever their signs. Of tensors above 2^16 entries, on an even 2^14 of them; of
        adapters of more than 32 clients, of 2^10 random projections, which read up to a fifth too high.
    cosines : list[list[float]]
        cos(theta_i, theta_j) by client, in the order given, of the same entries; empty above 32 clients.
    size_ratio : float
        ||theta*||_F / mean_i ||theta_i||_F, after clipping; 0 where all of them are zero, or none is an update.
    cosines_merged : list[float]
        cos(theta_i, theta*) by client, in the order given, of the same entries; 0 for a zero update. Empty where theta*
        is a weighted sum of adapters of more than 32 clients, and where nothing is an update.
    k : float
        Power of the norm in the weights: with k="auto" what the layer allows; infinity reads "infinity".
    server_lr : float
        alpha: with server_lr="safe" what the layer allows.
    step : float
        What FroM's coefficient multiplies the weighted mean by, without its sign; 1 with other methods.
    clipped : list[float]
        By client, what its update was multiplied by, 1 where it was not clipped; empty where nothing is clipped.
    """

    name: str
    kind: str
    norms: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    clients_effective: float = 0.0
    has_reference: bool = True
    ranks_in: list[int] = field(default_factory=list)
    rank_out: int = 0
    energy_dropped: float = 0.0
    objective: float = 0.0
    excess: float = 0.0
    interference: float = 0.0
    iterations: int = 0
    lambda_max: float = 0.0
    cosines: list[list[float]] = field(default_factory=list)
    size_ratio: float = 0.0
    cosines_merged: list[float] = field(default_factory=list)
    k: float | str = 0.0
    server_lr: float = 1.0
    step: float = 1.0
    clipped: list[float] = field(default_factory=list)

    @property
    def is_update(self) -> bool:
        """Whether clients' updates were weighed here: not for buffers, nor for tensors without a reference."""
        return self.kind == "adapter" or (self.kind == "tensor" and self.has_reference)


@dataclass(frozen=True, repr=False)
class MergeReport:
    """What `merge` did. `print(report.summary())` says it in a few lines.

    Attributes
    ----------
    method : dict[str, Any]
        The method's name and settings.
    clients : list[str]
        Names of the clients, in the order of every list in the layers.
    layers : list[LayerReport]
        In the order of the state.
    validation : list[tuple[float, ...]]
        Where options were chosen by validation, what was tried and how it scored: a row (value of each option in
        `searched`, score) for each candidate, with k="auto" (k, score). `method` has what was taken.
    searched : list[str]
        The options that were chosen by validation: what the columns of `validation` are, but for the last.
    config : dict[str, Any] | None
        The adapter config that goes with the merged state, where configs were given.
    """

    method: dict[str, Any]
    clients: list[str]
    layers: list[LayerReport]
    config: dict[str, Any] | None = None
    validation: list[tuple[float, ...]] = field(default_factory=list)
    searched: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        name, clients, layers = self.method["name"], len(self.clients), len(self.layers)
        return f"<MergeReport: {name}, {clients} clients, {layers} layers; summary() says more>"

    def summary(self) -> str:
        """Return the clients' weights, their cosines, interference and what the rank costs, in lines of 80 columns."""
        from fedfrom.merging.summary import summary  # which imports this module

        return summary(self)

    @property
    def adapters(self) -> list[LayerReport]:
        """The layers that were merged as products, which have a rank; full models have none."""
        return [layer for layer in self.layers if layer.kind == "adapter"]

    @property
    def has_rank(self) -> bool:
        """Whether a rank applies: to adapters, which are merged as products, or to any matrix by CtM."""
        return self.method["name"] == "CtM" or bool(self.adapters)

    @property
    def interference(self) -> float:
        """Squared distance of the merge to all updates, over their weighted energy: see `LayerReport.interference`."""
        unit = self._unit()
        energies = [
            (sum(w * (n / unit * c) ** 2 for w, n, c in zip(la.weights, la.norms, _clipped(la), strict=True)), la)
            for la in self.layers
            if la.is_update
        ]
        total = sum(energy for energy, _ in energies)
        return sum(energy * layer.interference for energy, layer in energies) / total if total else 0.0

    def cosines(self) -> list[list[float]]:
        """Return cosines of the clients' whole updates as sent, n x n; empty above 32 clients and without updates."""
        layers = [layer for layer in self.layers if layer.is_update and layer.cosines]
        if not layers:
            return []
        norms = np.array([layer.norms for layer in layers]) / self._unit()
        inner = (np.array([layer.cosines for layer in layers]) * norms[:, :, None] * norms[:, None, :]).sum(axis=0)
        scale = np.array([1 / math.sqrt(square) if square > 0 else 0.0 for square in inner.diagonal().tolist()])
        return (inner * scale[:, None] * scale).tolist()

    def _unit(self) -> float:
        """Return a power of two of about the largest norm's size, so that squares stay in range."""
        return power_of_two([0.0, *(norm for layer in self.layers for norm in layer.norms)])

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and numbers, the whole updates' interference and cosines among them."""
        return {**asdict(self), "interference": self.interference, "cosines": self.cosines()}

    @classmethod
    def from_dict(cls, report: Mapping[str, Any]) -> Self:
        """Return the report whose `to_dict` this is."""
        layers = [LayerReport(**layer) for layer in report["layers"]]
        own = {name: report[name] for name in ("method", "clients", "config")}
        searched = report.get("searched", ["k"] if report["validation"] else [])  # reports had k alone
        return cls(**own, layers=layers, validation=[tuple(row) for row in report["validation"]], searched=searched)


def _clipped(layer: LayerReport) -> list[float]:
    return layer.clipped or [1.0] * len(layer.norms)
