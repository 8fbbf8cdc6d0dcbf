"""Greedy soup: average only the clients that a validation function says do not make it worse."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

from torch import Tensor

from fedfrom.merging.methods.average import Average
from fedfrom.merging.methods.base import Method
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
    examples_power, rank, solver, iterations, tolerance, seed, gauge
        See `Average`.
    """

    validate: Validate | None = None  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validate is None:
            raise ValueError("validate: expected a function that scores a state, found None")
        check_validate(self.validate)

    def select(
        self, weights: Sequence[float], merged: Callable[[list[int], Method], Mapping[str, Tensor]]
    ) -> tuple[list[int], Method]:
        """Return the clients of the soup, and `Average`, which merges them; see `Method.select`."""
        validate, average = self.validate, self._average()
        assert validate is not None

        def score_of(clients: list[int]) -> float:
            return score(validate, merged(clients, average))  # minus infinity for NaN

        able = [i for i, u in enumerate(weights) if u > 0]  # a client of weight 0 alone is no mean
        if not able:
            return list(range(len(weights))), average
        alone = {i: score_of([i]) for i in able}
        if max(alone.values()) == -math.inf:
            raise ValueError("validate: expected a number for at least one client's state alone, found none")
        first, *others = sorted(able, key=lambda i: -alone[i])
        chosen, best = [first], alone[first]
        for i in others:
            found = score_of(sorted([*chosen, i]))
            if found >= best:
                chosen, best = [*chosen, i], found
        return sorted(chosen), average

    def _average(self) -> Average:
        return Average(**{own.name: getattr(self, own.name) for own in fields(Average) if own.init})
