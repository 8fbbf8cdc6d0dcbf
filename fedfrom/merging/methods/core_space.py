"""Core Space: TIES and DARE-TIES on small matrices, the updates in the singular directions that all of them have."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from fedfrom.merging.methods.base import ProductMethod
from fedfrom.merging.methods.dare import DareTies
from fedfrom.merging.methods.spectral import averaged
from fedfrom.merging.methods.ties import Ties
from fedfrom.merging.spaces import Space, bases, space
from fedfrom.merging.updates import Change, Cores, Destination, Updates


def core_space(updates: Updates, cores: Cores) -> Space:
    """Return the updates in bases that come from the updates alone."""
    return space(updates, cores, *bases(updates, cores))


class InCoreSpace(ProductMethod):
    """Merges the cores M_i by the method that it is mixed into; what is no weight of a linear layer is averaged.

    The paper takes U from the factors B side by side and V from the A, so that its M_i depend on which factors a
    product was sent in, and on alpha. Here they come from the products. The released code
    (github.com/apanariello4/core-space-merging) keeps all T r vectors, and the signs that its SVD gives them; here
    those that are rounding are left out, so that a density is a share of fewer entries, and signs are fixed.

    Of a LoRA module nothing dense is formed. A plain matrix, which the paper does not merge, gets its bases from the
    clients' matrices: all of them are held at once, and time is that of an eigendecomposition of each side,
    O(d_out^3 + d_in^3).
    """

    def change(self, updates: Updates, coefficients: Tensor, destination: Destination) -> Change:
        """Return theta* = U M V^T, M the merged M_i."""
        cores = updates.cores() if updates.is_linear else None
        if cores is None:
            return averaged(updates, coefficients, float(self.coefficient))
        if not any(updates.sizes):
            return updates.sum(coefficients)
        # candidates of other coefficients have the same bases
        shared = updates.once("core space", partial(core_space, updates, cores))
        return shared.merged(super().change, coefficients, destination)


@dataclass(frozen=True, kw_only=True)
class CoreTies(InCoreSpace, Ties):
    """Core Space (Panariello et al., 2025, arXiv 2509.17786), then TIES on the cores: see `InCoreSpace`.

    An update that is the others' but for rounding in the inputs' dtype adds no direction. Clients send nothing more
    than their state.

    Parameters
    ----------
    density, majority, coefficient, examples_power, validate, search, rank, solver, iterations, tolerance, seed, gauge
        See `Ties`; entries are trimmed by layer, since cores are not comparable between layers.
    scope : str (default: "layer")
        That, and nothing else.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope != "layer":
            raise ValueError(f"scope: expected layer for Core Space, found {self.scope!r}")


@dataclass(frozen=True, kw_only=True)
class CoreDareTies(InCoreSpace, DareTies):
    """Core Space, then DARE and TIES' election on the cores: see `InCoreSpace`.

    Parameters
    ----------
    density, majority, coefficient, form, examples_power, validate, search
    rank, solver, iterations, tolerance, seed, gauge
        See `DareTies`.
    """
