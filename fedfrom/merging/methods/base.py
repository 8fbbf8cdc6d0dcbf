"""What every merging method is: weights for the clients, and a way to combine their deltas of one layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedfrom.merging.linalg.entries import Entries
from fedfrom.merging.linalg.lowrank import LowRank
from fedfrom.merging.solve import Solver
from fedfrom.merging.weights import check_weighting, weights


@dataclass(frozen=True)
class Survey:
    """What a method of scope "model" learnt of the clients' whole updates, in the order given; empty for "layer".

    Attributes
    ----------
    norms : list[float] | None
        (n,) norms of the whole updates, which every layer is weighed by.
    thresholds : list[float] | None
        One magnitude a client, which the entries that TIES keeps reach.
    """

    norms: list[float] | None = None
    thresholds: list[float] | None = None


@dataclass(frozen=True)
class Context:
    """What a method may need to know of the layer it combines.

    Attributes
    ----------
    name : str
        The layer's name: seeds draws.
    statistics : list[Tensor] | None
        What the clients sent beside the layer, in the order of the deltas: see the method's `needs`.
    thresholds : list[float] | None
        One magnitude a client, which the entries that TIES keeps reach, in the order and unit of the deltas.
    ends : list[int] | None
        One position a client, in C order: entries that equal the threshold are kept before it alone. None: all are.
    draws : list[torch.Generator] | None
        One a client, where DARE's masks are drawn block by block; None: from the name.
    start : int
        Position of the deltas' first entry, where they are a block of a tensor.
    rank : int | None
        Rank that the adapter will be solved back to, where it is known.
    base : LowRank | None
        W of a LoRA module, in the unit of the deltas; None is zero.
    server_lr : float
        alpha.
    tolerance : float
        Share of the largest singular value of a LoRA module's deltas at and below which a direction is rounding.
    """

    name: str = ""
    statistics: list[Tensor] | None = None
    thresholds: list[float] | None = None
    ends: list[int] | None = None
    draws: list[torch.Generator] | None = None
    start: int = 0
    rank: int | None = None
    base: LowRank | None = None
    server_lr: float = 1.0
    tolerance: float = 0.0

    def block(self, start: int, stop: int) -> Context:
        """Return what a method may need to know of a block of a tensor's entries, in C order."""
        statistics = self.statistics
        if statistics is not None:
            statistics = [each.reshape(-1)[start:stop] for each in statistics]
        return replace(self, statistics=statistics, start=start)


@dataclass(frozen=True, kw_only=True)
class Method:
    """The (example-weighted) mean of the deltas, and the base of the other methods.

    Parameters
    ----------
    examples_power : float (default: 0.0)
        p: client i weighs n_i^p.
    """

    k: ClassVar[float] = 0.0  # power of the norm in the weights
    scope: ClassVar[str] = "layer"
    on_factors: ClassVar[bool] = False  # whether A and B are merged apart, as plain tensors
    linear: ClassVar[bool] = True  # whether theta* is sum_i c_i theta_i, so that nothing else is ever formed
    # whether an entry of theta* depends on the deltas' entries there alone, given `prepare`: so tensors go in blocks
    entrywise: ClassVar[bool] = False
    is_mean: ClassVar[bool] = False  # whether theta* is the clients' mean, which is theirs without a reference too
    needs: ClassVar[str | None] = None  # the statistics that clients must send: "gram" or "fisher"
    validate: ClassVar[Any] = None  # a user's function that scores merged states

    examples_power: float = 0.0

    def __post_init__(self) -> None:
        check_weighting(self.k, self.examples_power, self.scope)

    def select(
        self, weights: Sequence[float], merged: Callable[[list[int], Method], Mapping[str, Tensor]]
    ) -> tuple[list[int], Method] | None:
        """Return which clients are merged, in the order given, and by which method; None is all, and this one.

        Parameters
        ----------
        weights : Sequence[float]
            (n,) u_i, the user's own weights; 1 each where there are none.
        merged : Callable[[list[int], Method], Mapping[str, Tensor]]
            The merged state of some of the clients by a method.
        """
        return None

    def candidates(self) -> Sequence[Method]:
        """Return the methods that this one chooses from by validation, k ascending; itself where there is no choice."""
        return [self]

    def best(self, states: Sequence[Mapping[str, Tensor]]) -> tuple[int, list[tuple[float, float]]]:
        """Return the place of the candidate that is taken, and the k and the score of each where they were scored.

        Parameters
        ----------
        states : Sequence[Mapping[str, Tensor]]
            What each of `candidates` merged.
        """
        return 0, []

    def settings(self) -> dict[str, Any]:
        """Return the name and the options as plain types, functions left out."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {name: "infinity" if value == math.inf else value for name, value in options.items()}
        return {"name": type(self).__name__, **{name: v for name, v in plain.items() if name != "validate"}}

    def weights(
        self, norms: Sequence[float], examples: Sequence[float] | None, given: Sequence[float] | None = None
    ) -> Tensor:
        """Return (n,) float64 weights, summing to 1, of deltas with these norms; `given` are the user's own."""
        return weights(norms, self.k, examples, self.examples_power, given)

    def coefficients(self, weights: Tensor, mean_weight: float = 1.0) -> Tensor:
        """Return (n,) float64 c_i, what theta_i is multiplied by.

        Parameters
        ----------
        weights : Tensor
            (n,) float64 w_i, summing to 1.
        mean_weight : float (default: 1.0)
            The mean of the user's own weights (see `weights.mean_weight`): a method that does not normalise multiplies
            by it, since the w_i have lost it.
        """
        return weights

    def statistics_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of what a client sends beside a layer of this shape, (d_out, d_in) for a LoRA module."""
        return shape

    def prepare(self, entries: Entries, context: Context) -> Context:
        """Return the context with what `combine` has to know of the whole tensor before it is given blocks of it."""
        return context

    def combine(self, deltas: list[Tensor], coefficients: Tensor, context: Context) -> Tensor:
        """Return theta* of one layer's deltas, dense tensors of one shape; they may be overwritten."""
        return torch.stack([c * delta for c, delta in zip(coefficients.tolist(), deltas, strict=True)]).sum(dim=0)


@dataclass(frozen=True, kw_only=True)
class ProductMethod(Method, Solver):
    """A method that merges adapters as products, and solves the result back to a rank (Eq. 6)."""

    def __post_init__(self) -> None:
        Method.__post_init__(self)
        Solver.__post_init__(self)

    def combine_products(self, deltas: list[LowRank], coefficients: Tensor, context: Context) -> LowRank:
        """Return theta* of one LoRA module's deltas; a method that is not linear goes through dense matrices."""
        if self.linear:
            return LowRank.sum(deltas, coefficients.tolist())
        return LowRank.from_dense(self.combine([delta.dense() for delta in deltas], coefficients, context))
