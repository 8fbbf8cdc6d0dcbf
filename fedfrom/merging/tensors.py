"""One plain tensor of n clients, merged by Eq. 5, or kept where its entries are integers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedfrom.merging import blocks
from fedfrom.merging import layers as L
from fedfrom.merging.blocks import BLOCK, Empty, Values
from fedfrom.merging.entries import Entries
from fedfrom.merging.method import Context, Method, Survey
from fedfrom.merging.report import LayerReport, power_of_two
from fedfrom.merging.sources import Inputs, check_finite, check_norms, check_result, summing_order
from fedfrom.merging.threads import each_block
from fedfrom.merging.weighing import Updates, Weighing, clip_factors, once_each


def merge_tensor(
    inputs: Inputs,
    name: str,
    methods: Sequence[Method],
    server_lr: float | str,
    survey: Survey,
    clip: float | None,
    empty: Empty = torch.empty,
) -> list[tuple[dict[str, Tensor], LayerReport]]:
    """Merge one plain tensor by each method: T = W + alpha theta*.

    Where it has no reference, or is a running statistic, T is the mean of the values: there is no update that a norm
    could weigh or the server scale.
    """
    layer, values, references = plain_tensors(inputs, name)
    W = inputs.reference_of(name)
    base = None if W is None else W.tensor(name)
    norms = delta_norms(inputs, name)
    if base is not None and all(reference is not base for reference in references):  # else a finite norm proves it
        check_finite([W], name, ["tensor"])
    if W is None or layer.is_running_statistic:
        server_lr, survey = 1.0, Survey()
        if layer.is_running_statistic or not methods[0].needs:
            # what clients send beside their states weighs values too
            methods = [Method(examples_power=methods[0].examples_power)] * len(methods)
    factors = clip_factors(norms, None if W is None else clip)
    clipped = [norm * factor for norm, factor in zip(norms, factors, strict=True)]
    order = summing_order(inputs, name, norms)
    unit = power_of_two(clipped)
    sent, received = [values[i] for i in order], [references[i] for i in order]
    sizes = [clipped[i] / unit for i in order]
    rows = None
    if blocks.is_whole(values[0]):
        rows = blocks.sampled_deltas(sent, received)
        rows /= unit
        if any(factor != 1.0 for factor in factors):
            rows *= torch.tensor([factors[i] for i in order], dtype=torch.float64, device=rows.device)[:, None]
        gram = rows @ rows.T
    else:
        gram = blocks.gram_of_samples(sent, received, [norms[i] for i in order])
    key = inputs.template(name).layers[name].keys["tensor"]
    updates = Updates(norms, factors, order, unit, sizes, gram)

    def merged(weighing: Weighing) -> tuple[dict[str, Tensor], LayerReport]:
        if weighing.method.linear:
            result, size, inner, finite = _linear(updates, weighing, sent, received, base, empty, rows)
        else:
            result, size, inner, finite = _combined(inputs, name, updates, weighing, survey, sent, received, base)
        check_result(key, result, finite)
        squares = math.fsum(w * size**2 for w, size in zip(weighing.weights.tolist(), sizes, strict=True))
        spread = max(0.0, squares - 2 * inner + size**2)  # sum_i w_i ||theta_i - theta*||^2
        report = LayerReport(
            name=name,
            kind="buffer" if layer.is_running_statistic else "tensor",
            has_reference=W is not None,
            objective=weighing.server_lr**2 * spread * unit * unit,
            **updates.report(weighing, squares, spread),
        )
        return {key: result}, report

    return once_each(updates.weigh(methods, survey, inputs.examples, server_lr), merged)


def _linear(
    updates: Updates,
    weighing: Weighing,
    sent: list[Values],
    received: list[Tensor | None],
    base: Tensor | None,
    empty: Empty,
    rows: Tensor | None,
) -> tuple[Tensor, float, float, bool]:
    """Return T, ||theta*|| and <sum_i w_i theta_i, theta*> in units, and whether T is finite, of a weighted sum.

    `rows` are the deltas after clipping, in units, where they are known in full.
    """
    coefficients = weighing.method.coefficients(weighing.weights)
    factor = float(coefficients.sum())  # theta* is so many times the weighted mean of the theta_i
    if rows is None:
        scaled = [c * updates.factors[i] for c, i in zip(coefficients.tolist(), updates.order, strict=True)]
        result, size, finite = blocks.weighted_sum(sent, received, scaled, base, weighing.server_lr, empty)
        size /= updates.unit
    else:
        like = sent[0] if base is None else base
        alpha = weighing.server_lr * updates.unit
        result, size, finite = blocks.weighted_rows(rows, coefficients.tolist(), base, like, alpha, empty)
    return result, size, size**2 / factor if factor else 0.0, finite


def _combined(
    inputs: Inputs,
    name: str,
    updates: Updates,
    weighing: Weighing,
    survey: Survey,
    sent: list[Values],
    received: list[Tensor | None],
    base: Tensor | None,
) -> tuple[Tensor, float, float, bool]:
    """Return what `_linear` does, of any other method: of one that works entry by entry a block at a time.

    Of such a method no temporary is larger than n blocks.
    """
    method, unit, shape = weighing.method, updates.unit, sent[0].shape
    kind = inputs.template(name).values(name).dtype  # changes may have come in a narrower one than the others' values
    entries = Entries(sent, received, [updates.factors[i] for i in updates.order], blocks.arithmetic(kind))
    context = _context(inputs, name, updates, method, survey)
    if method.entrywise:
        context = method.prepare(entries, context)
    coefficients, weights = method.coefficients(weighing.weights), weighing.weights.tolist()
    out = torch.empty(shape, dtype=kind, device=sent[0].device)
    result, W = out.reshape(-1), None if base is None else base.detach().reshape(-1)

    def combine(start: int, stop: int) -> tuple[float, float, bool]:
        thetas = [entries.block(i, start, stop) for i in range(len(entries))]
        nothing: list[Tensor | None] = [None] * len(thetas)
        mean, _, _ = blocks.weighted_sum(thetas, nothing, weights, None, 1.0)
        if method.entrywise:
            change = method.combine(thetas, coefficients, context.block(start, stop))
        else:
            change = method.combine([theta.reshape(shape) for theta in thetas], coefficients, context).reshape(-1)
        products = (mean.to(torch.float64) / unit).mul_(change.to(torch.float64) / unit)
        inner = float(products.cpu().numpy().sum())  # on one thread, however many torch has: so the bits are the same
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


def _context(inputs: Inputs, name: str, updates: Updates, method: Method, survey: Survey) -> Context:
    """Return what a method may need to know of the tensor beside its deltas."""
    order, shape = updates.order, method.statistics_shape(tuple(inputs.sent[0].values(name).shape))
    return Context(
        name,
        statistics=inputs.statistics_of(_statistics_name(name, method), order, shape) if method.needs else None,
        thresholds=None if survey.thresholds is None else [survey.thresholds[i] for i in order],
    )


def _statistics_name(name: str, method: Method) -> str:
    """Return what clients call the statistics of a tensor: Gram matrices go by module, Fisher diagonals by key."""
    return name.removesuffix(".weight") if method.needs == "gram" else name


def delta_norms(inputs: Inputs, name: str) -> list[float]:
    """Return ||W_i - ref_i||_F of one plain layer, those that are not known yet from its entries; all are finite."""
    known = [source.norms.get(name) for source in inputs.sent]
    if None in known:
        _, values, references = plain_tensors(inputs, name)
        missing = [i for i, norm in enumerate(known) if norm is None]
        found = dict(zip(missing, blocks.delta_norms([(values[i], references[i]) for i in missing]), strict=True))
        known = [found.get(i, norm) for i, norm in enumerate(known)]
    return check_norms([norm for norm in known if norm is not None], inputs, name)


def plain_tensors(inputs: Inputs, name: str) -> tuple[L.Layer, list[Values], list[Tensor | None]]:
    """Return one plain layer with the W_i and the ref_i, checked against each other."""
    template = inputs.template(name)
    expected = template.values(name)
    values = [sent.values(name) for sent in inputs.sent]
    for sent, value in zip(inputs.sent, values, strict=True):
        L.check_same(value, expected, sent.who, sent.layers[name].keys["tensor"], is_delta=name in sent.deltas)
    for source in inputs.received_of(name):
        if source is not None:
            L.check_same(source.tensor(name), expected, source.who, source.layers[name].keys["tensor"])
    references = [
        None if source is None or name in sent.deltas else source.tensor(name)
        for sent, source in zip(inputs.sent, inputs.received_of(name), strict=True)
    ]
    return template.layers[name], values, references


def keep(inputs: Inputs, name: str) -> tuple[dict[str, Tensor], LayerReport]:
    """Keep a tensor of integers or booleans: the reference's, or without one the largest entries of the clients'."""
    layer, values, _ = plain_tensors(inputs, name)
    source = inputs.reference_of(name)
    kept = blocks.whole(values[0]) if source is None else source.tensor(name)
    if source is None:
        for value in values[1:]:
            kept = torch.maximum(kept, blocks.whole(value))
    return {layer.keys["tensor"]: kept.clone()}, LayerReport(name, "kept", has_reference=source is not None)
