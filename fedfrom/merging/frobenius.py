"""FroM (arXiv 2506.02478): each client's update of a layer weighted by its Frobenius norm to the power k."""

from __future__ import annotations

from dataclasses import dataclass

from fedfrom.merging.method import ProductMethod
from fedfrom.merging.weights import check_weighting


@dataclass(frozen=True, kw_only=True)
class FroM(ProductMethod):
    """FroM: theta* = sum_i w_i theta_i (Eq. 5), w_i proportional to n_i^p ||theta_i||_F^k (Eq. 1); adapters by Eq. 6.

    Parameters
    ----------
    k : float (default: 1.0)
        Power of the norm, k >= 0; 0 is the mean, infinity the largest update alone. The paper's is 1.
    examples_power : float (default: 0.0)
        p, the power of each client's number of examples. The paper's is 0.
    scope : str (default: "layer")
        "layer", the paper's: weights from each layer's norms; "model": one weight a client, from the norm of its
        whole update.
    rank, solver, iterations, tolerance, seed
        How adapters are solved back to a rank: see `Solver`.
    """

    k: float = 1.0  # type: ignore[misc]
    scope: str = "layer"  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weighting(self.k, self.examples_power, self.scope)
