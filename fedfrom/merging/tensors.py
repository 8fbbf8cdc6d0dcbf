"""The updates of one plain tensor, and T = W + alpha theta* a block at a time; or a tensor of integers, kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from fedfrom.merging.clients import Round
from fedfrom.merging.deltas import plain_norms, plain_tensors
from fedfrom.merging.layer import LayerUpdates, Merged
from fedfrom.merging.linalg import blocks, samples, sums
from fedfrom.merging.linalg.blocks import BLOCK
from fedfrom.merging.linalg.entries import Combine, Entries, form
from fedfrom.merging.linalg.lowrank import LowRank
from fedfrom.merging.linalg.rounding import rank_tolerance
from fedfrom.merging.linalg.threads import each_block
from fedfrom.merging.report import LayerReport
from fedfrom.merging.sources import Inputs, check_finite, check_result, summing_order
from fedfrom.merging.stability import Weighing
from fedfrom.merging.updates import Change, Destination, summed

# norm up to which any number of updates can be added in float32
_SUMMED = 1e30


@dataclass(frozen=True)
class _Written:
    """T, ||theta*|| and <sum_i w_i theta_i, theta*> in units, whether T is finite, and (n,) cos(theta_i, theta*)."""

    tensor: Tensor
    size: float
    inner: float
    is_finite: bool
    cosines: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _TensorChange(Change):
    """theta* of a plain tensor, which is formed block by block while T is written.

    Attributes
    ----------
    write : Callable[[Weighing], _Written]
        Writes T.
    combine : Combine
        Forms theta* alone.
    coefficients : Tensor | None (default: None)
        See `Change`.
    """

    write: Callable[[Weighing], _Written]
    combine: Combine
    coefficients: Tensor | None = None


class TensorUpdates(LayerUpdates):
    """The updates of one plain tensor: see `LayerUpdates`; `norms` where those as sent are known."""

    def __init__(self, inputs: Inputs, name: str, shared: Round, norms: list[float] | None = None) -> None:
        super().__init__(inputs, name, shared)
        base, values, references = plain_tensors(inputs, name)
        norms = plain_norms(inputs, name, values, references) if norms is None else norms
        if base is not None and all(reference is not base for reference in references):  # else a finite norm proves it
            check_finite([inputs.reference_of(name)], name, ["tensor"])
        self.order = summing_order(inputs, name, norms)
        self._clip(norms, None if base is None else shared.clip)
        self._base, self._sent = base, [values[i] for i in self.order]
        self._received = [references[i] for i in self.order]
        self._layer = inputs.template(name).layers[name]
        self.is_buffer = self._layer.is_running_statistic
        self.kind = "buffer" if self.is_buffer else "tensor"
        self.has_reference, self.shape = base is not None, tuple(values[0].shape)
        # changes may have come in a narrower dtype than the others' values
        self._out = (values[0] if base is None else base).dtype
        self.dtype = blocks.arithmetic(self._out)

    @property
    def is_update(self) -> bool:
        return self.has_reference and not self.is_buffer

    @property
    def is_linear(self) -> bool:
        return len(self.shape) == 2 and not self._layer.is_table

    @property
    def tolerance(self) -> float:  # type: ignore[override]
        return max(rank_tolerance(sent.dtype) for sent in self._sent)

    @property
    def ranks(self) -> list[int]:
        return []

    @cached_property
    def _rows(self) -> Tensor | None:
        """(n, m) float64 theta_i in units; None of a tensor that is not small."""
        if not blocks.is_small(self._sent[0]):
            return None
        rows = samples.sampled_deltas(self._sent, self._received)
        rows /= self.unit
        if any(factor != 1.0 for factor in self.clip_factors):
            factors = [self.clip_factors[i] for i in self.order]
            rows *= torch.tensor(factors, dtype=torch.float64, device=rows.device)[:, None]
        return rows

    @cached_property
    def gram(self) -> Tensor:
        if self._rows is not None:
            return self._rows @ self._rows.T
        return samples.gram_of_samples(self._sent, self._received, [self.norms[i] for i in self.order])

    @property
    def sketch(self) -> None:
        return None

    @cached_property
    def entries(self) -> Entries:
        return Entries(self._sent, self._received, [self.clip_factors[i] for i in self.order], self.dtype)

    def statistics(self, kind: str) -> list[Tensor] | None:
        # Gram matrices go by module, Fisher diagonals by key
        is_gram = kind == "gram"
        shape = (self.shape[-1:] * 2) if is_gram else self.shape
        return self.inputs.statistics(self.name.removesuffix(".weight") if is_gram else self.name, self.order, shape)

    def sum(self, coefficients: Tensor) -> Change:
        return _TensorChange(partial(self._write_sum, coefficients), summed(coefficients), coefficients)

    def entrywise(self, combine: Combine) -> Change:
        return _TensorChange(partial(self._write_entrywise, combine), combine)

    def formed(self, matrix: Tensor | LowRank) -> Change:
        assert isinstance(matrix, Tensor)
        row = matrix.reshape(-1)
        return self.entrywise(lambda rows, start: row[start : start + len(rows[0])])

    def settled(self, change: Change) -> Tensor:
        assert isinstance(change, _TensorChange)
        return form(self.entries, change.combine).reshape(self.shape)

    def destination(self, weighing: Weighing) -> Destination:
        return Destination(None, weighing.server_lr, 0)

    def finish(self, change: Change, weighing: Weighing, destination: Destination) -> Merged:
        assert isinstance(change, _TensorChange)
        written = change.write(weighing)
        key = self._layer.keys["tensor"]
        check_result(key, written.tensor, written.is_finite)
        return Merged({key: written.tensor}, written.inner, written.size**2, cosines=written.cosines)

    def _write_sum(self, coefficients: Tensor, weighing: Weighing) -> _Written:
        """Write T for theta* = sum_i c_i theta_i, in one pass over the clients' tensors."""
        c, alpha, multiple = coefficients.tolist(), weighing.server_lr, self.multiple(coefficients, weighing.weights)
        if multiple is None:
            return self._write_entrywise(summed(coefficients), weighing)
        if self._rows is not None:
            like = self._sent[0] if self._base is None else self._base
            result, size, finite = sums.weighted_rows(
                self._rows, c, self._base, like, alpha * self.unit, self.shared.empty
            )
        else:
            scaled = [c_i * self.clip_factors[i] for c_i, i in zip(c, self.order, strict=True)]
            sent, received, most = self._sent, self._received, 1.0
            if max(self.norms) < _SUMMED:
                # in units of the largest one, which comes first and need not be multiplied: a pass less
                first = max(range(len(scaled)), key=lambda i: abs(scaled[i]))
                most = scaled[first] or 1.0
                places = [first, *(i for i in range(len(scaled)) if i != first)]
                sent, received = [sent[i] for i in places], [received[i] for i in places]
                scaled = [scaled[i] / most for i in places]
            result, size, finite = sums.weighted_sum(
                sent, received, scaled, self._base, alpha * most, self.shared.empty
            )
            size *= abs(most) / self.unit
        return _Written(result, size, size**2 / multiple if multiple else 0.0, finite)

    def _write_entrywise(self, combine: Combine, weighing: Weighing) -> _Written:
        """Write T for theta* that `combine` forms; no temporary is larger than n blocks."""
        entries, weights, unit, alpha = self.entries, weighing.weights.tolist(), self.unit, weighing.server_lr
        out = torch.empty(self.shape, dtype=self._out, device=self._sent[0].device)
        result, W = out.reshape(-1), None if self._base is None else self._base.detach().reshape(-1)
        nothing: list[Tensor | None] = [None] * len(entries)

        def part(start: int, stop: int) -> tuple[float, float, bool, np.ndarray]:
            thetas = [entries.block(i, start, stop) for i in range(len(entries))]
            mean, _, _ = sums.weighted_sum(thetas, nothing, weights, None, 1.0)
            places = samples.places(out.numel(), start, stop)
            some = torch.stack([theta[places] for theta in thetas])  # a copy: `combine` may overwrite its rows
            change = combine(thetas, start)
            products = (mean.to(torch.float64) / unit).mul_(change.to(torch.float64) / unit)
            # on one thread, however many torch has: so the bits are the same
            inner = float(products.cpu().numpy().sum())
            own = None if W is None else W[start:stop].to(change)
            result[start:stop], size, _ = sums.weighted_sum([change], [None], [1.0], own, alpha)
            return size / unit, inner, sums.is_finite(result[start:stop]), self._inners(some, change[places])

        found = each_block(out.numel(), BLOCK, part, entries.is_read)
        sizes, inners, finite, products = zip(*found, strict=True) if found else ((), (), (), ())
        inner, own, square = np.sum(products, axis=0) if found else np.zeros((3, len(entries)))
        scale = np.sqrt(own * square)
        cosines = np.divide(inner, scale, where=scale > 0, out=np.zeros_like(inner)).clip(-1, 1)
        return _Written(out, math.hypot(*sizes), math.fsum(inners), all(finite), cosines.tolist())

    def _inners(self, thetas: Tensor, change: Tensor) -> np.ndarray:
        """Return (3, n) <theta_i, theta*>, ||theta_i||^2 and ||theta*||^2 of some entries, in units."""
        rows = thetas.to(torch.float64).div_(self.unit).cpu().numpy()
        row = change.to(torch.float64).div(self.unit).cpu().numpy()
        # sums by numpy are on one thread, however many torch has: so the bits are the same
        return np.stack([(rows * row).sum(axis=1), (rows * rows).sum(axis=1), np.full(len(rows), (row * row).sum())])


def keep(inputs: Inputs, name: str) -> tuple[dict[str, Tensor], LayerReport]:
    """Keep a tensor of integers or booleans: the reference's, or without one the largest entries of the clients'.

    Clients of weight 0 left out.
    """
    base, values, _ = plain_tensors(inputs, name)
    first, *others = inputs.with_weight
    kept = blocks.whole(values[first]) if base is None else base
    if base is None:
        for i in others:
            kept = torch.maximum(kept, blocks.whole(values[i]))
    key = inputs.template(name).layers[name].keys["tensor"]
    return {key: kept.clone()}, LayerReport(name, "kept", has_reference=base is not None)
