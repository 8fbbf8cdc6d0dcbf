"""One plain tensor of n clients, merged by Eq. 5, or kept where its entries are integers."""

from __future__ import annotations

import torch
from torch import Tensor

from fedfrom.merging import blocks
from fedfrom.merging import layers as L
from fedfrom.merging.frobenius import weights as norm_weights
from fedfrom.merging.methods import Method
from fedfrom.merging.report import LayerReport, largest_eigenvalue, power_of_two
from fedfrom.merging.sources import Inputs, check_finite, check_norms, summing_order


def merge_tensor(
    inputs: Inputs, name: str, method: Method, server_lr: float, whole: Tensor | None
) -> tuple[dict[str, Tensor], LayerReport]:
    """Merge one plain tensor by Eq. 5; k = 0 where it has no reference, or is a running statistic."""
    layer, values, references = plain_tensors(inputs, name)
    W = inputs.reference_of(name)
    norms = check_norms([blocks.delta_norm(v, r) for v, r in zip(values, references, strict=True)], inputs, name)
    if layer.is_running_statistic or W is None:
        equal = [1.0] * len(norms)
        weights = norm_weights(equal, 0.0, inputs.examples, method.examples_power)
        kind = "buffer" if layer.is_running_statistic else "tensor"
        server_lr = 1.0  # a mean of values: there is no update that it could scale
    else:
        weights = method.weights(torch.tensor(norms, dtype=torch.float64), inputs.examples) if whole is None else whole
        kind = "tensor"
    check_finite([W], name, ["tensor"])
    order = summing_order(inputs, name, norms, weights)
    w = weights[order]
    result, change = blocks.weighted_sum(
        [values[i] for i in order],
        [references[i] for i in order],
        w.tolist(),
        None if W is None else W.tensor(name),
        server_lr,
    )
    unit = power_of_two(norms)
    squares = float((w * torch.tensor([norms[i] / unit for i in order], dtype=torch.float64).square()).sum())
    spread = max(0.0, squares - (change / unit) ** 2)  # sum_i w_i ||theta_i - theta*||^2
    samples = torch.stack([blocks.sample(values[i], references[i]) for i in order]) / unit
    report = LayerReport(
        name=name,
        kind=kind,
        norms=norms,
        weights=weights.tolist(),
        clients_effective=float(1 / w.square().sum()),
        has_reference=W is not None,
        objective=server_lr**2 * spread * unit * unit,
        lambda_max=largest_eigenvalue(samples @ samples.T, w),
    )
    return {inputs.template(name).layers[name].keys["tensor"]: result}, report


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
