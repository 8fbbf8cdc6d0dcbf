"""One plain tensor of n clients, merged by Eq. 5, or kept where its entries are integers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fedfrom.merging.clients import Round
from fedfrom.merging.linalg import blocks
from fedfrom.merging.linalg.blocks import BLOCK, Empty, Values
from fedfrom.merging.linalg.entries import Entries
from fedfrom.merging.linalg.scale import power_of_two
from fedfrom.merging.linalg.threads import begin, each_block
from fedfrom.merging.methods.base import Context, Method, Survey
from fedfrom.merging.peft import layers as L
from fedfrom.merging.report import LayerReport
from fedfrom.merging.sources import Inputs, check_finite, check_norms, check_result, summing_order
from fedfrom.merging.weighing import Updates, Weighing, clip_factors, once_each, weigh

# norm up to which so many updates as there may be can be added in float32
_SUMMED = 1e30


def merge_tensors(
    inputs: Inputs,
    names: Sequence[str],
    methods: Sequence[Method],
    shared: Round,
    survey: Survey,
    sizes: Sequence[int],
) -> list[list[tuple[dict[str, Tensor], LayerReport]]]:
    """Merge plain tensors by each method: T = W + alpha theta*.

    Where one has no reference, or is a running statistic, T is the mean of the values: there is no update that a norm
    could weigh or the server scale.

    All are weighed together: most tensors of a model are so small that what each takes is what its calls take. `sizes`
    are the entries of those that are read from elsewhere, a block at a time, else 0.
    """
    reading = [
        begin(size, partial(_Tensor.read, inputs, name, shared.clip)) for name, size in zip(names, sizes, strict=True)
    ]
    tensors = [wait() for wait in reading]
    work: dict[str, Callable[[], list[tuple[dict[str, Tensor], LayerReport]]]] = {}
    for alike in _by_kind(tensors):
        # what clients send beside their states weighs values too, but for running statistics
        if not alike[0].is_update and (alike[0].layer.is_running_statistic or not methods[0].needs):
            own = [Method(examples_power=methods[0].examples_power)] * len(methods)
        else:
            own = list(methods)
        whole, alpha = (survey, shared.server_lr) if alike[0].is_update else (Survey(), 1.0)
        found = weigh([tensor.updates for tensor in alike], own, whole, inputs.examples, inputs.weights, alpha)
        for tensor, weighings in zip(alike, found, strict=True):
            work[tensor.layer.name] = partial(once_each, weighings, partial(tensor.merged, inputs, whole, shared.empty))
    merging = [begin(size, work.pop(name)) for name, size in zip(names, sizes, strict=True)]
    return [wait() for wait in merging]


@dataclass(frozen=True)
class _Tensor:
    """One plain tensor of n clients: W, and the W_i and ref_i in `updates.order`.

    Attributes
    ----------
    rows : Tensor | None
        (n, m) float64 theta_i after clipping, in units; None of a tensor that is not small.
    """

    layer: L.Layer
    base: Tensor | None
    sent: list[Values]
    received: list[Tensor | None]
    updates: Updates
    rows: Tensor | None

    @classmethod
    def read(cls, inputs: Inputs, name: str, clip: float | None) -> _Tensor:
        base, values, references = plain_tensors(inputs, name)
        norms = _norms(inputs, name, values, references)
        if base is not None and all(reference is not base for reference in references):  # else a finite norm proves it
            check_finite([inputs.reference_of(name)], name, ["tensor"])
        factors = clip_factors(norms, None if base is None else clip)
        clipped = [norm * factor for norm, factor in zip(norms, factors, strict=True)]
        order = summing_order(inputs, name, norms)
        unit = power_of_two(clipped)
        sent, received = [values[i] for i in order], [references[i] for i in order]
        rows = None
        if blocks.is_small(values[0]):
            rows = blocks.sampled_deltas(sent, received)
            rows /= unit
            if any(factor != 1.0 for factor in factors):
                rows *= torch.tensor([factors[i] for i in order], dtype=torch.float64, device=rows.device)[:, None]
            gram = rows @ rows.T
        else:
            gram = blocks.gram_of_samples(sent, received, [norms[i] for i in order])
        updates = Updates(norms, factors, order, unit, [clipped[i] / unit for i in order], gram)
        return cls(inputs.template(name).layers[name], base, sent, received, updates, rows)

    @property
    def is_update(self) -> bool:
        """Whether there is an update that a norm could weigh, and the server scale."""
        return self.base is not None and not self.layer.is_running_statistic

    def merged(
        self, inputs: Inputs, survey: Survey, empty: Empty, weighing: Weighing
    ) -> tuple[dict[str, Tensor], LayerReport]:
        """Return T by key, and its report."""
        updates, unit = self.updates, self.updates.unit
        if weighing.method.linear:
            result, size, inner, finite = self._linear(weighing, empty)
        else:
            result, size, inner, finite = self._combined(inputs, weighing, survey)
        key = self.layer.keys["tensor"]
        check_result(key, result, finite)
        squares = math.fsum(w * size**2 for w, size in zip(weighing.weights.tolist(), updates.sizes, strict=True))
        spread = max(0.0, squares - 2 * inner + size**2)  # sum_i w_i ||theta_i - theta*||^2
        report = LayerReport(
            name=self.layer.name,
            kind="buffer" if self.layer.is_running_statistic else "tensor",
            has_reference=self.base is not None,
            objective=weighing.server_lr**2 * spread * unit * unit,
            **updates.report(weighing, squares, spread),
        )
        return {key: result}, report

    def _linear(self, weighing: Weighing, empty: Empty) -> tuple[Tensor, float, float, bool]:
        """Return T, ||theta*|| and <sum_i w_i theta_i, theta*> in units, and whether T is finite, of a weighted sum."""
        updates = self.updates
        coefficients = weighing.coefficients
        factor = float(coefficients.sum())  # theta* is so many times the weighted mean of the theta_i
        if self.rows is None:
            scaled = [c * updates.factors[i] for c, i in zip(coefficients.tolist(), updates.order, strict=True)]
            sent, received, most = self.sent, self.received, 1.0
            if max(updates.norms) < _SUMMED:
                # in units of the largest one, which comes first and need not be multiplied: a pass less
                first = max(range(len(scaled)), key=lambda i: abs(scaled[i]))
                most = scaled[first] or 1.0
                places = [first, *(i for i in range(len(scaled)) if i != first)]
                sent, received = [sent[i] for i in places], [received[i] for i in places]
                scaled = [scaled[i] / most for i in places]
            result, size, finite = blocks.weighted_sum(
                sent, received, scaled, self.base, weighing.server_lr * most, empty
            )
            size *= abs(most) / updates.unit
        else:
            like = self.sent[0] if self.base is None else self.base
            alpha = weighing.server_lr * updates.unit
            result, size, finite = blocks.weighted_rows(self.rows, coefficients.tolist(), self.base, like, alpha, empty)
        return result, size, size**2 / factor if factor else 0.0, finite

    def _combined(self, inputs: Inputs, weighing: Weighing, survey: Survey) -> tuple[Tensor, float, float, bool]:
        """Return what `_linear` does, of any other method: of one that works entry by entry a block at a time.

        Of such a method no temporary is larger than n blocks.
        """
        method, updates, unit, shape = weighing.method, self.updates, self.updates.unit, self.sent[0].shape
        # changes may have come in a narrower dtype than the others' values
        kind = inputs.template(self.layer.name).values(self.layer.name).dtype
        factors = [updates.factors[i] for i in updates.order]
        entries = Entries(self.sent, self.received, factors, blocks.arithmetic(kind))
        context = self._context(inputs, method, survey)
        if method.entrywise:
            context = method.prepare(entries, context)
        coefficients, weights = weighing.coefficients, weighing.weights.tolist()
        out = torch.empty(shape, dtype=kind, device=self.sent[0].device)
        result, W = out.reshape(-1), None if self.base is None else self.base.detach().reshape(-1)

        def combine(start: int, stop: int) -> tuple[float, float, bool]:
            thetas = [entries.block(i, start, stop) for i in range(len(entries))]
            nothing: list[Tensor | None] = [None] * len(thetas)
            mean, _, _ = blocks.weighted_sum(thetas, nothing, weights, None, 1.0)
            if method.entrywise:
                change = method.combine(thetas, coefficients, context.block(start, stop))
            else:
                change = method.combine([theta.reshape(shape) for theta in thetas], coefficients, context).reshape(-1)
            products = (mean.to(torch.float64) / unit).mul_(change.to(torch.float64) / unit)
            # on one thread, however many torch has: so the bits are the same
            inner = float(products.cpu().numpy().sum())
            own = None if W is None else W[start:stop].to(change)
            result[start:stop], size, _ = blocks.weighted_sum([change], [None], [1.0], own, weighing.server_lr)
            return size / unit, inner, blocks.is_finite(result[start:stop])

        length = out.numel()
        if method.entrywise and context.draws is None:
            found = each_block(length, BLOCK, combine, entries.is_read)
        else:  # a generator draws its blocks in their order
            block = BLOCK if method.entrywise else max(1, length)
            found = [combine(start, min(start + block, length)) for start in range(0, length, block)]
        sizes, inners, finite = zip(*found, strict=True) if found else ((), (), ())
        return out, math.hypot(*sizes), math.fsum(inners), all(finite)

    def _context(self, inputs: Inputs, method: Method, survey: Survey) -> Context:
        """Return what a method may need to know of the tensor beside its deltas."""
        name, order = self.layer.name, self.updates.order
        shape = method.statistics_shape(tuple(self.sent[0].shape))
        return Context(
            name,
            statistics=inputs.statistics_of(_statistics_name(name, method), order, shape) if method.needs else None,
            thresholds=None if survey.thresholds is None else [survey.thresholds[i] for i in order],
        )


def _by_kind(tensors: Sequence[_Tensor]) -> list[list[_Tensor]]:
    """Return the tensors in groups that are weighed alike."""
    kinds: dict[tuple[bool, bool], list[_Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.is_update, tensor.layer.is_running_statistic), []).append(tensor)
    return list(kinds.values())


def _statistics_name(name: str, method: Method) -> str:
    """Return what clients call the statistics of a tensor: Gram matrices go by module, Fisher diagonals by key."""
    return name.removesuffix(".weight") if method.needs == "gram" else name


def delta_norms(inputs: Inputs, name: str) -> list[float]:
    """Return ||W_i - ref_i||_F of one plain layer; its entries are read only where some are not known yet."""
    if all(name in source.norms for source in inputs.sent):
        return check_norms([source.norms[name] for source in inputs.sent], inputs, name)
    _, values, references = plain_tensors(inputs, name)
    return _norms(inputs, name, values, references)


def _norms(inputs: Inputs, name: str, values: list[Values], references: list[Tensor | None]) -> list[float]:
    """Return the clients' norms, those that are not known yet from the entries; all are finite."""
    missing = [i for i, source in enumerate(inputs.sent) if name not in source.norms]
    found = dict(zip(missing, blocks.delta_norms([(values[i], references[i]) for i in missing]), strict=True))
    norms = [found[i] if i in found else source.norms[name] for i, source in enumerate(inputs.sent)]
    return check_norms(norms, inputs, name)


def plain_tensors(inputs: Inputs, name: str) -> tuple[Tensor | None, list[Values], list[Tensor | None]]:
    """Return (W, the W_i, the ref_i) of one plain layer, checked against each other; None is zero."""
    W, received = inputs.reference_of(name), inputs.received_of(name)
    read = {id(source): source.tensor(name) for source in {id(s): s for s in (W, *received)}.values() if source}
    values = [sent.values(name) for sent in inputs.sent]
    base = None if W is None else read[id(W)]
    expected = values[0] if base is None else base
    for sent, value in zip(inputs.sent, values, strict=True):
        L.check_same(value, expected, sent.who, sent.layers[name].keys["tensor"], is_delta=name in sent.deltas)
    for source in received:
        if source is not W and source is not None:
            L.check_same(read[id(source)], expected, source.who, source.layers[name].keys["tensor"])
    references = [
        None if source is None or name in sent.deltas else read[id(source)]
        for sent, source in zip(inputs.sent, received, strict=True)
    ]
    return base, values, references


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
