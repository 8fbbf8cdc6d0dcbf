"""Task Arithmetic: the sum of the updates, or their mean, times a coefficient."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fedfrom.merging.methods.choosing import AUTO, Chooses
from fedfrom.numeric import is_number


def check_coefficient(coefficient: float | str) -> None:
    """Raise ValueError where what a sum is multiplied by is neither a finite number nor "auto"."""
    if (
        coefficient != AUTO
        and not is_number(coefficient)
        or (is_number(coefficient) and not math.isfinite(coefficient))
    ):
        raise ValueError(f"coefficient: expected a finite number, found {coefficient!r}")


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Chooses):
    """theta* = c sum_i theta_i, or c times their mean (Ilharco et al., 2023, arXiv 2212.04089).

    The paper adds task vectors with one coefficient for all: form "sum". For LoRA the sum of the products, stacked and
    solved back by Eq. 6: linear time, nothing dense. Clients send nothing more than their state.

    Parameters
    ----------
    coefficient : float | str (default: 1.0)
        c, finite; 0.5 to 1.0 is searched in arXiv 2506.02478. "auto" merges with each of `search` and takes the one
        whose merged state `validate` scores best (ties: the smaller); a result for each is held in memory.
    form : str (default: "sum")
        "sum" or "mean".
    examples_power : float (default: 0.0)
        p: client i counts n_i^p, relative to the clients' mean in the form "sum". `merge`'s `weights` are not divided
        by their sum there, but multiply each theta_i as they are.
    validate, search
        See `Chooses`.
    rank, solver, iterations, tolerance, seed, gauge
        See `Solver`.
    """

    coefficient: float | str = 1.0  # type: ignore[misc]
    form: str = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_coefficient(self.coefficient)
        if self.form not in ("sum", "mean"):
            raise ValueError(f"form: expected sum or mean, found {self.form!r}")

    def coefficients(self, weights: Tensor, mean_weight: float = 1.0) -> Tensor:
        """Return (n,) float64 c_i: c each in the form "sum" where all weights are 1, c / n in the form "mean"."""
        return float(self.coefficient) * weights * (len(weights) * mean_weight if self.form == "sum" else 1)
