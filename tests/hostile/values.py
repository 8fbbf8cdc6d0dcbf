"""Values that hostile input is made of, and states for it to be put in."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from tests.models import Arrays

PREFIX = "base_model.model."


Q, V, WORDS = (PREFIX + name for name in ("q", "layers.0.v", "words"))


HEAD, NORM = PREFIX + "head.weight", PREFIX + "norm"


CONFIG = {"r": 4, "lora_alpha": 8, "use_rslora": False}


def cases(number: int) -> Callable[[Any], Any]:
    """Run a test on so many cases with the profile that `make test` has, on more with one that has more examples."""
    return settings(max_examples=max(1, number * settings().max_examples // 50))


def mixed_state(rank: int = 4, seed: int = 0, dtype: type = np.float32) -> Arrays:
    """Return a state with all that a reply may hold: Linear with and without bias, embedding, tensors, buffers."""
    draw = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return np.asarray(draw.normal(size=shape)).astype(dtype)

    return {
        f"{Q}.lora_A.weight": normal(rank, 12),
        f"{Q}.lora_B.weight": normal(10, rank),
        f"{V}.lora_A.weight": normal(rank, 5),
        f"{V}.lora_B.weight": normal(6, rank),
        f"{V}.lora_B.bias": normal(6),
        f"{WORDS}.lora_embedding_A": normal(rank, 9),
        f"{WORDS}.lora_embedding_B": normal(7, rank),
        HEAD: normal(3, 10),
        f"{NORM}.running_mean": normal(10),
        f"{NORM}.num_batches_tracked": np.array(7),
    }


def moved(state: Arrays, seed: int, step: float = 0.1) -> Arrays:
    """Return what a client makes of a state: every real number a step away, every whole one a few more."""
    draw = np.random.default_rng(seed)
    return {
        key: (value + step * draw.normal(size=value.shape)).astype(value.dtype)
        if value.dtype.kind == "f"
        else value + seed % 5
        for key, value in state.items()
    }


def grams(seed: int) -> Arrays:
    """Return Gram matrices of the inputs of `mixed_state`'s linear layers."""
    draw = np.random.default_rng(seed)
    inputs = {name: draw.normal(size=(40, d)).astype(np.float32) for name, d in ((Q, 12), (V, 5), (HEAD[:-7], 10))}
    return {name: x.T @ x / 40 for name, x in inputs.items()}


def fishers(state: Arrays, seed: int) -> Arrays:
    """Return Fisher diagonals of a state's tensors."""
    return {key: value**2 for key, value in moved(state, seed).items() if value.dtype.kind == "f"}


# --- Values -----------------------------------------------------------------------------------------------------------


BOMB = r"(\w+\.?)+X"
"""Takes longer than anybody waits on a module name of sixty letters."""


PATHS = ["../../../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "~root/.ssh/id_rsa", "a/../../b", "C:\\x", "\0"]


texts = st.one_of(
    st.text(max_size=8),
    st.sampled_from([*PATHS, "", "\n", "a\nb", "four", "4", "NaN", "%s%n", "{}", "Q" * 300, "\ud800"]),
    st.integers(3, 5).map(lambda n: "x" * 10**n),
)


odd_numbers = st.sampled_from(
    [0, -1, True, 0.5, -0.0, 1e-320, 1e308, 10**18, 2**63, 10**400, -(10**400), math.nan, math.inf, -math.inf]
)


numbers = st.one_of(st.integers(-3, 20), st.integers(), st.floats(), odd_numbers)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=4,
)
"""What json.loads may return from a file that somebody else wrote."""


expressions = st.one_of(
    st.sampled_from(
        ["q", "v", r"layers\.0\.v", ".*", "q|words", "^q", r".*\.\d+\.v", "(q)", "words$", "", "q.", r"[qv]", "(?i)Q"]
    ),
    st.sampled_from([BOMB, "(a+)+$", "(.*)*X", "(a|a)" * 40, ".*" * 30 + "X", "a?" * 40 + "a" * 40, "(?:.|.)+X"]),
    st.sampled_from(
        ["(", "[", "*", "(?P<", "a{99999999999}", "(" * 3000 + ")" * 3000, "\\", "(?z)", "a{3,1}", "[b-a]"]
    ),
    texts,
)


patterns = st.one_of(
    st.dictionaries(expressions, st.one_of(st.integers(1, 12), numbers, json_values), max_size=3), json_values
)


extremes = st.sampled_from(
    [0.0, -0.0, 1e-45, 1e-38, 1e-10, 1e4, 6e4, 1e10, 1e19, 1e30, 1e38, 3.4e38, -3.4e38, 1e70, 1e300, math.nan, math.inf]
)


DTYPES = ["<f2", "<f4", "<f8", ">f4", "<c8", "<i1", "<i4", "<i8", "<u2", "<u8", "|b1", "<M8[s]", "<U3", "|V4"]


shapes = st.one_of(
    st.lists(st.integers(0, 12), max_size=4).map(tuple),
    st.sampled_from([(10**12,), (10**6, 10**6), (2**62,), (2**32, 2**32), (-1,), (-3, 10), (0, 10**12), (1,) * 70]),
)
