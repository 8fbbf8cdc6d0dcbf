"""FroM (arXiv 2506.02478): each client's update of a layer weighted by its Frobenius norm to the power k."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedfrom.merging.methods.choosing import Chooses
from fedfrom.merging.methods.task_arithmetic import check_coefficient
from fedfrom.merging.updates import Change, Destination, Updates
from fedfrom.merging.weights import log_shares, normalised

# Norms this close to the largest share the weight at k = infinity.
_TIE = 1e-6


def weights(
    norms: Sequence[float],
    k: float,
    examples: Sequence[float] | None = None,
    examples_power: float = 0.0,
    given: Sequence[float] | None = None,
) -> Tensor:
    """Return w_i = u_i n_i^p ||theta_i||_F^k / sum_j u_j n_j^p ||theta_j||_F^k (Eq. 1).

    Formed in log space, so no norm and no k overflows. The extremes are exact: k = 0 gives the (example-weighted)
    mean, with ||0||^0 = 1; k = infinity gives the largest norm all the weight (ties within 1e-6 share it); where
    every norm is 0 the weights are those of k = 0. A client with u_i = 0 has none, and the others' are what they are
    without it. With k < 0 a norm of 0 has the weight 0, as with k > 0: who changed nothing says nothing.

    Parameters
    ----------
    norms : Sequence[float]
        (n,) ||theta_i||_F, finite, >= 0.
    k : float
        Any number but minus infinity.
    examples, examples_power, given
        n_i, p and u_i: see `weights.log_shares`. The paper has neither n_i nor u_i.

    Returns
    -------
    Tensor
        (n,) float64.
    """
    shares = log_shares(len(norms), examples, examples_power, given)  # log(u_i n_i^p)
    powers = _log_powers(norms, k, [share > -math.inf for share in shares])  # log ||theta_i||^k
    return normalised([share + power for share, power in zip(shares, powers, strict=True)])


def _log_powers(norms: Sequence[float], k: float, counts: Sequence[bool]) -> list[float]:
    """Return (n,) log(||theta_i||^k), up to a constant: 0 for clients that do not count, and where none trained."""
    heard = [norm for norm, counted in zip(norms, counts, strict=True) if counted and norm > 0]
    if k == 0 or not heard:
        return [0.0] * len(norms)
    most = max(heard) if k > 0 else min(heard)  # whose power is the largest, so that no log is above 0

    def log_power(norm: float) -> float:
        if k == math.inf:
            return 0.0 if norm >= most * (1 - _TIE) else -math.inf
        # the norms' quotients could leave the range of a float, and log 0 is none
        return k * (math.log(norm) - math.log(most)) if norm > 0 else -math.inf

    return [log_power(norm) if counted else 0.0 for norm, counted in zip(norms, counts, strict=True)]


@dataclass(frozen=True, kw_only=True)
class FroM(Chooses):
    """FroM: theta* = c sum_i w_i theta_i (Eq. 5), w_i proportional to n_i^p ||theta_i||_F^k (Eq. 1); adapters by Eq. 6.

    Parameters
    ----------
    k : float | str (default: 1.0)
        Power of the norm; 0 is the mean, infinity the largest update alone. The paper's is 1; -1 weighs by inverse
        norms, as NAN does (arXiv 2505.16148; FroM's weights sum to 1). Below 0 a client that hardly trained outweighs
        all others, and only an update of exactly 0 counts for nothing. Minus infinity is refused. Norms are taken
        after clipping, and equal ones share: with `clip`, infinity gives all that were shortened the same weight (norms
        1, 2, 3, 4 with clip=1.0 become 1, 2, 2.5, 2.5 and weigh 0, 0, 1/2, 1/2). "auto" merges with each k of `search`
        and takes the one whose merged state `validate` scores best (ties: the smaller). In a layer k then stays within
        bounds, alpha (1 + max(k, 0) lambda_max) < 2, 1 + k lambda_max >= 0 and 1 / sum w_i^2 >= n / 2: beyond them the
        layer gets the next of these k towards 0 that does (its report says which; updates of one line, such as those
        of a bias of two classes, keep k below 1 at alpha = 1). Norms, Gram matrices and factorisations are computed
        once for all k; a result for each k is held in memory.
    examples_power : float (default: 0.0)
        p, the power of each client's number of examples. The paper's is 0.
    coefficient : float | str (default: 1.0)
        c, finite. The paper's is 1; it multiplies the step as `server_lr` does, which "safe" and the bounds on k take
        into account. "auto" chooses it by `validate`, alone or together with k.
    scope : str (default: "layer")
        "layer", the paper's: weights from each layer's norms; "model": one weight a client, from the norm of its
        whole update.
    validate : Callable[[Mapping[str, Tensor]], float] | None (default: None)
        The score of a merged state, higher is better; a k whose score is NaN is not taken. For "auto" alone.
    search : Mapping[str, Sequence[float]] | None (default: None)
        The values to choose from, by option: {"k": (0, 0.5, 1)}. None is (0, 0.25, 0.5, 1, 2) for k and
        (0.3, 0.5, 0.7, 1, 1.5) for the coefficient. For options that are "auto" alone.
    rank, solver, iterations, tolerance, seed, gauge
        How adapters are solved back to a rank: see `Solver`.

    Examples
    --------
    >>> import torch
    >>> from fedfrom import FroM, merge
    >>> states = [{"w": torch.ones(4)}, {"w": 3 * torch.ones(4)}]
    >>> merged, report = merge(states, {"w": torch.zeros(4)}, FroM(k=1.0))
    >>> report.layers[0].norms, [round(weight, 6) for weight in report.layers[0].weights]
    ([2.0, 6.0], [0.25, 0.75])
    >>> merged["w"]
    tensor([2.5000, 2.5000, 2.5000, 2.5000])
    """

    searchable: ClassVar[tuple[str, ...]] = ("k", "coefficient")

    k: float | str = 1.0  # type: ignore[assignment,misc]
    coefficient: float | str = 1.0  # type: ignore[misc]
    scope: str = "layer"  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_coefficient(self.coefficient)

    @property
    def step(self) -> float:  # type: ignore[override]
        """|c|."""
        return abs(float(self.coefficient))

    def coefficients(self, weights: Tensor, mean_weight: float = 1.0) -> Tensor:
        """Return (n,) float64 c w_i."""
        # the same tensor: what is reported of a weighted mean costs least
        return weights if self.coefficient == 1 else weights * float(self.coefficient)

    def weights(self, updates: Updates, examples: Sequence[float] | None, given: Sequence[float] | None) -> Tensor:
        """Return w_i by Eq. 1: from the layer's norms, or with scope="model" from those of the whole updates."""
        norms = updates.sizes if self.known is None else [self.known[i] for i in updates.order]
        return weights(norms, float(self.k), examples, self.examples_power, given)

    def change(self, updates: Updates, coefficients: Tensor, destination: Destination) -> Change:
        """Return theta* = c sum_i w_i theta_i (Eq. 5)."""
        return updates.sum(coefficients)

    def survey(self, layers: Iterable[Updates]) -> list[float] | None:
        """Return (n,) the norms of the clients' whole updates, in the order given, with scope="model"."""
        if self.scope != "model":
            return None
        sizes = [layer.clipped_norms for layer in layers]
        return [math.hypot(*own) for own in zip(*sizes, strict=True)] or None
