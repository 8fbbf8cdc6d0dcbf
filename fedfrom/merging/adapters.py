"""One LoRA module of n clients: the products stacked into T = W + alpha theta*, solved back to a rank (Eq. 6)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedfrom.merging import blocks
from fedfrom.merging import layers as L
from fedfrom.merging.lowrank import LowRank, gram
from fedfrom.merging.method import Context, ProductMethod, Survey
from fedfrom.merging.report import LayerReport, largest_eigenvalue, power_of_two
from fedfrom.merging.solve import Solution
from fedfrom.merging.sources import Inputs, Source, check_finite, check_norms, summing_order


def merge_adapter(
    inputs: Inputs, name: str, method: ProductMethod, server_lr: float, survey: Survey, as_reference: bool
) -> tuple[dict[str, Tensor], LayerReport]:
    """Merge one LoRA module: the products stacked into T = W + alpha theta*, solved back to the rank (Eq. 6)."""
    template, has_reference = inputs.template(name), inputs.reference_of(name) is not None
    layer = template.layers[name]
    W, products, deltas = adapter_deltas(inputs, name)
    norms = check_norms([delta.norm() for delta in deltas], inputs, name)
    weights = survey.weigh(method, norms, inputs.examples)
    order = summing_order(inputs, name, norms, weights)
    w = weights[order]

    # from here in units of the layer's size, so that no square leaves float64's range
    check_finite([inputs.reference_of(name)], name, list(layer.keys))
    unit = power_of_two([*norms, 0.0 if W is None else W.norm()])
    sizes = torch.tensor([norms[i] / unit for i in order], dtype=torch.float64)
    # an update within rounding of zero is zero: it must not vote with its rounding
    thetas = [deltas[i] * (1 / unit if norms[i] > 0 else 0.0) for i in order]
    squares = float(w @ sizes.square())  # sum_i w_i ||theta_i||^2

    own_rank = W.rank if W is not None else max(product.rank for product in products)
    rows = own_rank if as_reference else None
    rank = _rank(method.rank, own_rank, products, thetas[0].shape, name, caps=as_reference)
    coefficients = method.coefficients(w)
    if method.linear:
        coefficients = coefficients * (sizes > 0)  # a zero delta adds nothing but rounding
    shape = method.statistics_shape(thetas[0].shape)
    statistics = inputs.statistics_of(name, order, shape) if method.needs else None
    context = Context(
        name,
        statistics=statistics,
        thresholds=None if survey.thresholds is None else [survey.thresholds[i] / unit for i in order],
        rank=rank if isinstance(rank, int) else None,
    )
    change = method.combine_products(thetas, coefficients, context)
    target = change * server_lr if W is None else LowRank.sum([W, change], [1 / unit, server_lr])
    inner = gram([*thetas, change], [*sizes.tolist(), change.norm()])
    solution = _frozen(W, products, target, rank)
    if solution is None:
        solution = method.solve(target, rank, name, scale=server_lr**2 * squares, rows=rows)
        if layer.is_embedding:
            # PEFT starts embedding_B (here A) as standard normal: its entries leave with that size
            root = target.shape[1] ** 0.5
            solution = replace(solution, matrix=LowRank(solution.matrix.B / root, solution.matrix.A * root))

    scaling = template.scaling(name) if as_reference else 1.0
    part = L.write_adapter(layer, solution.matrix * unit, template.state, scaling)
    for extra in ("bias", "magnitude"):
        if extra in layer.keys:
            part[layer.keys[extra]] = _merge_beside(inputs, name, extra, weights, order, server_lr, scaling)
    # sum_i w_i ||theta_i - theta*||^2
    spread = max(0.0, squares - 2 * float(w @ inner[:-1, -1]) + float(inner[-1, -1]))
    report = LayerReport(
        name=name,
        kind="adapter",
        norms=norms,
        weights=weights.tolist(),
        clients_effective=float(1 / w.square().sum()),
        has_reference=has_reference,
        ranks_in=[product.rank for product in products],
        rank_out=solution.rank,
        energy_dropped=solution.residual / solution.energy if solution.energy else 0.0,
        objective=(solution.residual + server_lr**2 * spread) * unit * unit,
        excess=max(0.0, solution.residual - solution.optimum) / squares if squares else 0.0,
        interference=spread / squares if squares else 0.0,
        iterations=solution.iterations,
        lambda_max=largest_eigenvalue(inner[:-1, :-1], w),
    )
    return part, report


def adapter_deltas(inputs: Inputs, name: str) -> tuple[LowRank | None, list[LowRank], list[LowRank]]:
    """Return (W, the W_i, the theta_i = W_i - ref_i) of one LoRA module as products; W None is zero."""
    source = inputs.reference_of(name)
    W = None if source is None else source.adapter(name)
    products = [sent.adapter(name) for sent in inputs.sent]
    for sent, product in zip(inputs.sent, products, strict=True):
        first = products[0] if W is None else W
        if product.shape != first.shape:
            raise ValueError(f"{sent.who}, {name!r}: expected a product of shape {first.shape}, found {product.shape}")
        for part in sent.layers[name].keys:
            dimension = L.RANK_DIMENSION.get(part)
            expected = inputs.template(name).tensor(name, part)
            L.check_same(sent.tensor(name, part), expected, sent.who, sent.layers[name].keys[part], dimension)
    read: dict[int, LowRank] = {}  # what several clients were sent is one pair of tensors in the stack
    received: list[LowRank | None] = []
    for cut in inputs.received_of(name):
        if cut is None or cut is source:
            received.append(W)
        else:
            assert source is not None
            for part, key in cut.layers[name].keys.items():
                L.check_same(
                    cut.tensor(name, part), source.tensor(name, part), cut.who, key, L.RANK_DIMENSION.get(part)
                )
            received.append(read.setdefault(id(cut), cut.adapter(name)))
    for sent, product, ref in zip(inputs.sent, products, received, strict=True):
        rank = products[0].rank if ref is None else ref.rank
        if sent.config is None and product.rank != rank:
            why = "as the others" if ref is None else "as it was sent"
            raise ValueError(
                f"{sent.who}, {name!r}: expected rank {rank} {why}, found {product.rank}: unequal ranks have unequal "
                "scalings; give each client's adapter config (configs=)"
            )
    deltas = [p if r is None else p - r for p, r in zip(products, received, strict=True)]
    return W, products, deltas


def _rank(
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
        raise ValueError(f"rank, {name!r}: expected at most {limit} for a matrix of shape {shape}, found {asked}")
    return min(asked, *shape)


def _frozen(W: LowRank | None, products: list[LowRank], target: LowRank, rank: int | float) -> Solution | None:
    """Return the exact solution where no client changed A: A stays, the s_i B_i are averaged."""
    given = [matrix.terms[0].A for matrix in ([W] if W is not None else []) + products]
    stays = given[0]
    alone = len(given) < 2 or rank != stays.shape[0]
    if alone or not all(torch.equal(A, stays) for A in given) or not all(torch.equal(t.A, stays) for t in target.terms):
        return None
    B = torch.stack([term.B.to(torch.float64) * term.coefficient for term in target.terms]).sum(dim=0)
    matrix = LowRank(B, stays.to(torch.float64))
    return Solution(matrix, matrix.rank, 0.0, 0.0, matrix.norm() ** 2, 0)


def _merge_beside(
    inputs: Inputs, name: str, part: str, weights: Tensor, order: list[int], server_lr: float, scaling: float
) -> Tensor:
    """Merge what goes with a LoRA module by its weights: lora_B.bias, which acts as s * bias, or DoRA's magnitudes."""

    def value(source: Source) -> Tensor:
        tensor = source.tensor(name, part).to(torch.float64)
        return tensor * source.scaling(name) if part == "bias" else tensor

    W, received = inputs.reference_of(name), inputs.received_of(name)
    check_finite([W, *received, *inputs.sent], name, [part])
    total, _ = blocks.weighted_sum(
        [value(inputs.sent[i]) for i in order],
        [None if (source := received[i]) is None else value(source) for i in order],
        weights[order].tolist(),
        None if W is None else value(W),
        server_lr,
    )
    return (total / scaling if part == "bias" else total).to(inputs.template(name).tensor(name, part).dtype)
