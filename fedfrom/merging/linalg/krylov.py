"""The leading singular triplets of a large matrix, formed or not, by few products with it: block Krylov iteration.

`leading` takes a small core's, where products cost next to nothing. Here a product is what costs: all that came of
those before it is kept and solved together, which takes half as many as polynomials do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fedfrom.merging.linalg.threads import each_block

# Steps before the space is cut back to its best quarter, and in all.
_SPACE = 32
_STEPS = 96
# Steps after which what is found is looked at every other time.
_LOOK = 6
# Rows of a matrix that are multiplied or squared at a time.
_PART = 512


class Operator(NamedTuple):
    """T (d_out, d_in) by its products with a few columns, float64 in and out whatever they are summed in.

    Attributes
    ----------
    shape : tuple[int, int]
    times, transposed_times : Callable[[Tensor], Tensor]
        T V of V (d_in, any), T^T U of U (d_out, any).
    energy : float | None
        ||T||_F^2, where it is known.
    """

    shape: tuple[int, int]
    times: Callable[[Tensor], Tensor]
    transposed_times: Callable[[Tensor], Tensor]
    energy: float | None = None

    @classmethod
    def of(cls, matrix: Tensor) -> Operator:
        """Return the operator of a matrix that is there, float32 or float64: products are summed in its dtype."""
        energy = sum(float(rows.to(torch.float64).square().sum()) for rows in matrix.split(_PART))
        return cls(
            (matrix.shape[0], matrix.shape[1]),
            lambda V: product(matrix, V).to(torch.float64),
            lambda U: product(matrix.T, U).to(torch.float64),
            energy,
        )


class Triplets(NamedTuple):
    """The first singular triplets of T, and the space that they were found in.

    Attributes
    ----------
    U, S, Vh : Tensor
        (d_out, r), (r,) descending, (r, d_in), float64.
    energy : float
        ||T||_F^2; estimated where the operator does not know it, see `energy_of`.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    energy: float


def krylov_svd(T: Operator, rank: int, tolerance: float, near: float, start: Tensor, probes: Tensor) -> Triplets | None:
    """Return the first `rank` singular triplets of T, or None: not found in so many steps, or products overflow.

    Algorithm 1 is subspace iteration: T^T T once in each step, the last columns alone kept. Here all columns are kept,
    V, T^T T V, (T^T T)^2 V, ..., orthonormal, and T is solved in their span. What is found is checked: with rho_i =
    ||T^T T v_i - S_i^2 v_i||, sum_j S_j^2 is below the optimum by at most the sum of rho_i^2 / (S_i^2 - c), or of
    rho_i, c the least of as many eigenvalues as there are columns to start with. A value that occurs more often than
    that many times is found no more often, which is enough.

    Parameters
    ----------
    T : Operator
        (d_out, d_in).
    rank : int
        r >= 1.
    tolerance : float
        How far ||T - U diag(S) Vh||_F^2 may be above its least.
    near : float
        How far the triplets may be turned, rho_i / (S_i^2 - c), where S_r and S_(r+1) are more than 1 % apart, so that
        they are determined.
    start : Tensor
        (d_in, columns) float64, random: at least `leading.columns_of(rank)`.
    probes : Tensor
        See `energy_of`.

    Notes
    -----
    Golub & Underwood (1977), Musco & Musco (2015); restarted as Wu & Simon (2000). Each step is orthogonalised against
    all before it, twice: in rounding's presence nothing less keeps a value from being found again and again.
    """
    b = start.shape[1]
    most_columns = min(_SPACE * b, T.shape[1] - b)
    # columns are kept as rows: so their products with one another are several times as fast
    Q = start.new_empty(most_columns + b, T.shape[1])
    TQ = start.new_empty(most_columns, T.shape[0])
    H = start.new_empty(most_columns, most_columns)  # (TQ)^T (TQ)
    Q[:b] = torch.linalg.qr(start).Q.T
    m = 0
    for step in range(_STEPS):
        block = slice(m, m + b)
        TQ[block] = T.times(Q[block].T).T
        W = T.transposed_times(TQ[block].T).T
        m += b
        H[block, :m] = TQ[block] @ TQ[:m].T
        H[:m, block] = H[block, :m].T
        if not bool(torch.isfinite(H[block, :m]).all()):  # factors whose scales leave the products' range
            return None
        full, R = m + b > most_columns, torch.eye(b, dtype=W.dtype, device=W.device)
        for _ in range(2):  # once is not orthogonal to rounding, least of all where little is left
            last, left = torch.linalg.qr((W - (W @ Q[:m].T) @ Q[:m]).T)
            W, R = last.T, left @ R
        Q[m : m + b] = W
        if m > _LOOK * b and step % 2 and not full:
            continue
        squares, Y = (part.flip(-1) for part in torch.linalg.eigh(H[:m, :m]))
        rho = torch.linalg.vector_norm(R @ Y[m - b :, :rank], dim=0)
        most, cut = float(squares[0]), float(squares[b - 1])
        gaps = squares[:rank] - cut
        short = torch.minimum(rho.square() / gaps.clamp_min(1e-300), rho)
        lost = float(short.sum())
        # values that are not found yet are too small
        apart = float(squares[rank]) < 0.99**2 * float(squares[rank - 1] + short[-1])
        if lost <= tolerance and (not apart or bool((rho <= near * gaps + 1e-14 * most).all())):
            # the eigenvalues' digits went with the squares: the values come of T's own columns
            U, S, P = torch.linalg.svd((Y[:, :b].T @ TQ[:m]).T, full_matrices=False)
            energy = T.energy
            if energy is None:
                energy = float(squares.clamp_min(0).sum()) + _beyond(T, Q[:m].T, probes)
            return Triplets(U[:, :rank], S[:rank], (P[:rank] @ Y[:, :b].T) @ Q[:m], energy)
        if full:
            if most_columns < _SPACE * b:  # all there are, nearly
                return None
            kept = most_columns // 4
            Q[:kept] = Y[:, :kept].T @ Q[:m]
            Q[kept : kept + b] = W
            TQ[:kept] = Y[:, :kept].T @ TQ[:m]
            H[:kept, :kept] = torch.diag(squares[:kept])
            m = kept
    return None


def energy_of(T: Operator, probes: Tensor) -> float:
    """Return ||T||_F^2; where the operator does not know it, an estimate in time that is linear in T's factors.

    ||T Q||^2 + ||T (I - Q Q^T) G||^2 / m, Q (d_in, m) of T's leading directions: without bias, with a standard error
    of sqrt(2 / (m k)) of the second part where that is k directions of one size. The exact number takes all pairs of
    factors, or the matrix itself.

    Parameters
    ----------
    T : Operator
        (d_out, d_in).
    probes : Tensor
        (d_in, 2 m) float64, standard normal: one half finds Q, the other is G.

    Notes
    -----
    Hutch++ (Meyer, Musco, Musco & Woodruff, 2021), Q after one more step of subspace iteration.
    """
    if T.energy is not None:
        return T.energy
    Q = torch.linalg.qr(T.transposed_times(T.times(probes.chunk(2, dim=1)[0]))).Q
    return float(T.times(Q).square().sum()) + _beyond(T, Q, probes)


def _beyond(T: Operator, Q: Tensor, probes: Tensor) -> float:
    """Return about ||T (I - Q Q^T)||_F^2, Q (d_in, m) with orthonormal columns."""
    G = probes.chunk(2, dim=1)[1]
    return float(T.times(G - Q @ (Q.T @ G)).square().sum()) / G.shape[1]


def product(matrix: Tensor, few: Tensor) -> Tensor:
    """Return matrix @ few, a few columns, in the matrix's dtype.

    As few rows times a matrix, some of its rows at a time: up to three times as fast. Large ones on several threads.
    """
    rows, (height, width) = few.T.to(matrix.dtype), matrix.shape
    if matrix.device.type != "cpu" or width == 0:  # a device shares the work out itself
        return (rows @ matrix.T).T
    found = rows.new_empty(len(rows), height)

    def part(start: int, stop: int) -> None:
        some = slice(start // width, stop // width)
        torch.mm(rows, matrix[some].T, out=found[:, some])

    each_block(matrix.numel(), _PART * width, part, apart=True)
    return found.T
