"""What can be wrong with the adapter of one client among three, and what is said of it, wherever it is merged.

`tests/test_faults.py` runs every fault through `merge`, the strategy and the command line. Faults that only one of them
can meet (broken records, folders, configs, metrics) are tested where they can occur.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tests.folders import PREFIX

MODULE = f"{PREFIX}layer.1.v"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"  # (4, 12), (14, 4)
State = dict[str, Tensor]


class Fault(NamedTuple):
    """One client's fault.

    Attributes
    ----------
    spoil : Callable[[State], None]
        Changes the client's state in place.
    kind : str
        The rejection's, in a round.
    words : tuple[str, ...]
        What every message has, beside the client's name, "expected" and "found".
    """

    spoil: Callable[[State], None]
    kind: str
    words: tuple[str, ...]


def drop(*keys: str) -> Callable[[State], None]:
    def spoil(state: State) -> None:
        for key in keys:
            del state[key]

    return spoil


def put(key: str, value: Tensor) -> Callable[[State], None]:
    def spoil(state: State) -> None:
        state[key] = value

    return spoil


def edit(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[State], None]:
    def spoil(state: State) -> None:
        state[key] = change(state[key])

    return spoil


def entry(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[-1, -1] = value
        return tensor

    return change


def of_rank(r: int) -> Callable[[State], None]:
    def spoil(state: State) -> None:
        for key, value in state.items():
            state[key] = value[:r] if "lora_A" in key else value[:, :r]

    return spoil


FAULTS = {
    "a module missing": Fault(drop(A, B), "keys", ("missing", "layer.1.v")),
    "a module more": Fault(
        lambda state: state.update(
            {A.replace("1.v", "2.v"): torch.ones(4, 12), B.replace("1.v", "2.v"): torch.ones(14, 4)}
        ),
        "keys",
        ("layer.2.v",),
    ),
    "half a module": Fault(drop(A), "keys", ("lora_A",)),
    "another rank": Fault(of_rank(3), "shapes", ("rank", "4", "3")),
    "another d_in": Fault(edit(A, lambda a: a[:, :6]), "shapes", ("12)", "6)")),
    "a shape that would broadcast": Fault(edit(B, lambda b: b[:1]), "shapes", ("(14,", "(1,")),
    "a row for a matrix": Fault(edit(A, lambda a: a[0]), "shapes", ("(12,)",)),
    "float16 for float32": Fault(edit(B, lambda b: b.half()), "shapes", ("float32", "float16")),
    "integers for float32": Fault(edit(A, lambda a: a.int()), "shapes", ("int32",)),
    "NaN": Fault(edit(A, entry(float("nan"))), "not-finite", ("finite", "NaN or infinity")),
    "infinity": Fault(edit(B, entry(float("inf"))), "not-finite", ("finite", "NaN or infinity")),
    "minus infinity": Fault(edit(A, entry(float("-inf"))), "not-finite", ("finite", "NaN or infinity")),
}
