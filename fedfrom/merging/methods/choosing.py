"""Choosing options by validation: a candidate for each combination of their values; the best-scored one is taken."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from fedfrom.merging.methods.base import Method, ProductMethod
from fedfrom.merging.methods.validation import Validate, as_json, check_search, check_validate, score

AUTO = "auto"
SEARCH = {"k": (0.0, 0.25, 0.5, 1.0, 2.0), "coefficient": (0.3, 0.5, 0.7, 1.0, 1.5)}
"""The options that can be chosen by validation, and what is tried of each where `search` does not say."""


@dataclass(frozen=True, kw_only=True)
class Chooses(ProductMethod):
    """A method some of whose options "auto" has chosen by validation.

    Parameters
    ----------
    validate : Callable[[Mapping[str, Tensor]], float] | None (default: None)
        The score of a merged state, higher is better; values whose score is NaN are not taken. For "auto" alone.
    search : Mapping[str, Sequence[float]] | None (default: None)
        The values to choose from, by option: {"coefficient": (0.3, 0.5, 1)}; of several options every combination is
        tried. None, or an option that is not in it: k is (0, 0.25, 0.5, 1, 2), coefficient (0.3, 0.5, 0.7, 1, 1.5). For
        options that are "auto" alone.

    Attributes
    ----------
    searchable : tuple[str, ...]
        The options that can be "auto".
    """

    searchable: ClassVar[tuple[str, ...]] = ("coefficient",)

    validate: Validate | None = None  # type: ignore[misc]
    search: Mapping[str, Sequence[float]] | None = field(default=None, hash=False)  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_validate(self.validate)
        chosen = [name for name in self.searchable if getattr(self, name) == AUTO]
        if not chosen:
            self._refuse_choosing()
            return
        first = chosen[0]
        if self.validate is None:
            raise ValueError(
                f"{first}: expected validate=, a function that scores a state, with {first}='auto', found None"
            )
        given = {} if self.search is None else check_search(self.search, self.searchable)
        for name in given:
            if name not in chosen:
                raise ValueError(
                    f"search, {name!r}: expected with {name}='auto' alone, found {name}={getattr(self, name)!r}"
                )
        object.__setattr__(self, "search", {name: given.get(name, SEARCH[name]) for name in chosen})
        self.candidates()  # raises where a value is out of its option's range

    def _refuse_choosing(self) -> None:
        """Raise ValueError where nothing is to be chosen, but something is given to choose by."""
        for name in ("validate", "search"):
            if getattr(self, name) is not None:
                autos = " or ".join(f"{option}='auto'" for option in self.searchable)
                found = ", ".join(f"{option}={getattr(self, option)!r}" for option in self.searchable)
                raise ValueError(
                    f"{name}: expected with {autos} alone, which chooses by validation, found {found}: say {autos}, or "
                    f"leave {name} out"
                )

    def candidates(self) -> Sequence[Method]:
        """Return one method for each combination of the values of `search`, ascending; itself without a choice."""
        if self.search is None:
            return [self]
        values = [sorted(set(each)) for each in self.search.values()]
        options = [dict(zip(self.search, each, strict=True)) for each in itertools.product(*values)]
        return [replace(self, **each, validate=None, search=None) for each in options]  # type: ignore[arg-type]

    def best(self, states: Sequence[Mapping[str, Tensor]]) -> tuple[int, list[tuple[float, ...]]]:
        """Return the place of the first candidate whose state has the highest score, and each with its score."""
        if self.validate is None or self.search is None:
            return super().best(states)
        scores = [score(self.validate, state) for state in states]
        highest = max(scores)
        if highest == -math.inf:
            names = " and ".join(self.search)
            raise ValueError(f"validate: expected a number for the merge with at least one {names}, found none")
        tried = [[float(getattr(candidate, name)) for name in self.search] for candidate in self.candidates()]
        return scores.index(highest), [(*each, found) for each, found in zip(tried, scores, strict=True)]

    def settings(self) -> dict[str, Any]:
        """Return the options as plain types; without a choice those of the choice are left out."""
        settings = super().settings()
        if self.search is None:
            del settings["search"]
        else:
            settings["search"] = as_json(self.search)
        return settings
