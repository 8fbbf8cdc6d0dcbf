"""Rounds of more than 32 clients: sketches in place of pairwise inner products, in time linear in the clients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedfrom.merging.linalg.lowrank import random_normal
from fedfrom.merging.linalg.stack import Mixture, Stack

_SKETCH = 32  # rows and columns of an update's sketch
_LANCZOS = 30  # steps


def sketched(stack: Stack, mixtures: Sequence[Mixture]) -> Tensor:
    """Return (n, at most 2^10) float64 on the CPU: P theta_i Q, P and Q of 32 random rows and columns.

    Inner products of sketches are about 2^10 times those of the updates. The standard error of a squared norm is about
    0.35 / sqrt(k) of it where the update is k directions of one size: most for updates of rank 1.

    Parameters
    ----------
    stack : Stack
        Holds the updates' factors.
    mixtures : Sequence[Mixture]
        The n updates, as mixtures of those factors.
    """
    d_out, d_in, device = stack.left.height, stack.right.height, mixtures[0].values.device
    left = random_normal(min(_SKETCH, d_out), d_out, "sketch of rows").to(device)
    right = random_normal(d_in, min(_SKETCH, d_in), "sketch of columns").to(device)
    return stack.sketch(mixtures, left, right).cpu()


def largest_of_sketch(sketch: Tensor, weights: Tensor) -> float:
    """Return `largest_eigenvalue` of the sketch's inner products, in time that is linear in n: by Lanczos.

    Parameters
    ----------
    sketch : Tensor
        (n, m) float64.
    weights : Tensor
        (n,) float64.
    """
    rows = torch.nn.functional.normalize(sketch, dim=1, eps=1e-300) * weights.to(sketch.device).sqrt()[:, None]
    v = random_normal(1, rows.shape[1], "lanczos")[0].to(sketch.device)
    found: list[Tensor] = []
    for _ in range(min(_LANCZOS, *rows.shape)):
        for basis in found * 2:  # once is not orthogonal to rounding
            v = v - (basis @ v) * basis
        length = float(torch.linalg.vector_norm(v))
        if not length > 1e-300:  # zero updates, or no direction is left
            break
        found.append(v / length)
        v = (rows @ found[-1]) @ rows
    images = rows @ torch.stack(found, dim=1)
    return float((torch.linalg.matrix_norm(images, ord=2) ** 2).clamp(0, 1))
