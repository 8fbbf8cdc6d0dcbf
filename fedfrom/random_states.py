"""The states of the global random generators, which a resumed run restores."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def random_states() -> dict[str, Any]:
    """Return the states of the global generators of Python, NumPy and torch, as JSON values.

    fedfrom draws from none of them, but clients in the same process and evaluation functions may.
    """
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002
        "torch": _hex(torch.get_rng_state()),
        # asking for them would initialise CUDA where nobody uses it
        "cuda": [_hex(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_initialized() else [],
    }
    return json.loads(json.dumps(states, default=lambda array: array.tolist()))


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put the global generators into the states that `random_states` returned."""
    kind, words, gauss = states["python"]
    random.setstate((kind, tuple(words), gauss))
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(_unhex(states["torch"]))
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_unhex(state) for state in states["cuda"]])


def _hex(state: torch.Tensor) -> str:
    return bytes(state.tolist()).hex()


def _unhex(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
