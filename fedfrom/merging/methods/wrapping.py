"""Methods around another method, whose name and options are their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from torch import Tensor

from fedfrom.merging.methods.base import Method, ProductMethod
from fedfrom.merging.updates import Updates


@dataclass(frozen=True, kw_only=True)
class Wrapper(ProductMethod):
    """A method that has another one merge for it, by whose weights; `_inner` is that one.

    Parameters
    ----------
    inner : str (default: "task-arithmetic")
        The name of the method inside: one on products that chooses nothing by validation and wraps no other.
    inner_options : Mapping[str, Any] | None (default: None)
        Its options, but for those that it shares with this one.
    examples_power, rank, solver, iterations, tolerance, seed, gauge
        See `ProductMethod`; `inner` has the same power and seed.

    Attributes
    ----------
    refused : frozenset[str]
        Names of further methods that cannot be inside.
    """

    refused: ClassVar[frozenset[str]] = frozenset()

    inner: str = "task-arithmetic"
    inner_options: Mapping[str, Any] | None = field(default=None, hash=False)

    _inner: ClassVar[Method]  # set on the instance

    def __post_init__(self) -> None:
        super().__post_init__()
        inner = self._made()
        # not fields: what this method is follows from what is inside
        for name, value in {"_inner": inner, "k": inner.k, "scope": inner.scope, "needs": inner.needs}.items():
            object.__setattr__(self, name, value)

    def _made(self) -> Method:
        """Return the method inside."""
        from fedfrom.merging.methods.registry import make_method, method_class, methods  # it lists this one

        kinds = {name: method_class(name) for name in methods() if name not in self.refused | {"greedy-soup"}}
        names = [name for name, kind in kinds.items() if issubclass(kind, ProductMethod)]
        names = [name for name in names if not issubclass(kinds[name], Wrapper)]
        if self.inner not in names:
            raise ValueError(f"inner: expected one of {', '.join(names)}, found {self.inner!r}")
        options = {} if self.inner_options is None else self.inner_options
        shared = {"validate", "search", *(option.name for option in fields(self) if option.init)}
        if not isinstance(options, Mapping) or shared & set(options):
            raise ValueError(
                f"inner_options: expected a mapping from {self.inner}'s options to values, but for "
                f"{', '.join(sorted(shared))}, found {options!r}"
            )
        return make_method(self.inner, **options, examples_power=self.examples_power, seed=self.seed)

    def weights(self, updates: Updates, examples: Sequence[float] | None, given: Sequence[float] | None) -> Tensor:
        """Return the weights of the method inside."""
        return self._inner.weights(updates, examples, given)

    def coefficients(self, weights: Tensor, mean_weight: float = 1.0) -> Tensor:
        """Return the coefficients of the method inside."""
        return self._inner.coefficients(weights, mean_weight)

    def survey(self, layers: Iterable[Updates]) -> Any:
        """Return what the method inside has to know."""
        return self._inner.survey(layers)

    def knowing(self, known: Any) -> Self:
        """Return this method with what the survey returned."""
        method = super().knowing(known)
        object.__setattr__(method, "_inner", self._inner.knowing(known))
        return method
