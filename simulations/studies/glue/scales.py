"""Scales of a merged update: those around another, and two that need no labelled rows."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from torch import Tensor

EQUAL_NORM, PROJECTION = "equal norm", "projection 1/2"


def around(scales: Sequence[float], one: float) -> list[float]:
    """Return one of the ascending scales with the next smaller and the next larger."""
    place = scales.index(one)
    return list(scales[max(0, place - 1) : place + 2])


def data_free(body: Mapping[str, Tensor], states: Sequence[Mapping[str, Tensor]], scaling: float) -> dict[str, float]:
    """Return what theta* has to be multiplied by, under each rule, by name; sums go over all modules.

    "equal norm" makes ||theta*|| the mean of the ||theta_t||; "projection 1/2" makes the mean of
    <theta*, theta_t> / ||theta_t||^2 one half.

    Parameters
    ----------
    body : Mapping[str, Tensor]
        The merged adapter, whose B carries its scaling.
    states : Sequence[Mapping[str, Tensor]]
        The tasks' adapters.
    scaling : float
        What their products are multiplied by.
    """
    norms = [inner(state, state) ** 0.5 * scaling for state in states]
    shares = [inner(body, state) * scaling / norm**2 for state, norm in zip(states, norms, strict=True)]
    return {EQUAL_NORM: fmean(norms) / inner(body, body) ** 0.5, PROJECTION: 0.5 / fmean(shares)}


def inner(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the sum over modules of <B A, B' A'>, from the factors' small products."""
    total = 0.0
    for key, B in one.items():
        if "lora_B" in key:
            own = key.replace("lora_B", "lora_A")
            left, right = B.double().T @ other[key].double(), one[own].double() @ other[own].double().T
            total += float((left * right).sum())
    return total
