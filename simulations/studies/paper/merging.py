"""One merge of saved states by one row's method at one setting."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import fedfrom
from fedfrom.merging.methods.base import Method
from fedfrom.merging.methods.registry import make_method, method_options
from fedfrom.merging.report import MergeReport
from simulations.studies.paper.grids import Setting
from simulations.studies.shelf import Shelf, State

Merged = tuple[dict[str, Tensor], MergeReport]


@dataclass(frozen=True)
class Clients:
    """The states that are merged.

    Attributes
    ----------
    names : list[str]
        Names of the states on the shelf, which has their statistics as well.
    states : list[State]
        Adapters, or full weights.
    start : State
        The state of all clients before their training: the base model's weights, or a fresh adapter.
    config : dict | None
        The configuration of all adapters; None for full weights.
    seed : int
        Seed of random methods.
    shelf : Shelf
        Has the statistics, which are read only for methods that need them.
    """

    names: list[str]
    states: list[State]
    start: State
    config: dict[str, Any] | None
    seed: int
    shelf: Shelf

    @classmethod
    def read(cls, names: list[str], start: State, config: dict[str, Any] | None, seed: int, shelf: Shelf) -> "Clients":
        """Read the states from the shelf."""
        return cls(names, [shelf.get(name) for name in names], start, config, seed, shelf)

    def some(self, chosen: Sequence[int]) -> "Clients":
        """Return some of the clients."""
        names, states = [self.names[i] for i in chosen], [self.states[i] for i in chosen]
        return Clients(names, states, self.start, self.config, self.seed, self.shelf)

    def merge(self, method: str, setting: Setting, **objects: Any) -> Merged:
        """Return `fedfrom.merge`'s state and report.

        Parameters
        ----------
        method : str
            Name of the method.
        setting : Setting
            Numbers: options of the method, and `server_lr`.
        **objects
            Options of the method that are no numbers.
        """
        options: dict[str, Any] = {**{name: value for name, value in setting.items() if name != "server_lr"}, **objects}
        if "seed" in method_options(method):
            options["seed"] = self.seed
        chosen: Method = make_method(method, **options)
        # A fresh adapter's product is zero, so products need no reference. Its factors are not zero: methods on factors
        # need them as the reference that server_lr scales against.
        adapters = self.config is not None
        reference = None if adapters and not chosen.on_factors else self.start
        return fedfrom.merge(
            self.states,
            reference,
            chosen,
            configs=None if self.config is None else [self.config] * len(self.states),
            reference_config=None if reference is None else self.config,
            names=self.names,
            statistics=None if chosen.needs is None else [self.shelf.get(f"{n}-{chosen.needs}") for n in self.names],
            server_lr=setting.get("server_lr", 1.0),
        )

    def soup(self, validate: Callable[[Mapping[str, Tensor]], float]) -> list[int]:
        """Return the indices of the clients that a greedy soup keeps."""
        kept: MergeReport = self.merge("greedy-soup", {}, validate=validate)[1]
        return [self.names.index(name) for name in kept.clients]


def geometry(report: MergeReport) -> dict[str, Any]:
    """Return the data of the heat maps: cosines of the whole updates; names, norms, weights and cosines by layer."""
    shown = ("name", "norms", "weights", "cosines")
    layers = [{name: getattr(layer, name) for name in shown} for layer in report.layers if layer.is_update]
    return {"cosines": report.cosines(), "layers": layers}
