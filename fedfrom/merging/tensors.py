"""One plain tensor of n clients, merged by Eq. 5, or kept where its entries are integers."""

from __future__ import annotations

import torch
from torch import Tensor

from fedfrom.merging import blocks
from fedfrom.merging import layers as L
from fedfrom.merging.method import Context, Method, Survey
from fedfrom.merging.report import LayerReport, largest_eigenvalue, power_of_two
from fedfrom.merging.sources import Inputs, check_finite, check_norms, summing_order


def merge_tensor(
    inputs: Inputs, name: str, method: Method, server_lr: float, survey: Survey
) -> tuple[dict[str, Tensor], LayerReport]:
    """Merge one plain tensor: T = W + alpha theta*; the mean where it has no reference, or is a running statistic."""
    layer, values, references = plain_tensors(inputs, name)
    W = inputs.reference_of(name)
    norms = check_norms([blocks.delta_norm(v, r) for v, r in zip(values, references, strict=True)], inputs, name)
    check_finite([W], name, ["tensor"])
    if W is None or layer.is_running_statistic:
        # a mean of values: there is no update that a norm could weigh or the server scale
        server_lr, survey = 1.0, Survey()
        if layer.is_running_statistic or not method.needs:
            method = Method(examples_power=method.examples_power)  # what clients send beside them weighs values too
    weights = survey.weigh(method, norms, inputs.examples)
    order = summing_order(inputs, name, norms, weights)
    w = weights[order]
    sent, received = [values[i] for i in order], [references[i] for i in order]
    base = None if W is None else W.tensor(name)
    coefficients = method.coefficients(w)
    unit = power_of_two(norms)
    squares = float(w @ torch.tensor([norms[i] / unit for i in order], dtype=torch.float64).square())
    if method.linear:
        result, size = blocks.weighted_sum(sent, received, coefficients.tolist(), base, server_lr)
        factor = float(coefficients.sum())  # theta* is so many times the weighted mean of the theta_i
        inner = (size / unit) ** 2 / factor if factor else 0.0
    else:
        thetas = [blocks.delta(x, r) for x, r in zip(sent, received, strict=True)]
        mean, _ = blocks.weighted_sum(thetas, [None] * len(thetas), w.tolist(), None, 1.0)
        context = Context(
            name,
            statistics=inputs.statistics_of(
                _statistics_name(name, method), order, method.statistics_shape(tuple(values[0].shape))
            )
            if method.needs
            else None,
            thresholds=None if survey.thresholds is None else [survey.thresholds[i] for i in order],
        )
        change = method.combine(thetas, coefficients, context)
        size = blocks.delta_norm(change, None)
        inner = float((mean.to(torch.float64) / unit).flatten() @ (change.to(torch.float64) / unit).flatten())
        result, _ = blocks.weighted_sum([change], [None], [1.0], None if base is None else base.to(change), server_lr)
        result = result.to(values[0].dtype)
    spread = max(0.0, squares - 2 * inner + (size / unit) ** 2)  # sum_i w_i ||theta_i - theta*||^2
    samples = torch.stack([blocks.sample(x, r) for x, r in zip(sent, received, strict=True)]) / unit
    report = LayerReport(
        name=name,
        kind="buffer" if layer.is_running_statistic else "tensor",
        norms=norms,
        weights=weights.tolist(),
        clients_effective=float(1 / w.square().sum()),
        has_reference=W is not None,
        objective=server_lr**2 * spread * unit * unit,
        interference=spread / squares if squares else 0.0,
        lambda_max=largest_eigenvalue(samples @ samples.T, w),
    )
    return {inputs.template(name).layers[name].keys["tensor"]: result}, report


def _statistics_name(name: str, method: Method) -> str:
    """Return what clients call the statistics of a tensor: Gram matrices go by module, Fisher diagonals by key."""
    return name.removesuffix(".weight") if method.needs == "gram" else name


def plain_tensors(inputs: Inputs, name: str) -> tuple[L.Layer, list[Tensor], list[Tensor | None]]:
    """Return one plain layer with the W_i and the ref_i, checked against each other."""
    template = inputs.template(name)
    expected = template.tensor(name)
    values = [sent.tensor(name) for sent in inputs.sent]
    for sent, value in zip(inputs.sent, values, strict=True):
        L.check_same(value, expected, sent.who, sent.layers[name].keys["tensor"])
    for source in inputs.received_of(name):
        if source is not None:
            L.check_same(source.tensor(name), expected, source.who, source.layers[name].keys["tensor"])
    references = [None if source is None else source.tensor(name) for source in inputs.received_of(name)]
    return template.layers[name], values, references


def keep(inputs: Inputs, name: str) -> tuple[dict[str, Tensor], LayerReport]:
    """Keep a tensor of integers or booleans: the reference's, or without one the largest entries of the clients'."""
    layer, values, _ = plain_tensors(inputs, name)
    source = inputs.reference_of(name)
    kept = values[0] if source is None else source.tensor(name)
    if source is None:
        for value in values[1:]:
            kept = torch.maximum(kept, value)
    return {layer.keys["tensor"]: kept.clone()}, LayerReport(name, "kept", has_reference=source is not None)
