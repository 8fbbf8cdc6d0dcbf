"""What a merge is given: one value a client, and one for what all clients share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fedfrom.merging.linalg.blocks import Empty
from fedfrom.merging.peft.layers import State


@dataclass(frozen=True, eq=False)
class Client:
    """What one client sent, and what is known of it.

    Attributes
    ----------
    state : Mapping[str, Tensor]
        W_i: an adapter's state dict, a full state dict, or both mixed. A mapping may read its tensors when it is asked
        for them. One that has a method `reader` (key -> `blocks.Reader`) has its plain tensors read a block at a time.
    name : str (default: "client 0")
        What errors and the report call it.
    examples : float | None (default: None)
        n_i > 0; None, for all clients alike, takes all for equal.
    weight : float | None (default: None)
        u_i >= 0, which multiplies what the method gives it; None is 1.
    config : Mapping | LoraConfig | None (default: None)
        Its adapter config, which gives each module's scaling.
    received : Mapping[str, Tensor] | None (default: None)
        ref_i, where it was sent something else than W (a smaller rank). Clients that were sent the same share one
        object, whose factors then enter a merge once.
    statistics : Mapping[str, Tensor] | None (default: None)
        What it sent beside its state: Gram matrices by module name, or Fisher diagonals by key.
    norms : Mapping[str, float]
        What is known of ||W_i - ref_i||_F, by the name of a plain tensor, as `norms.delta_norm` gives it: taken as
        true, so that a state that is read from disk is read once.
    deltas : Collection[str]
        The plain tensors, by name, in whose place the state has W_i - ref_i; any floating-point dtype.
    """

    state: State
    name: str = "client 0"
    examples: float | None = None
    weight: float | None = None
    config: Any = None
    received: State | None = None
    statistics: State | None = None
    norms: Mapping[str, float] = field(default_factory=dict)
    deltas: Collection[str] = ()


@dataclass(frozen=True, eq=False)
class Round:
    """What all clients of a merge share: see `fedfrom.merge`.

    Attributes
    ----------
    reference : Mapping[str, Tensor] | None
        W.
    reference_config : Mapping | LoraConfig | None
        The adapter config of `reference`, and of what clients received.
    server_lr : float | str
        alpha, or "safe".
    clip : float | None
        The bound on each update.
    as_reference : bool
        Whether adapters leave with the reference's factor shapes and scaling.
    dora, same_base : bool
        What adapter configs are accepted: see `configs.check_config`.
    empty : Callable[..., Tensor]
        Gives the memory of merged plain tensors, called with a shape, and dtype and device as keywords.
    """

    reference: State | None = None
    reference_config: Any = None
    server_lr: float | str = 1.0
    clip: float | None = None
    as_reference: bool = False
    dora: bool = False
    same_base: bool = False
    empty: Empty = torch.empty


def clients_of(
    states: Sequence[State],
    *,
    received: Sequence[State | None] | None = None,
    configs: Sequence[Any] | None = None,
    examples: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    statistics: Sequence[State | None] | None = None,
) -> list[Client]:
    """Return one value a client from what `fedfrom.merge` is given, a sequence for each kind of thing.

    Raises
    ------
    ValueError
        A sequence has not one entry a client, or a state is no state dict.
    """
    if isinstance(states, Mapping):
        raise ValueError("states: expected a sequence of state dicts, one a client, found a single mapping")
    n = len(states)
    for i, state in enumerate(states):
        if not isinstance(state, Mapping):
            raise ValueError(
                f"client {i}: expected a state dict (key -> tensor), found {type(state).__name__}: load it"
            )
    own = {"received": received, "configs": configs, "examples": examples, "names": names, "statistics": statistics}
    for label, values in own.items():
        if values is not None and len(values) != n:
            raise ValueError(f"{label}: expected one a client, {n}, found {len(values)}")
    who = [f"client {i}" for i in range(n)] if names is None else list(names)
    if weights is not None:
        _check_one_each("weights", weights, who)
    return [
        Client(
            state,
            who[i],
            None if examples is None else examples[i],
            None if weights is None else weights[i],
            None if configs is None else configs[i],
            None if received is None else received[i],
            None if statistics is None else statistics[i],
        )
        for i, state in enumerate(states)
    ]


def _check_one_each(label: str, values: Any, who: Sequence[str]) -> None:
    """Raise ValueError, naming a client, where something is no sequence of one number a client."""
    n = len(who)
    if not isinstance(values, Collection) or isinstance(values, Mapping | str):
        raise ValueError(f"{label}: expected one number a client, {n}, found {values!r}")
    if len(values) != n:
        place = f"none for {who[len(values)]}" if len(values) < n else f"more than for {who[-1]}, the last client"
        raise ValueError(f"{label}: expected one number a client, {n}, found {len(values)}, {place}")
