"""Numbers that come of tensors, fetched together: the host waits for a GPU once, not once for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def numbers(scalars: Sequence[Tensor]) -> list[float]:
    """Return what float() gives of each of some tensors without dimensions, on one device.

    Float64 holds every number of a narrower dtype, so no bit is lost on the way.
    """
    return torch.stack([scalar.to(torch.float64) for scalar in scalars]).tolist() if scalars else []
