"""Greedy soup: average only the clients that a validation function says do not make it worse."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedfrom.merging.methods.average import Average
from fedfrom.merging.methods.validation import Validate, check_validate, score


@dataclass(frozen=True, kw_only=True)
class GreedySoup(Average):
    """Model soups, Recipe 1 (Wortsman et al., 2022, arXiv 2203.05482): the mean of the clients that help.

    Clients are sorted by the score that each has alone, best first (ties: as given), and added one after the other; one
    stays where the mean's score is not below what it was without it. Costs 2 n - 1 merges and validations. The uniform
    soup is `Average`. In a federation the server has to hold validation data.

    Parameters
    ----------
    validate : Callable[[Mapping[str, Tensor]], float]
        The score of a merged state, higher is better; NaN is worse than any number.
    examples_power, rank, solver, iterations, tolerance, seed
        See `Average`.
    """

    validate: Validate | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validate is None:
            raise ValueError("validate: expected a function that scores a state, found None")
        check_validate(self.validate)

    def choose(self, n: int, mean_of: Callable[[list[int]], Mapping[str, Tensor]]) -> list[int]:
        """Return the clients of the soup, in the order given.

        Parameters
        ----------
        n : int
            How many clients there are.
        mean_of : Callable[[list[int]], Mapping[str, Tensor]]
            The merged state of some of them.
        """
        alone = [self._score(mean_of([i])) for i in range(n)]
        if max(alone) == -math.inf:
            raise ValueError("validate: expected a number for at least one client's state alone, found none")
        first, *others = sorted(range(n), key=lambda i: -alone[i])
        chosen, best = [first], alone[first]
        for i in others:
            score = self._score(mean_of(sorted([*chosen, i])))
            if score >= best:
                chosen, best = [*chosen, i], score
        return sorted(chosen)

    def _score(self, state: Mapping[str, Tensor]) -> float:
        assert self.validate is not None
        return score(self.validate, state)  # minus infinity for NaN: one bad client costs its own place alone

    def average(self) -> Average:
        """Return the method that merges the clients that were chosen."""
        own: dict[str, Any] = {name: value for name, value in vars(self).items() if name != "validate"}
        return Average(**own)
