"""What can be wrong with one client of three, and what is said of it, wherever it is merged.

FAULTS are those of its adapter, FULL of its full model, CONFIGS of its adapter's config. `tests/test_faults.py` runs
each through `merge`, the strategy and the command line. Faults that only one of them can meet (broken records, folders,
metrics) are tested where they can occur.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.folders import PREFIX, checkpoint_state, normal

MODULE = f"{PREFIX}layer.1.v"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"  # (4, 12), (14, 4)
W, BIAS, EMBED = "model.layer.3.weight", "model.head.bias", "model.embed.weight"  # (8, 8), (3,), (20, 8)
MEAN, STEPS = "model.norm.running_mean", "model.steps"  # (8,) float32, () int64
State = dict[str, Tensor]


class Fault(NamedTuple):
    """One client's fault.

    Attributes
    ----------
    spoil : Callable[[Any], None]
        Changes the client's state, or its config, in place.
    kind : str
        The kind of its rejection in a round, as `report.reasons` counts it.
    words : tuple[str, ...]
        What every message has, beside the client's name, "expected" and "found".
    found : str
        What every message has after "found".
    """

    spoil: Callable[[Any], None]
    kind: str
    words: tuple[str, ...]
    found: str = ""


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
    "a module missing": Fault(drop(A, B), "keys", ("missing",), MODULE),
    "a module more": Fault(
        lambda state: state.update(
            {A.replace("1.v", "2.v"): torch.ones(4, 12), B.replace("1.v", "2.v"): torch.ones(14, 4)}
        ),
        "keys",
        ("more",),
        MODULE.replace("1.v", "2.v"),
    ),
    "half a module": Fault(drop(A), "keys", ("lora_A",), MODULE),
    "another rank": Fault(of_rank(3), "shapes", ("layer.0.q", "rank", "4"), "3"),
    "another d_in": Fault(edit(A, lambda a: a[:, :6]), "shapes", (MODULE, "12)"), "6)"),
    "a shape that would broadcast": Fault(edit(B, lambda b: b[:1]), "shapes", (MODULE, "(14,"), "(1,"),
    "a row for a matrix": Fault(edit(A, lambda a: a[0]), "shapes", (A,), "(12,)"),
    "float16 for float32": Fault(edit(B, lambda b: b.half()), "shapes", (B, "float32"), "float16"),
    "integers for float32": Fault(edit(A, lambda a: a.int()), "shapes", (A,), "int32"),
    "NaN": Fault(edit(A, entry(math.nan)), "not-finite", (A, "finite"), "NaN or infinity"),
    "infinity": Fault(edit(B, entry(math.inf)), "not-finite", (B, "finite"), "NaN or infinity"),
    "minus infinity": Fault(edit(A, entry(-math.inf)), "not-finite", (A, "finite"), "NaN or infinity"),
}


def full_state(seed: int) -> State:
    """Return a full model's state, with weights, a bias, a running statistic and an integer."""
    return {**checkpoint_state(seed), MEAN: normal(8, seed=seed)}


FULL = {
    "a tensor missing": Fault(drop(W), "keys", ("missing",), W),
    "a tensor more": Fault(put("model.extra", torch.ones(2)), "keys", ("more",), "model.extra"),
    "other keys": Fault(lambda state: (state.clear(), state.update(w=torch.ones(2))), "keys", ("missing",), "'w'"),
    "transposed": Fault(edit(EMBED, lambda x: x.T.contiguous()), "shapes", (EMBED, "(20, 8)"), "(8, 20)"),
    "a row that would broadcast": Fault(edit(W, lambda x: x[:1]), "shapes", (W, "(8, 8)"), "(1, 8)"),
    "a column of a vector": Fault(edit(BIAS, lambda x: x[:, None]), "shapes", (BIAS, "(3,)"), "(3, 1)"),
    "a number for a matrix": Fault(put(W, torch.tensor(1.0)), "shapes", (W, "(8, 8)"), "()"),
    "float64 for float32": Fault(edit(W, lambda x: x.double()), "shapes", (W, "float32"), "float64"),
    "bfloat16 for float32": Fault(edit(W, lambda x: x.bfloat16()), "shapes", (W, "float32"), "bfloat16"),
    "integers for float32": Fault(edit(W, lambda x: x.int()), "shapes", (W, "float32"), "int32"),
    "float32 for an integer": Fault(edit(STEPS, lambda x: x.float()), "shapes", (STEPS, "int64"), "float32"),
    "NaN": Fault(edit(W, entry(math.nan)), "not-finite", (W, "finite"), "NaN or infinity"),
    "infinity": Fault(edit(EMBED, entry(math.inf)), "not-finite", (EMBED, "finite"), "NaN or infinity"),
    "NaN in a statistic": Fault(edit(MEAN, lambda x: x * math.nan), "not-finite", (MEAN, "finite"), "NaN or infinity"),
    "infinity in a statistic": Fault(
        put(MEAN, torch.full((8,), math.inf)), "not-finite", (MEAN, "finite"), "NaN or infinity"
    ),
    "minus infinity in a statistic": Fault(
        put(MEAN, torch.full((8,), -math.inf)), "not-finite", (MEAN, "finite"), "NaN or infinity"
    ),
}


def say(**fields: Any) -> Callable[[dict[str, Any]], None]:
    """Return a fault that sets fields of a config; those that are None are left out of it."""

    def spoil(config: dict[str, Any]) -> None:
        config.update(fields)
        for name in [name for name, value in fields.items() if value is None]:
            del config[name]

    return spoil


CONFIGS = {
    "no r": Fault(say(r=None), "config", (" r",)),
    "no lora_alpha": Fault(say(lora_alpha=None), "config", ("lora_alpha",)),
    "r of words": Fault(say(r="four"), "config", (" r",), "'four'"),
    "r of 0": Fault(say(r=0), "config", (" r",), "0"),
    "r below 0": Fault(say(r=-4), "config", (" r",), "-4"),
    "r of half": Fault(say(r=0.5), "config", (" r", "whole"), "0.5"),
    "r of four and a half": Fault(say(r=4.5), "config", (" r", "whole"), "4.5"),
    "r infinite": Fault(say(r=math.inf), "config", (" r",), "inf"),
    "r of NaN": Fault(say(r=math.nan), "config", (" r",), "nan"),
    "lora_alpha of words": Fault(say(lora_alpha="16"), "config", ("lora_alpha",), "'16'"),
    "lora_alpha of 0": Fault(say(lora_alpha=0), "config", ("lora_alpha",), "0"),
    "lora_alpha below 0": Fault(say(lora_alpha=-8), "config", ("lora_alpha",), "-8"),
    "lora_alpha of NaN": Fault(say(lora_alpha=math.nan), "config", ("lora_alpha",), "nan"),
    "lora_alpha infinite": Fault(say(lora_alpha=math.inf), "config", ("lora_alpha",), "inf"),
    "r of a boolean": Fault(say(r=True), "config", (" r",), "True"),
    "use_rslora of words": Fault(say(use_rslora="False"), "config", ("use_rslora",), "'False'"),
    "a pattern that is a list": Fault(say(rank_pattern=[1]), "config", ("rank_pattern",), "[1]"),
    "a pattern that is text": Fault(say(alpha_pattern="v"), "config", ("alpha_pattern",), "'v'"),
    "a pattern of words": Fault(say(rank_pattern={"v": "x"}), "config", ("rank_pattern", "'v'"), "'x'"),
    "a pattern of half": Fault(say(rank_pattern={"v": 0.5}), "config", ("rank_pattern", "'v'", "whole"), "0.5"),
    "a pattern of null": Fault(say(alpha_pattern={"v": None}), "config", ("alpha_pattern", "'v'"), "None"),
    "a pattern of NaN": Fault(say(alpha_pattern={"v": math.nan}), "config", ("alpha_pattern", "'v'"), "nan"),
    "a pattern of infinity": Fault(say(rank_pattern={"v": math.inf}), "config", ("rank_pattern", "'v'"), "inf"),
    "a pattern of 0": Fault(say(alpha_pattern={"v": 0}), "config", ("alpha_pattern", "'v'"), "0"),
    "a rank_pattern of 0": Fault(say(rank_pattern={"v": 0}), "config", ("rank_pattern", "'v'"), "0"),
    "a pattern below 0": Fault(say(rank_pattern={"v": -4}), "config", ("rank_pattern", "'v'"), "-4"),
    "a pattern that is no expression": Fault(say(rank_pattern={"(": 4}), "config", ("rank_pattern",), "("),
    "a pattern that is tried for ever": Fault(say(rank_pattern={"(a+)+b": 4}), "config", ("rank_pattern",), "(a+)+b"),
}
