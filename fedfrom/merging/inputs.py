"""The inputs of a merge, checked before a tensor is read."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from typing import Any

from fedfrom.merging.peft import layers as L
from fedfrom.merging.peft.configs import check_config
from fedfrom.merging.peft.layers import State
from fedfrom.merging.sources import Inputs, Readable, Source
from fedfrom.merging.weighing import SAFE


def check_inputs(
    states: Sequence[State],
    reference: State | None,
    received: Sequence[State | None] | None,
    configs: Sequence[Any] | None,
    reference_config: Any,
    examples: Sequence[float] | None,
    names: Sequence[str] | None,
    statistics: Sequence[State | None] | None,
    needs: str | None,
    pair: bool,
    dora: bool,
    same_base: bool,
    norms: Sequence[Mapping[str, float]] | None = None,
    deltas: Sequence[Collection[str]] | None = None,
    weights: Sequence[float] | None = None,
) -> Inputs:
    """Return the inputs of `merge`, checked; see there."""
    n = len(states)
    if n == 0:
        raise ValueError("states: expected at least one client's state, found none")
    for label, values in {
        "received": received,
        "configs": configs,
        "examples": examples,
        "names": names,
        "statistics": statistics,
        "norms": norms,
        "deltas": deltas,
    }.items():
        if values is not None and len(values) != n:
            raise ValueError(f"{label}: expected one a client, {n}, found {len(values)}")
    if received is not None and reference is None:
        raise ValueError("received: expected together with reference, the state they were cut from, found None")
    who = list(names) if names is not None else [f"client {i}" for i in range(n)]
    for i, count in enumerate(examples or []):
        # compared, not converted: an int may be beyond any float
        if not isinstance(count, int | float) or not 0 < count <= sys.float_info.max:
            raise ValueError(f"{who[i]}: expected a finite number of examples > 0, found {count!r}")
    given = None if weights is None else check_weights(weights, who)

    for i in range(n if needs else 0):
        if statistics is None or not statistics[i]:
            raise ValueError(
                f"{who[i]}: expected {needs} statistics beside its state, found none: compute them with "
                f"fedfrom.client.{needs} and send them (statistics=)"
            )

    alike: dict[tuple[str, ...], dict[str, L.Layer]] = {}  # most states have the keys of the one before

    def layers_of(state: State, name: str) -> dict[str, L.Layer]:
        keys = tuple(state)
        if keys not in alike:
            found = L.find_layers(state, name)
            for layer in found.values():
                L.check_dora(layer, name, dora)
            alike[keys] = found if pair else L.find_layers(state, name, pair_factors=False)
        return alike[keys]

    def source(
        state: State,
        config: Any,
        name: str,
        sliced: bool = False,
        statistics: State | None = None,
        norms: Mapping[str, float] | None = None,
        deltas: Collection[str] = (),
    ) -> Source:
        if not isinstance(state, Mapping):
            raise ValueError(f"{name}: expected a state dict (key -> tensor), found {type(state).__name__}: load it")
        found = layers_of(state, name)
        if not found:
            raise ValueError(f"{name}: expected a state with at least one tensor, found none")
        checked = None if config is None else check_config(config, name, dora, same_base)
        return Source(name, Readable(state, name), found, checked, sliced, statistics, norms or {}, deltas)

    beside = statistics if statistics is not None and needs else [None] * n
    own = configs if configs is not None else [None] * n
    known = norms if norms is not None else [None] * n
    changes = deltas if deltas is not None else [()] * n
    sent = [source(*given) for given in zip(states, own, who, [False] * n, beside, known, changes, strict=True)]
    for client in sent:
        if client.layers is not sent[0].layers:
            if client.layers.keys() != sent[0].layers.keys():
                found = L.difference(client.layers, sent[0].layers)
                raise ValueError(f"{client.who}: expected the layers of {sent[0].who}, found {found}")
            _check_parts(client, sent[0])
        if (client.config is None) != (sent[0].config is None):
            raise ValueError(f"{client.who}: expected an adapter config a client or none at all, found some without")
    base = None if reference is None else source(reference, reference_config, "reference")
    for client in sent:
        for name in client.deltas:
            has_update = name in client.layers and not client.layers[name].is_adapter
            if not has_update or client.layers[name].is_running_statistic or base is None or name not in base.layers:
                raise ValueError(
                    f"{client.who}, {name!r}: expected a delta of a plain tensor that reference has, found another"
                )
    if base is not None:
        shared = base.layers.keys() & sent[0].layers.keys()
        if not shared:
            raise ValueError(
                f"reference: expected layers of the clients such as {next(iter(sent[0].layers), None)!r}, found "
                f"others such as {next(iter(base.layers), None)!r}"
            )
        _check_parts(sent[0], base)
        adapters = any(base.layers[name].is_adapter for name in shared)
        if adapters and (base.config is None) != (sent[0].config is None):
            raise ValueError("reference_config: expected together with configs, found one without the other")
    if not pair:
        _check_scalings([*sent, *([] if base is None else [base])])
    unique: dict[int, Source] = {}
    for i, state in enumerate(received or []):
        if state is not None and id(state) not in unique:
            unique[id(state)] = source(state, reference_config, f"what {who[i]} received", sliced=True)
    for part in unique.values():
        assert base is not None
        if missing := sorted((shared & base.layers.keys()) - part.layers.keys()):
            raise ValueError(
                f"{part.who}: expected the layers of reference, found {len(missing)} missing {missing[:3]}"
            )
        _check_parts(part, base)
    cut = [None if state is None else unique[id(state)] for state in received or [None] * n]
    return Inputs(sent, base, cut, None if examples is None else [float(count) for count in examples], given)


def check_weights(weights: Any, who: Sequence[str]) -> list[float]:
    """Return the user's own weights, one for each of these clients: finite numbers >= 0, at least one above 0."""
    n = len(who)
    if not isinstance(weights, Collection) or isinstance(weights, Mapping | str):
        raise ValueError(f"weights: expected one number a client, {n}, found {weights!r}")
    if len(weights) != n:
        place = f"none for {who[len(weights)]}" if len(weights) < n else f"more than for {who[-1]}, the last client"
        raise ValueError(f"weights: expected one number a client, {n}, found {len(weights)}, {place}")
    found = []
    for name, u in zip(who, weights, strict=True):
        try:
            found.append(math.nan if isinstance(u, bool) or not isinstance(u, Real) else float(u))
        except OverflowError:  # an int beyond any float
            found.append(math.inf)
        if not 0 <= found[-1] < math.inf:
            raise ValueError(f"{name}: expected a finite number >= 0 as its weight, found {u!r}")
    if not any(found):
        raise ValueError("weights: expected at least one client's above 0, found 0 for all")
    return found


def check_server_lr(server_lr: float | str) -> None:
    """Raise ValueError where alpha is neither "safe" nor a finite number >= 0, whose square is in range."""
    is_number = isinstance(server_lr, int | float) and not isinstance(server_lr, bool)
    if server_lr != SAFE and (not is_number or not 0 <= server_lr < 1e100):  # type: ignore[operator]
        raise ValueError(f"server_lr: expected a finite number >= 0 or 'safe', found {server_lr!r}")


def check_clip(clip: float | None) -> None:
    """Raise ValueError where the bound on norms is neither None nor a positive number."""
    if clip is not None and (not isinstance(clip, int | float) or not 0 < clip <= sys.float_info.max):
        raise ValueError(f"clip: expected a positive number or None, found {clip!r}")


def check_screening(examples_cap: float | None, min_valid_replies: int, select: str | None, attackers: int) -> None:
    """Raise ValueError where a setting of the screening is out of range."""
    if examples_cap is not None and (not isinstance(examples_cap, int | float) or not 1 <= examples_cap < math.inf):
        raise ValueError(f"examples_cap: expected a finite number >= 1 or None, found {examples_cap!r}")
    if not isinstance(min_valid_replies, int) or min_valid_replies < 1:
        raise ValueError(f"min_valid_replies: expected a whole number >= 1, found {min_valid_replies!r}")
    if select not in (None, "multikrum"):
        raise ValueError(f"select: expected 'multikrum' or None, found {select!r}")
    if not isinstance(attackers, int) or attackers < 0 or (attackers > 0 and select is None):
        raise ValueError(f"attackers: expected a whole number >= 0, above 0 with select= alone, found {attackers!r}")


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
