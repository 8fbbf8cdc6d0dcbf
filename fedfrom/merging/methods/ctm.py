"""CtM: the updates are cut to the rank in two subspaces that they share, and merged there by another method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fedfrom.merging.linalg.tucker import tucker2
from fedfrom.merging.methods.choosing import Chooses
from fedfrom.merging.methods.spectral import averaged
from fedfrom.merging.methods.task_arithmetic import check_coefficient
from fedfrom.merging.methods.wrapping import Wrapper
from fedfrom.merging.spaces import Space, bases, space
from fedfrom.merging.updates import Change, Cores, Destination, Updates
from fedfrom.numeric import is_number


@dataclass(frozen=True, kw_only=True)
class CtM(Wrapper, Chooses):
    """Compress then Merge (He et al., 2026, arXiv 2606.03723): another method's merge of r x r coordinates.

    theta* = coefficient U M V^T, M what `inner` makes of O_t = U^T theta_t V. U and V, r orthonormal columns each, keep
    as much as they can of X_t = (beta ||theta_t|| + (1 - beta) m) theta_t / ||theta_t||, m the mean norm: sum_t
    ||U^T X_t V||_F^2 is made as large as HOSVD and HOOI make it (see `tucker2`). With beta = 0 each client counts alike
    in it, with beta = 1 by its squared norm. theta* has rank r at most, so that Eq. 6 cuts nothing more where there is
    no W. With the average inside no such theta* is closer to the updates than Eq. 6's, which is the best of rank r.

    X_t, O_t and the order of the steps are those of the authors' released code
    (github.com/ZhengbaoHe/compress-then-merge), which searches beta from 0 to 0.75 and has 0.25 with TIES in its
    example. Ours are: r is the rank that Eq. 6 is solved at; in rounds theta_t is compressed, and W + alpha theta* is
    cut as with every method. A plain matrix is compressed where `rank` is a whole number. Where all updates together
    have no more than r directions on one side, as where they share A, and where `rank` is a fraction, or None for a
    plain matrix, nothing is compressed: U and V are all directions that are not rounding in the inputs' dtype. sum_t
    and m weigh a client by the weight that `inner` gives it, relative to the others; zero updates do not count. HOOI
    ends by what a step gains; as released by how far it moves the relative error. Signs of columns are fixed, since
    even elections go to +.

    Of a LoRA module nothing dense is formed. Of a plain matrix all clients' are held at once, and time is that of an
    eigendecomposition of each side. What `Spectral` averages is averaged here too, times the coefficient.

    Parameters
    ----------
    beta : float (default: 0.25)
        0 to 1.
    inner : str (default: "ties")
        The name of the method that merges the O_t, which is given them as plain matrices: any that needs no
        statistics, chooses no basis of its own and wraps no other.
    inner_options : Mapping[str, Any] | None (default: None)
        Its options, but for those that it shares with this one; the scope "model" for FroM's weights alone.
    coefficient : float | str (default: 1.0)
        What theta* is multiplied by, finite; "auto" chooses it by `validate`. U and V are found once for all of
        `search`.
    iterations : int (default: 10000)
        At most so many steps of HOOI.
    tolerance : float (default: 1e-6)
        HOOI ends when a step gains no more than this share of sum_t ||X_t||^2.
    validate, search
        See `Chooses`.
    examples_power, rank, solver, seed, gauge
        See `ProductMethod`; `inner` has the same power and seed.
    """

    refused: ClassVar[frozenset[str]] = frozenset(
        ("regmean", "lorm", "knots-ta", "knots-ties", "knots-dare-ties", "core-ties", "core-dare-ties")
    )

    beta: float = 0.25
    inner: str = "ties"
    coefficient: float | str = 1.0  # type: ignore[misc]
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_coefficient(self.coefficient)
        if not is_number(self.beta) or not 0 <= self.beta <= 1:
            raise ValueError(f"beta: expected 0 to 1, found {self.beta!r}")
        if self.inner == "ties" and self.scope != "layer":
            raise ValueError(
                f"inner_options, scope: expected layer for TIES in CtM's coordinates, found {self.scope!r}"
            )

    def change(self, updates: Updates, coefficients: Tensor, destination: Destination) -> Change:
        """Return theta* by way of the coordinates; the mean of what is no weight of a linear layer."""
        cores = updates.cores() if updates.is_linear else None
        if cores is None:
            return averaged(updates, coefficients, float(self.coefficient))
        weights = coefficients.tolist()
        if not any(c > 0 and size > 0 for c, size in zip(weights, updates.sizes, strict=True)):
            return updates.sum(coefficients)
        rank = self.rank if updates.products is None else destination.rank
        columns = rank if isinstance(rank, int) else None
        # candidates of other coefficients have the same coordinates
        key = ("ctm", self.beta, columns, tuple(weights), self.iterations, self.tolerance)
        shared = updates.once(key, partial(self._compressed, updates, cores, weights, columns))
        return shared.merged(self._inner.change, coefficients, destination, float(self.coefficient))

    def _compressed(self, updates: Updates, cores: Cores, weights: Sequence[float], columns: int | None) -> Space:
        """Return the updates in U and V of that many columns; in all that there are where they need not be cut."""
        norms = [float(torch.linalg.vector_norm(M)) for M in cores.matrices]
        share = [c / max(weights) if norm > 0 else 0.0 for c, norm in zip(weights, norms, strict=True)]
        mean = math.fsum(s * norm for s, norm in zip(share, norms, strict=True)) / math.fsum(share)
        scales = [
            math.sqrt(s) * (self.beta + (1 - self.beta) * mean / norm) if s > 0 else 0.0
            for s, norm in zip(share, norms, strict=True)
        ]
        U, V = bases(updates, cores, scales)
        if columns is not None and columns < min(U.shape[1], V.shape[1]):
            targets = [s * (U.T @ M.to(U.dtype) @ V) for s, M in zip(scales, cores.matrices, strict=True)]
            own, other = tucker2(torch.stack(targets), columns, self.tolerance, self.iterations, updates.tolerance)
            U, V = U @ own, V @ other
        return space(updates, cores, U, V)
