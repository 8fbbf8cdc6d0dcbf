"""Choosing k by validation: one candidate for each k of `search`, and the one whose merged state scores best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from fedfrom.merging.methods.base import Method, ProductMethod
from fedfrom.merging.methods.validation import Validate, as_json, check_search, check_validate, score
from fedfrom.merging.weights import check_weighting

AUTO = "auto"
SEARCH = {"k": (0.0, 0.25, 0.5, 1.0, 2.0)}
"""The options that can be chosen by validation, and what is tried of each where `search` does not say."""


@dataclass(frozen=True, kw_only=True)
class ChoosesK(ProductMethod):
    """A method with a k, which k="auto" has chosen by validation.

    Parameters
    ----------
    k, validate, search
        See `FroM`.
    """

    k: float | str = 1.0  # type: ignore[assignment,misc]
    validate: Validate | None = None  # type: ignore[misc]
    search: Mapping[str, Sequence[float]] | None = field(default=None, hash=False)  # a dict has no hash

    def __post_init__(self) -> None:
        super().__post_init__()
        check_validate(self.validate)
        if self.k != AUTO:
            for name in ("validate", "search"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}: expected with k='auto' alone, which chooses k by validation, found k={self.k!r}: say "
                        f"k='auto', or leave {name} out"
                    )
            return
        if self.validate is None:
            raise ValueError("k: expected validate=, a function that scores a state, with k='auto', found None")
        search = SEARCH | ({} if self.search is None else check_search(self.search, SEARCH))
        for k in search["k"]:
            check_weighting(k, self.examples_power, self.scope)
        object.__setattr__(self, "search", search)

    def candidates(self) -> Sequence[Method]:
        """Return one method for each k of `search` with k="auto", else this one."""
        if self.search is None:
            return [self]
        return [replace(self, k=k, validate=None, search=None) for k in sorted(set(self.search["k"]))]

    def best(self, states: Sequence[Mapping[str, Tensor]]) -> tuple[int, list[tuple[float, float]]]:
        """Return the place of the first k whose state has the highest score, and each k with its score."""
        if self.validate is None:
            return super().best(states)
        scores = [score(self.validate, state) for state in states]
        highest = max(scores)
        if highest == -math.inf:
            raise ValueError("validate: expected a number for the merge with at least one k, found none")
        ks = [float(candidate.k) for candidate in self.candidates()]
        return scores.index(highest), list(zip(ks, scores, strict=True))

    def settings(self) -> dict[str, Any]:
        """Return the options as plain types; with a k that is a number those of the choice are left out."""
        settings = super().settings()
        if self.search is None:
            del settings["search"]
        else:
            settings["search"] = as_json(self.search)
        return settings
