"""The bytes of a tensor in memory, of any dtype: numpy has no bfloat16, and no float8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def bytes_of(tensor: Tensor) -> Any:
    """Return the memory of a flat, contiguous tensor on the CPU as bytes, without a copy."""
    return tensor.view(torch.uint8).numpy().data if tensor.numel() else b""
