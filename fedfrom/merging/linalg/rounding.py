"""What is rounding and what is an update, by the dtype that tensors came in, not by that of our arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

# The difference of two adapters that are one but for rounding has singular values below this many epsilons of the
# largest one of theirs.
_DIRECTIONS = 2
# What factorisations in float64 leave behind themselves, relative to the largest singular value.
_ARITHMETIC = 1e-12
# Units in the last place that one entry may move by when a factor is rescaled by other operations than ours.
_PLACES = 2


def rescaled(factor: Tensor, ratio: float) -> Tensor:
    """Return factor * ratio in the factor's dtype: what a client of another scaling loads in place of B.

    `fedfrom.client.load` calls this, and so does the server for what the client started from. Both get the same bits,
    so that a client that trains nothing sends back an update of exactly zero.

    Parameters
    ----------
    factor : Tensor
        B, or lora_B.bias; floating point. Not changed.
    ratio : float
        The global adapter's scaling divided by the client's.
    """
    return factor if ratio == 1.0 else factor * ratio


def is_rounding(found: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors differ by no more than rounding in the dtype of the first.

    All entries together by at most one epsilon of that dtype, and each by at most two units in its last place. Training
    moves small entries by more than that, even where its step is as small as one epsilon of the whole.

    Parameters
    ----------
    found : Tensor
        What came, in the dtype that it came in.
    expected : Tensor
        Of the same shape; float64.
    """
    limits = torch.finfo(found.dtype)
    difference = found.to(torch.float64) - expected
    sizes = expected.abs().clamp_min(limits.tiny)  # below it the places stay as far apart as at it
    close = bool((difference.abs() <= _PLACES * limits.eps * sizes).all())
    return close and bool(torch.linalg.vector_norm(difference) <= limits.eps * torch.linalg.vector_norm(expected))


def rank_tolerance(dtype: torch.dtype) -> float:
    """Return the share of the largest singular value at and below which a direction is rounding.

    Two copies of one adapter that differ in their last places differ by a matrix whose singular values are up to about
    a fifth of an epsilon of the largest one. A method that gives every direction the same weight would turn that matrix
    into an update.

    Parameters
    ----------
    dtype : torch.dtype
        That the adapters came in, floating point.

    Returns
    -------
    float
        2 epsilons; never below 1e-12, which float64 factorisations leave.
    """
    return max(_DIRECTIONS * torch.finfo(dtype).eps, _ARITHMETIC)
