"""The driver: walks the layers of n clients' states, one layer at a time, whatever the states are read from."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from fedfrom.merging import layers as L
from fedfrom.merging import tensors
from fedfrom.merging.average import FactorAverage
from fedfrom.merging.frobenius import weights as norm_weights
from fedfrom.merging.inputs import Inputs, Source, check_inputs
from fedfrom.merging.layers import State
from fedfrom.merging.lowrank import LowRank, gram
from fedfrom.merging.methods import Method, make_method
from fedfrom.merging.report import LayerReport, MergeReport, largest_eigenvalue
from fedfrom.merging.solve import Solution


def merge(
    states: Sequence[State],
    reference: State | None = None,
    method: str | Method = "from",
    *,
    received: Sequence[State | None] | None = None,
    configs: Sequence[Any] | None = None,
    reference_config: Any = None,
    examples: Sequence[float] | None = None,
    server_lr: float = 1.0,
    as_reference: bool = False,
    names: Sequence[str] | None = None,
    dora: bool = False,
    same_base: bool = False,
    **options: Any,
) -> tuple[dict[str, Tensor], MergeReport]:
    """Merge the states of n clients into one: W + alpha theta*, layer by layer (Eq. 5; adapters by Eq. 6).

    Parameters
    ----------
    states : Sequence[Mapping[str, Tensor]]
        W_i: what each client sends, at least one: adapters' state dicts, full state dicts, or both mixed. A mapping may
        read its tensors when asked for them: one layer is held at a time. Never changed.
    reference : Mapping[str, Tensor] | None (default: None)
        W, the global state; None is zero, which is right for fresh adapters. Layers that it lacks have none.
    method : str | Method (default: "from")
        A name of `methods()`, with its options as further keywords, or a method object.
    received : Sequence[Mapping | None] | None (default: None)
        ref_i for each client that was sent something else than W (a smaller rank); None, there or in all, is W.
    configs : Sequence | None (default: None)
        An adapter config a client (adapter_config.json as a mapping, or a LoraConfig): gives each module's scaling.
        Without them all ranks must be equal and one scaling is assumed, which cancels.
    reference_config : optional
        The adapter config of `reference` and `received`; needed with `configs` where the reference has adapters.
    examples : Sequence[float] | None (default: None)
        n_i > 0.
    server_lr : float (default: 1.0)
        alpha.
    as_reference : bool (default: False)
        Give adapters the reference's factor shapes and scaling, so that running clients can load them: `rank` then
        caps the rank of the product. False: factors of the merged rank, B carrying the scaling, and a `report.config`
        to match.
    names : Sequence[str] | None (default: None)
        What errors and the report call the clients; None: client 0, client 1, ...
    dora, same_base : bool (default: False)
        Accept DoRA, and initialisations that alter the base: see `layers.check_config`.
    **options
        The method's, where it is given by name.

    Returns
    -------
    tuple[dict[str, Tensor], MergeReport]
        The merged state, new tensors in the inputs' dtype and device (float64 or float32 inside), under the reference's
        keys (else the first client's); and what was done.

    Raises
    ------
    ValueError
        Names the client, the key, what was expected and what was found.

    Notes
    -----
    The order of clients changes nothing, to the bit: sums run in the order of the deltas' norms (ties: examples, then
    a digest of the content).
    """
    chosen = make_method(method, **options)
    if not math.isfinite(server_lr):
        raise ValueError(f"server_lr: expected a finite number, found {server_lr}")
    on_factors = isinstance(chosen, FactorAverage)
    inputs = check_inputs(
        states, reference, received, configs, reference_config, examples, names, not on_factors, dora, same_base
    )
    merged: dict[str, Tensor] = {}
    reports: list[LayerReport] = []
    with _one_thread(), torch.no_grad():
        whole = _whole_weights(inputs, chosen) if chosen.scope == "model" else None
        for name, layer in inputs.sent[0].layers.items():
            if layer.is_adapter:
                part, report = _merge_adapter(inputs, name, chosen, server_lr, whole, as_reference)
            elif not inputs.sent[0].tensor(name).is_floating_point():
                part, report = _keep(inputs, name)
            else:
                part, report = _merge_tensor(inputs, name, chosen, server_lr, whole)
            merged.update(part)
            reports.append(report)
    settings = {"name": type(chosen).__name__, **asdict(chosen), "server_lr": server_lr}
    config = _config(inputs, reports, keep=as_reference or on_factors)
    return merged, MergeReport(settings, [source.who for source in inputs.sent], reports, config)


def _merge_adapter(
    inputs: Inputs, name: str, method: Method, server_lr: float, whole: Tensor | None, as_reference: bool
) -> tuple[dict[str, Tensor], LayerReport]:
    """Merge one LoRA module: the products stacked into T = W + alpha theta*, solved back to the rank (Eq. 6)."""
    assert not isinstance(method, FactorAverage)
    template, has_reference = inputs.template(name), inputs.reference_of(name) is not None
    layer = template.layers[name]
    W, products, deltas = _adapter_deltas(inputs, name)
    norms = _finite([delta.norm() for delta in deltas], inputs, name)
    weights = method.weights(torch.tensor(norms, dtype=torch.float64), inputs.examples) if whole is None else whole
    order = _order(inputs, name, norms, weights)
    w = weights[order]

    # from here in units of the layer's size, so that no square leaves float64's range
    _check_finite([inputs.reference_of(name)], name, list(layer.keys))
    unit = _unit([*norms, 0.0 if W is None else W.norm()])
    moved = [i for i in order if norms[i] > 0]  # a zero delta adds nothing but rounding
    change = LowRank.sum([deltas[i] for i in moved] or deltas[:1], [float(weights[i]) / unit for i in moved] or [0.0])
    target = change * server_lr if W is None else LowRank.sum([W, change], [1 / unit, server_lr])
    inner = gram([deltas[i] * (1 / unit) for i in order], [norms[i] / unit for i in order])
    squares = float(w @ inner.diagonal())  # sum_i w_i ||theta_i||^2

    own_rank = W.rank if W is not None else max(product.rank for product in products)
    rows = own_rank if as_reference else None
    rank = _rank(method.rank, own_rank, products, target.shape, name, caps=as_reference)
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
    spread = max(0.0, squares - float(w @ inner @ w))  # sum_i w_i ||theta_i - theta*||^2
    report = LayerReport(
        name=name,
        kind="adapter",
        norms=norms,
        weights=weights.tolist(),
        clients_effective=float(1 / w.square().sum()),
        has_reference=has_reference,
        ranks_in=[product.rank for product in products],
        rank_out=solution.matrix.rank,
        energy_dropped=solution.residual / solution.energy if solution.energy else 0.0,
        objective=(solution.residual + server_lr**2 * spread) * unit * unit,
        excess=max(0.0, solution.residual - solution.optimum) / squares if squares else 0.0,
        iterations=solution.iterations,
        lambda_max=largest_eigenvalue(inner, w),
    )
    return part, report


def _adapter_deltas(inputs: Inputs, name: str) -> tuple[LowRank | None, list[LowRank], list[LowRank]]:
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
    return Solution(matrix, 0.0, 0.0, matrix.norm() ** 2, 0)


def _merge_beside(
    inputs: Inputs, name: str, part: str, weights: Tensor, order: list[int], server_lr: float, scaling: float
) -> Tensor:
    """Merge what goes with a LoRA module by its weights: lora_B.bias, which acts as s * bias, or DoRA's magnitudes."""

    def value(source: Source) -> Tensor:
        tensor = source.tensor(name, part).to(torch.float64)
        return tensor * source.scaling(name) if part == "bias" else tensor

    W, received = inputs.reference_of(name), inputs.received_of(name)
    _check_finite([W, *received, *inputs.sent], name, [part])
    total, _ = tensors.weighted_sum(
        [value(inputs.sent[i]) for i in order],
        [None if (source := received[i]) is None else value(source) for i in order],
        weights[order].tolist(),
        None if W is None else value(W),
        server_lr,
    )
    return (total / scaling if part == "bias" else total).to(inputs.template(name).tensor(name, part).dtype)


def _merge_tensor(
    inputs: Inputs, name: str, method: Method, server_lr: float, whole: Tensor | None
) -> tuple[dict[str, Tensor], LayerReport]:
    """Merge one plain tensor by Eq. 5; k = 0 where it has no reference, or is a running statistic."""
    layer, values, references = _tensors(inputs, name)
    W = inputs.reference_of(name)
    norms = _finite([tensors.delta_norm(v, r) for v, r in zip(values, references, strict=True)], inputs, name)
    if layer.is_running_statistic or W is None:
        equal = [1.0] * len(norms)
        weights = norm_weights(equal, 0.0, inputs.examples, method.examples_power)
        kind = "buffer" if layer.is_running_statistic else "tensor"
        server_lr = 1.0  # a mean of values: there is no update that it could scale
    else:
        weights = method.weights(torch.tensor(norms, dtype=torch.float64), inputs.examples) if whole is None else whole
        kind = "tensor"
    _check_finite([W], name, ["tensor"])
    order = _order(inputs, name, norms, weights)
    w = weights[order]
    result, change = tensors.weighted_sum(
        [values[i] for i in order],
        [references[i] for i in order],
        w.tolist(),
        None if W is None else W.tensor(name),
        server_lr,
    )
    unit = _unit(norms)
    squares = float((w * torch.tensor([norms[i] / unit for i in order], dtype=torch.float64).square()).sum())
    spread = max(0.0, squares - (change / unit) ** 2)  # sum_i w_i ||theta_i - theta*||^2
    samples = torch.stack([tensors.sample(values[i], references[i]) for i in order]) / unit
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


def _tensors(inputs: Inputs, name: str) -> tuple[L.Layer, list[Tensor], list[Tensor | None]]:
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


def _keep(inputs: Inputs, name: str) -> tuple[dict[str, Tensor], LayerReport]:
    """Keep a tensor of integers or booleans: the reference's, or without one the largest entries of the clients'."""
    layer, values, _ = _tensors(inputs, name)
    source = inputs.reference_of(name)
    kept = values[0] if source is None else source.tensor(name)
    if source is None:
        for value in values[1:]:
            kept = torch.maximum(kept, value)
    return {layer.keys["tensor"]: kept.clone()}, LayerReport(name, "kept", has_reference=source is not None)


def _whole_weights(inputs: Inputs, method: Method) -> Tensor:
    """Return one weight a client, from the norm of its whole update (buffers and layers without a delta left out)."""
    norms = [0.0] * len(inputs.sent)
    for name, layer in inputs.sent[0].layers.items():
        if layer.is_adapter:
            found = [delta.norm() for delta in _adapter_deltas(inputs, name)[2]]
        else:
            _, values, references = _tensors(inputs, name)
            if layer.is_running_statistic or inputs.reference_of(name) is None or not values[0].is_floating_point():
                continue
            found = [tensors.delta_norm(v, r) for v, r in zip(values, references, strict=True)]
        norms = [math.hypot(a, b) for a, b in zip(norms, _finite(found, inputs, name), strict=True)]
    return method.weights(torch.tensor(norms, dtype=torch.float64), inputs.examples)


def _finite(norms: list[float], inputs: Inputs, name: str) -> list[float]:
    for sent, received, norm in zip(inputs.sent, inputs.received_of(name), norms, strict=True):
        if not math.isfinite(norm):
            _check_finite([received, sent], name, list(sent.layers[name].keys))
            raise ValueError(f"{sent.who}, {name!r}: expected finite numbers, found an update of norm {norm}")
    return norms


def _check_finite(sources: Sequence[Source | None], name: str, parts: list[str]) -> None:
    """Raise ValueError for the first tensor with NaN or infinity in it."""
    for source in sources:
        for part in parts if source is not None else []:
            assert source is not None
            if not torch.isfinite(source.tensor(name, part)).all():
                key = source.layers[name].keys[part]
                raise ValueError(f"{source.who}, {key!r}: expected finite numbers, found NaN or infinity")


def _order(inputs: Inputs, name: str, norms: list[float], weights: Tensor) -> list[int]:
    """Return the clients in the order that sums run in, one that does not depend on the order they came in.

    By norm, then weight; the content is digested only to part clients that tie in both with a delta that counts.
    """
    keys = list(zip(norms, weights.tolist(), strict=True))

    def key(i: int) -> tuple[float, float, bytes]:
        tied = keys[i][0] > 0 and keys.count(keys[i]) > 1
        return (*keys[i], _digest(inputs.sent[i], name) if tied else b"")

    return sorted(range(len(keys)), key=key)


def _digest(source: Source, name: str) -> bytes:
    digest = hashlib.blake2b()
    for part in sorted(source.layers[name].keys):
        tensor = source.tensor(name, part).detach().cpu().contiguous()
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _unit(norms: list[float]) -> float:
    """Return a power of two (which scales without rounding) of about the largest norm's size; 1 for zeros."""
    exponent = math.frexp(max(norms))[1]
    return 2.0 ** min(max(exponent, -1000), 1000)


def _config(inputs: Inputs, reports: list[LayerReport], keep: bool) -> dict[str, Any] | None:
    """Return the adapter config that goes with the result, None where none was given or there is no adapter."""
    given = (inputs.reference or inputs.sent[0]).config if keep else inputs.sent[0].config
    ranks = {report.name: report.rank_out for report in reports if report.kind == "adapter"}
    if given is None or keep or not ranks:
        return given
    return L.output_config(given, ranks)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Run on one thread: small QRs and SVDs are faster, and their bits do not depend on the machine's cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
