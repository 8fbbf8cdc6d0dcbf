"""What every merging method is: weights for the clients, and a way to combine their updates of one layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from torch import Tensor

from fedfrom.merging.solve import Solver
from fedfrom.merging.updates import Change, Destination, Updates
from fedfrom.merging.weights import check_weighting, log_shares, normalised
from fedfrom.numeric import plain


class Traits:
    """What a method is where its class does not say otherwise: a class variable, or an option of the same name.

    No dataclass, so that these are no fields, which would hide the options of the methods that a method is mixed of.
    """

    k: ClassVar[float] = 0.0  # power of the norm in the weights
    scope: ClassVar[str] = "layer"
    validate: ClassVar[Any] = None  # a user's function that scores merged states
    search: ClassVar[Any] = None  # the values to try of each option that is chosen by it
    coefficient: ClassVar[Any] = 1.0  # what some methods multiply their result by
    step: ClassVar[float] = 1.0  # what theta* is, times the weighted mean, where the bounds on rounds know it
    on_factors: ClassVar[bool] = False  # whether A and B are merged apart, as plain tensors
    is_mean: ClassVar[bool] = False  # whether theta* is the clients' mean; files/merge.py then needs no base model
    needs: ClassVar[str | None] = None  # the statistics that clients must send: "gram" or "fisher"


@dataclass(frozen=True, kw_only=True)
class Method(Traits):
    """The (example-weighted) mean of the updates, and the base of the other methods.

    A method that differs in the weights overrides `weights`, one that combines updates in another way `change`. The
    other functions are hooks that most methods leave alone. Derive from `ProductMethod`, unless A and B are merged
    apart (`on_factors`).

    Parameters
    ----------
    examples_power : float (default: 0.0)
        p: client i weighs n_i^p.
    """

    examples_power: float = 0.0
    known: Any = field(default=None, init=False, repr=False, compare=False)  # what `survey` returned

    def __post_init__(self) -> None:
        for option in fields(self):
            object.__setattr__(self, option.name, plain(getattr(self, option.name)))
        check_weighting(self.k, self.examples_power, self.scope)

    def weights(self, updates: Updates, examples: Sequence[float] | None, given: Sequence[float] | None) -> Tensor:
        """Return (n,) float64 weights, summing to 1.

        Parameters
        ----------
        updates : Updates
            The layer's updates; all sequences are in their order.
        examples : Sequence[float] | None
            (n,) n_i; None takes all for equal.
        given : Sequence[float] | None
            (n,) u_i, the user's own weights; None is 1 each.
        """
        return normalised(log_shares(len(updates), examples, self.examples_power, given))

    def coefficients(self, weights: Tensor, mean_weight: float = 1.0) -> Tensor:
        """Return (n,) float64 c_i, what theta_i is multiplied by.

        Parameters
        ----------
        weights : Tensor
            (n,) float64 w_i, summing to 1.
        mean_weight : float (default: 1.0)
            The mean of the user's own weights (see `weights.mean_weight`). A method that does not divide by their sum
            multiplies by it, since the w_i have lost it.
        """
        return weights

    def change(self, updates: Updates, coefficients: Tensor, destination: Destination) -> Change:
        """Return theta* of one layer.

        Parameters
        ----------
        updates : Updates
            theta_i.
        coefficients : Tensor
            (n,) float64 c_i. 0 for a client of weight 0: a method that does not multiply by c_i leaves it out itself.
        destination : Destination
            What is made of theta*.
        """
        return updates.sum(coefficients)

    def survey(self, layers: Iterable[Updates]) -> Any:
        """Return what the method has to know of all layers before the first is merged; it is `known` from then on.

        Parameters
        ----------
        layers : Iterable[Updates]
            Those with an update. Each pass reads them anew, one at a time.
        """
        return None

    def knowing(self, known: Any) -> Self:
        """Return this method with what its survey returned."""
        method = copy.copy(self)
        object.__setattr__(method, "known", known)
        return method

    def select(
        self, weights: Sequence[float], merged: Callable[[list[int], Method], Mapping[str, Tensor]]
    ) -> tuple[list[int], Method] | None:
        """Return which clients are merged, in the order given, and by which method; None is all, and this one.

        Parameters
        ----------
        weights : Sequence[float]
            (n,) u_i, the user's own weights, or 1 each.
        merged : Callable[[list[int], Method], Mapping[str, Tensor]]
            The merged state of some of the clients by a method.
        """
        return None

    def candidates(self) -> Sequence[Method]:
        """Return the methods that this one chooses from by validation; itself where there is no choice."""
        return [self]

    def best(self, states: Sequence[Mapping[str, Tensor]]) -> tuple[int, list[tuple[float, ...]]]:
        """Return the place of the candidate that is taken, and what was tried and the score of each, where scored.

        Parameters
        ----------
        states : Sequence[Mapping[str, Tensor]]
            What each of `candidates` merged.
        """
        return 0, []

    def settings(self) -> dict[str, Any]:
        """Return the name and the options as plain types, functions left out."""
        options = {field.name: getattr(self, field.name) for field in fields(self) if field.init}
        written = {name: "infinity" if value == math.inf else value for name, value in options.items()}
        return {"name": type(self).__name__, **{name: v for name, v in written.items() if name != "validate"}}


@dataclass(frozen=True, kw_only=True)
class ProductMethod(Method, Solver):
    """A method that merges adapters as products, and solves the result back to a rank (Eq. 6)."""

    def __post_init__(self) -> None:
        Method.__post_init__(self)
        Solver.__post_init__(self)
