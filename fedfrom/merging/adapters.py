"""The updates of one LoRA module as products, and T = W + alpha theta* solved back to a rank (Eq. 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fedfrom.merging.beside import merge_beside
from fedfrom.merging.clients import Round
from fedfrom.merging.deltas import adapter_deltas
from fedfrom.merging.layer import MOST_COSINES, LayerUpdates, Merged
from fedfrom.merging.linalg import sums
from fedfrom.merging.linalg.entries import Combine, Entries, Histogram, form
from fedfrom.merging.linalg.gauges import gauged
from fedfrom.merging.linalg.krylov import energy_of
from fedfrom.merging.linalg.leading import columns_of
from fedfrom.merging.linalg.lowrank import LowRank, norms_and_cosines
from fedfrom.merging.linalg.many import sketched
from fedfrom.merging.linalg.numbers import numbers
from fedfrom.merging.linalg.rounding import rank_tolerance
from fedfrom.merging.linalg.stack import Stack
from fedfrom.merging.peft import layers as L
from fedfrom.merging.solve import Solution, Solver, energy_probes
from fedfrom.merging.sources import Inputs, check_finite, check_norms, check_result, summing_order
from fedfrom.merging.stability import Weighing
from fedfrom.merging.unchanged import keep_unchanged
from fedfrom.merging.updates import Change, Cores, Destination


@dataclass(frozen=True)
class _ProductChange(Change):
    """theta* of a LoRA module.

    Attributes
    ----------
    matrix : LowRank
        theta*, in units.
    coefficients : Tensor | None (default: None)
        (n,) c_i where theta* is sum_i c_i theta_i, 0 where theta_i is.
    dense : Tensor | None (default: None)
        theta* as one matrix, where it was formed as one.
    """

    matrix: LowRank
    coefficients: Tensor | None = None
    dense: Tensor | None = None

    @classmethod
    def of(cls, matrix: Tensor | LowRank) -> _ProductChange:
        """Return the change of a matrix, dense or as products."""
        if isinstance(matrix, LowRank):
            return cls(matrix)
        return cls(LowRank.from_dense(matrix), dense=matrix)


class AdapterUpdates(LayerUpdates):
    """The updates of one LoRA module: see `LayerUpdates`; `norms` where those as sent are known.

    What several candidates of a method need of the updates is computed once.
    """

    kind = "adapter"
    dtype = torch.float64
    shape: tuple[int, int]
    products: list[LowRank]

    def __init__(self, inputs: Inputs, name: str, shared: Round, norms: list[float] | None = None) -> None:
        super().__init__(inputs, name, shared)
        self._W, self._adapters, deltas = adapter_deltas(inputs, name)
        self.has_reference, self.shape = self._W is not None, deltas[0].shape
        self.order = summing_order(inputs, name, _ordering_numbers(deltas))
        self._deltas = [deltas[i] for i in self.order]
        if norms is None:
            found = sorted(zip(self.order, self._measured[0], strict=True))
            norms = check_norms([norm for _, norm in found], inputs, name)
            check_finite([inputs.reference_of(name)], name, list(inputs.template(name).layers[name].keys))
        base = 0.0 if self._W is None else self._W.norm()
        self._clip(norms, shared.clip, base)
        self.entry_unit, self._W_size = self.unit, base / self.unit
        # an update within rounding of zero is zero: it must not vote with its rounding
        self.products = [
            delta * (self.clip_factors[i] / self.unit if norms[i] > 0 else 0.0)
            for i, delta in zip(self.order, self._deltas, strict=True)
        ]

    @property
    def ranks(self) -> list[int]:
        return [product.rank for product in self._adapters]

    @cached_property
    def _stack(self) -> Stack:
        """W's factors and the updates', side by side."""
        W = [] if self._W is None else self._W.terms
        sent = [*self._adapters, *([] if self._W is None else [self._W])]
        narrow = all(term.B.dtype != torch.float64 for product in sent for term in product.terms)
        return Stack([W, *(delta.terms for delta in self._deltas)], narrow)

    @cached_property
    def _measured(self) -> tuple[list[float], Tensor | None]:
        """Norms and cosines of the updates as sent; pair by pair the time grows with the square of the clients."""
        return norms_and_cosines(self._deltas, self._stack, pairs=len(self) <= MOST_COSINES)

    @cached_property
    def gram(self) -> Tensor | None:
        cosines, sizes = self._measured[1], torch.tensor(self.sizes, dtype=torch.float64)
        return None if cosines is None else sizes[:, None] * cosines * sizes

    @cached_property
    def sketch(self) -> Tensor | None:
        if self.gram is not None:
            return None
        return sketched(self._stack, [self._stack.mixture(theta.terms) for theta in self.products])

    @property
    def tolerance(self) -> float:  # type: ignore[override]
        """See `Updates`; looked up when a method asks, since lazily read files have to be asked for their dtypes."""
        return max(
            rank_tolerance(sent.state.stored_dtype(key))
            for sent in self.inputs.sent
            for part, key in sent.layers[self.name].keys.items()
            if part in L.RANK_DIMENSION
        )

    @property
    def is_linear(self) -> bool:
        return not self.inputs.template(self.name).layers[self.name].is_embedding

    @cached_property
    def entries(self) -> Entries:
        n = len(self)
        return Entries([theta.dense() for theta in self.products], [None] * n, [1.0] * n, torch.float64)

    def counts(self, i: int, histogram: Histogram, dtype: torch.dtype) -> Sequence[Tensor]:
        # one client's matrix alone is formed
        return Entries([self.products[i].dense()], [None], [self.unit], torch.float64).counts(0, histogram, dtype)

    def statistics(self, kind: str) -> list[Tensor] | None:
        return self.inputs.statistics(self.name, self.order, (self.shape[1],) * 2 if kind == "gram" else self.shape)

    def sum(self, coefficients: Tensor) -> Change:
        # a zero update adds nothing but rounding
        c = coefficients * (torch.tensor(self.sizes, dtype=torch.float64) > 0)
        return _ProductChange(LowRank.sum(self.products, c.tolist()), c)

    def entrywise(self, combine: Combine) -> Change:
        return _ProductChange.of(form(self.entries, combine).reshape(self.shape))

    def formed(self, matrix: Tensor | LowRank) -> Change:
        return _ProductChange.of(matrix)

    def settled(self, change: Change) -> LowRank:
        assert isinstance(change, _ProductChange)
        return change.matrix

    def cores(self) -> Cores:
        cores = [self._stack.core(theta.terms) for theta in self.products]
        left, right = cores[0].left, cores[0].right

        def lift(M: Tensor) -> Change:
            identity = torch.eye(M.shape[1], dtype=M.dtype, device=M.device)
            return _ProductChange(LowRank(left.lift(M), right.lift(identity).T))

        return Cores([core.C for core in cores], lift, left.lift, right.lift)

    def destination(self, weighing: Weighing) -> Destination:
        if not isinstance(weighing.method, Solver):  # methods on factors see no adapters
            name = type(weighing.method).__name__
            raise ValueError(
                f"{name}: expected a ProductMethod for LoRA modules, which solves back to a rank, found none"
            )
        caps = self.shared.as_reference
        rank = _checked_rank(weighing.method.rank, self._own_rank, self._adapters, self.shape, self.name, caps)
        return Destination(None if self._W is None else self._W * (1 / self.unit), weighing.server_lr, rank)

    @property
    def _own_rank(self) -> int:
        """W's rank, else the largest client's."""
        return self._W.rank if self._W is not None else max(self._adapters[i].rank for i in self.inputs.with_weight)

    def finish(self, change: Change, weighing: Weighing, destination: Destination) -> Merged:
        assert isinstance(change, _ProductChange)
        solution = self._solve(change, weighing, destination)
        inner, square, cosines = self._inner_and_square(change, weighing, solution)
        tensors = self._write(solution, weighing)
        for key, tensor in tensors.items():
            check_result(key, tensor, not tensor.is_floating_point() or sums.is_finite(tensor))
        return Merged(
            tensors,
            inner,
            square,
            solution.rank,
            solution.residual,
            solution.optimum,
            solution.energy,
            solution.iterations,
            cosines,
        )

    def _solve(self, change: _ProductChange, weighing: Weighing, destination: Destination) -> Solution:
        """Return the factors of T that Eq. 6 asks for, in units."""
        (W, alpha, rank), method, theta = destination, weighing.method, change.matrix
        assert isinstance(method, Solver)
        target = theta * alpha if W is None else LowRank.sum([W, theta], [1.0, alpha])
        kept = keep_unchanged(self._W, self._adapters, target, theta, alpha, rank, self.unit, self._scaling_out)
        if kept is not None:
            return kept
        c = weighing.coefficients if change.coefficients is None else change.coefficients
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        parts = self._W_size**2 + alpha**2 * float((c * sizes).square().sum())
        scale = alpha**2 * self.weighted_energy(weighing.weights)
        rows = self._own_rank if self.shared.as_reference else None
        solution = method.solve(target, rank, self.name, scale, rows, self._stack, parts)
        template = self.inputs.template(self.name)
        layer, stored = template.layers[self.name], self.unit / self._scaling_out
        dtype = template.state.stored_dtype(next(layer.keys[part] for part in L.RANK_DIMENSION if part in layer.keys))
        return replace(solution, matrix=gauged(solution.matrix, method.gauge, stored, dtype, layer.is_embedding))

    def _inner_and_square(
        self, change: _ProductChange, weighing: Weighing, solution: Solution
    ) -> tuple[float, float, list[float]]:
        """Return <sum_i w_i theta_i, theta*>, ||theta*||^2, and the cosines of a theta* that is no weighted sum."""
        w, c, theta = weighing.weights, change.coefficients, change.matrix
        if c is None:
            size = theta.norm() if change.dense is None else float(torch.linalg.matrix_norm(change.dense))
            inners = self._inners(change)
            scales = [size * own for own in self.sizes]
            cosines = [x / s if s > 0 else 0.0 for x, s in zip(inners.tolist(), scales, strict=True)]
            return float(w.to(inners) @ inners), size**2, [min(1.0, max(-1.0, cosine)) for cosine in cosines]
        if self.gram is not None:
            inner = self.gram @ c
            return float(w @ inner), max(0.0, float(c @ inner)), []
        if self._W is None and weighing.server_lr:  # T is alpha theta*
            square = solution.energy / weighing.server_lr**2
        else:
            square = self._square_of(theta, solution.rank)
        multiple = self.multiple(c, w)
        if multiple is None:
            return LowRank.sum(self.products, w.tolist()).inner(theta), square, []
        return square / multiple if multiple else 0.0, square, []

    def _inners(self, change: _ProductChange) -> Tensor:
        """Return (n,) float64 <theta_i, theta*>: of sum_j c_j x_j y_j^T, the sum of c_j <theta*^T x_j, y_j>."""
        X, Y = self._stack.left.columns, self._stack.right.columns
        if change.dense is not None:
            turned = change.dense.T @ X
        else:
            turned = change.matrix.A.T @ (change.matrix.B.T @ X)
        found = []
        for theta in self.products:
            m = self._stack.mixture(theta.terms)
            found.append(m.values @ (turned[:, m.rows] * Y[:, m.columns]).sum(dim=0))
        return torch.stack(found)

    def _square_of(self, change: LowRank, rank: int) -> float:
        """Return ||theta*||^2, by the way that costs least; among very many clients an estimate."""
        if self._stack.holds(change.terms):
            operator = self._stack.operator(change.terms, columns_of(rank))
            if operator is not None:
                return energy_of(operator, energy_probes(change.shape[1]).to(self._stack.left.device))
        return float(torch.linalg.matrix_norm(change.core(self._stack).C)) ** 2

    @property
    def _scaling_out(self) -> float:
        """s of the config that goes with the result."""
        return self.inputs.template(self.name).scaling(self.name) if self.shared.as_reference else 1.0

    def _write(self, solution: Solution, weighing: Weighing) -> dict[str, Tensor]:
        template = self.inputs.template(self.name)
        layer, scaling = template.layers[self.name], self._scaling_out
        part = L.write_adapter(layer, solution.matrix * self.unit, template.state, scaling)
        for extra in {"bias", "magnitude"} & layer.keys.keys():
            part[layer.keys[extra]] = merge_beside(
                self.inputs, self.name, extra, weighing, self.order, self.shared.clip, scaling
            )
        return part


def _ordering_numbers(deltas: Sequence[LowRank]) -> list[float]:
    """Return a number of each delta's content alone, which the clients are ordered by; 0 where it is zero."""
    # those that tie are parted by a digest of all there is
    sizes = [
        torch.linalg.vector_norm(delta.terms[0].B[0]) * torch.linalg.vector_norm(delta.terms[-1].A[0])
        for delta in deltas
    ]
    return [
        0.0 if delta.terms[0].coefficient == 0.0 else 1.0 + size
        for delta, size in zip(deltas, numbers(sizes), strict=True)
    ]


def _checked_rank(
    asked: int | float | None, own: int, products: list[LowRank], shape: tuple[int, int], name: str, caps: bool
) -> int | float:
    """Return the rank to solve for, a number of columns or a fraction of the energy, or refuse what is asked."""
    if asked is None:
        return own
    if isinstance(asked, float):
        return asked
    if caps:
        return min(asked, own)
    limit = max(min(shape), own, *(product.rank for product in products))
    if asked > limit:
        raise ValueError(
            f"rank, {name!r}: expected at most {limit} for a matrix of shape {shape}, found {asked}: give a smaller "
            "rank, or a share of the energy such as 0.99, which fits every layer"
        )
    return min(asked, *shape)
