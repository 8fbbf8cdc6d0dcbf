"""The inputs of a merge, checked before a tensor is read."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

from fedfrom.merging.clients import Client, Round
from fedfrom.merging.methods.base import Method
from fedfrom.merging.peft import layers as L
from fedfrom.merging.peft.configs import check_config
from fedfrom.merging.peft.layers import State
from fedfrom.merging.sources import Inputs, Readable, Source
from fedfrom.merging.stability import SAFE
from fedfrom.numeric import is_number, plain


def check_inputs(clients: Sequence[Client], shared: Round, needs: str | None, pair: bool) -> Inputs:
    """Return what clients sent and were sent, checked against each other; no tensor is read.

    Parameters
    ----------
    clients : Sequence[Client]
        At least one.
    shared : Round
        What they share.
    needs : str | None
        The statistics that each client must have: "gram" or "fisher".
    pair : bool
        False takes A and B of a LoRA module for tensors of their own.

    Raises
    ------
    ValueError
        Names the client, the key, what was expected and what was found.
    """
    if not clients:
        raise ValueError("states: expected at least one client's state, found none")
    if shared.reference is None and any(client.received is not None for client in clients):
        raise ValueError("received: expected together with reference, the state they were cut from, found None")
    examples, weights = check_numbers(clients)
    for client in clients:
        if needs and not client.statistics:
            raise ValueError(
                f"{client.name}: expected {needs} statistics beside its state, found none: compute them with "
                f"fedfrom.client.{needs} and send them (statistics=)"
            )
    read = _Reading(shared, pair)
    sent = [read.client(client, with_statistics=needs is not None) for client in clients]
    for source in sent:
        if source.layers is not sent[0].layers:
            if source.layers.keys() != sent[0].layers.keys():
                found = L.difference(source.layers, sent[0].layers)
                raise ValueError(f"{source.who}: expected the layers of {sent[0].who}, found {found}")
            _check_parts(source, sent[0])
        if (source.config is None) != (sent[0].config is None):
            raise ValueError(f"{source.who}: expected an adapter config a client or none at all, found some without")
    base = None if shared.reference is None else read.source(shared.reference, shared.reference_config, "reference")
    for source in sent:
        _check_deltas(source, base)
    if base is not None:
        _check_reference(base, sent[0])
    if not pair:
        _check_scalings([*sent, *([] if base is None else [base])])
    unique: dict[int, Source] = {}
    for client in clients:
        if client.received is not None and id(client.received) not in unique:
            who = f"what {client.name} received"
            part = read.source(client.received, shared.reference_config, who, sliced=True)
            assert base is not None
            if missing := sorted((base.layers.keys() & sent[0].layers.keys()) - part.layers.keys()):
                raise ValueError(f"{who}: expected the layers of reference, found {len(missing)} missing {missing[:3]}")
            _check_parts(part, base)
            unique[id(client.received)] = part
    received = [None if client.received is None else unique[id(client.received)] for client in clients]
    return Inputs(sent, base, received, examples, weights)


class _Reading:
    """Finds the layers of states, once for all that have the same keys, and checks their configs."""

    def __init__(self, shared: Round, pair: bool) -> None:
        self._shared, self._pair = shared, pair
        self._alike: dict[tuple[str, ...], dict[str, L.Layer]] = {}  # most states have the keys of the one before

    def source(self, state: State, config: Any, who: str, sliced: bool = False) -> Source:
        if not isinstance(state, Mapping):
            raise ValueError(f"{who}: expected a state dict (key -> tensor), found {type(state).__name__}: load it")
        layers = self._layers(state, who)
        if not layers:
            raise ValueError(f"{who}: expected a state with at least one tensor, found none")
        checked = None if config is None else check_config(config, who, self._shared.dora, self._shared.same_base)
        return Source(who, Readable(state, who), layers, checked, sliced)

    def client(self, client: Client, with_statistics: bool) -> Source:
        statistics = client.statistics if with_statistics else None
        source = self.source(client.state, client.config, client.name)
        return replace(source, statistics=statistics, norms=client.norms, deltas=client.deltas)

    def _layers(self, state: State, who: str) -> dict[str, L.Layer]:
        keys = tuple(state)
        if keys not in self._alike:
            found = L.find_layers(state, who)
            for layer in found.values():
                L.check_dora(layer, who, self._shared.dora)
            self._alike[keys] = found if self._pair else L.find_layers(state, who, pair_factors=False)
        return self._alike[keys]


def check_numbers(clients: Sequence[Client]) -> tuple[list[float] | None, list[float] | None]:
    """Return the clients' numbers of examples and their own weights, or raise ValueError where one is out of range."""
    return _check_examples(clients), _check_weights(clients)


def _check_examples(clients: Sequence[Client]) -> list[float] | None:
    """Return the clients' numbers of examples, all finite and above 0; None where no client has one."""
    if all(client.examples is None for client in clients):
        return None
    for client in clients:
        count = plain(client.examples)
        # compared, not converted: an int may be beyond any float
        if not is_number(count) or not 0 < count <= sys.float_info.max:
            raise ValueError(f"{client.name}: expected a finite number of examples > 0, found {count!r}")
    return [float(client.examples) for client in clients if client.examples is not None]


def _check_weights(clients: Sequence[Client]) -> list[float] | None:
    """Return the clients' own weights, finite, >= 0, at least one above 0; None where no client has one."""
    if all(client.weight is None for client in clients):
        return None
    found = []
    for client in clients:
        u: Any = client.weight
        try:
            found.append(math.nan if isinstance(u, bool) or not isinstance(u, Real) else float(u))
        except OverflowError:  # an int beyond any float
            found.append(math.inf)
        if not 0 <= found[-1] < math.inf:
            raise ValueError(f"{client.name}: expected a finite number >= 0 as its weight, found {u!r}")
    if not any(found):
        raise ValueError("weights: expected at least one client's above 0, found 0 for all")
    return found


def _check_deltas(source: Source, base: Source | None) -> None:
    """Raise ValueError where a client's change is of something that it can't be a change of."""
    for name in source.deltas:
        has_update = name in source.layers and not source.layers[name].is_adapter
        if not has_update or source.layers[name].is_running_statistic or base is None or name not in base.layers:
            raise ValueError(
                f"{source.who}, {name!r}: expected a delta of a plain tensor that reference has, found another"
            )


def _check_reference(base: Source, first: Source) -> None:
    """Raise ValueError where the reference has none of the first client's layers, or a config where it has none."""
    shared = base.layers.keys() & first.layers.keys()
    if not shared:
        raise ValueError(
            f"reference: expected layers of the clients such as {next(iter(first.layers), None)!r}, found "
            f"others such as {next(iter(base.layers), None)!r}"
        )
    _check_parts(first, base)
    adapters = any(base.layers[name].is_adapter for name in shared)
    if adapters and (base.config is None) != (first.config is None):
        raise ValueError("reference_config: expected together with configs, found one without the other")


def check_server_lr(server_lr: float | str) -> None:
    """Raise ValueError where alpha is neither "safe" nor a finite number >= 0, whose square is in range."""
    if server_lr != SAFE and (not is_number(server_lr) or not 0 <= server_lr < 1e100):
        raise ValueError(f"server_lr: expected a finite number >= 0 or 'safe', found {server_lr!r}")


def check_safe(server_lr: float | str, candidates: Sequence[Method]) -> None:
    """Raise ValueError where alpha is "safe" and one of the methods weighs by the largest norm alone."""
    if server_lr == SAFE and any(math.isinf(method.k) for method in candidates):
        raise ValueError(
            "server_lr: expected a number with k = infinity, found 'safe': no step above 0 is within its bound"
        )


def check_clip(clip: float | None) -> None:
    """Raise ValueError where the bound on norms is neither None nor a positive number."""
    if clip is not None and (not is_number(clip) or not 0 < clip <= sys.float_info.max):
        raise ValueError(f"clip: expected a positive number or None, found {clip!r}")


def _check_scalings(sources: list[Source]) -> None:
    """Raise ValueError where configs give a module's factors different scalings: their mean has no scaling."""
    for source in sources[1:]:
        for name, layer in L.find_layers(source.state, source.who).items():
            if not layer.is_adapter or source.config is None or sources[0].config is None:
                continue
            expected, found = sources[0].scaling(name), source.scaling(name)
            if not math.isclose(expected, found, rel_tol=1e-9):
                raise ValueError(
                    f"{source.who}, {name!r}: expected the scaling of {sources[0].who}, {expected:g}, found {found:g}: "
                    "factors of different scalings can't be averaged"
                )


def _check_parts(source: Source, like: Source) -> None:
    """Raise ValueError where a layer that two sources share has parts (a bias, a magnitude) in one alone."""
    for name, layer in source.layers.items():
        if name in like.layers and layer.keys.keys() != like.layers[name].keys.keys():
            raise ValueError(
                f"{source.who}, {name!r}: expected {sorted(like.layers[name].keys)} as in {like.who}, found "
                f"{sorted(layer.keys)}"
            )
