"""One LoRA module of n clients: the products stacked into T = W + alpha theta*, solved back to a rank (Eq. 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedfrom.merging.beside import merge_beside
from fedfrom.merging.clients import Round
from fedfrom.merging.linalg.krylov import energy_of
from fedfrom.merging.linalg.leading import columns_of
from fedfrom.merging.linalg.lowrank import LowRank, norms_and_cosines, random_normal
from fedfrom.merging.linalg.rounding import is_rounding, rank_tolerance, rescaled
from fedfrom.merging.linalg.scale import power_of_two
from fedfrom.merging.linalg.stack import Stack
from fedfrom.merging.methods.base import Context, ProductMethod, Survey
from fedfrom.merging.peft import layers as L
from fedfrom.merging.report import LayerReport
from fedfrom.merging.solve import Solution, energy_probes
from fedfrom.merging.sources import Inputs, check_finite, check_norms, summing_order
from fedfrom.merging.unchanged import keep_unchanged
from fedfrom.merging.weighing import MOST_COSINES, Updates, Weighing, clip_factors, once_each, weigh

_SKETCH = 32  # rows and columns of an update's sketch


def merge_adapter(
    inputs: Inputs,
    name: str,
    methods: Sequence[ProductMethod],
    shared: Round,
    survey: Survey,
) -> list[tuple[dict[str, Tensor], LayerReport]]:
    """Merge one LoRA module by each method: the products stacked into T = W + alpha theta*, solved back to the rank.

    What is the same for all methods (deltas, norms, Gram matrix, the QR of the stack) is computed once.
    """
    module = _Module.read(inputs, name, survey, shared.as_reference, shared.clip)
    [weighings] = weigh([module.updates], methods, survey, inputs.examples, inputs.weights, shared.server_lr)
    return once_each(weighings, module.merged)


@dataclass(frozen=True)
class _Module:
    """One LoRA module of n clients as products: W, and the theta_i in `updates.order` and `updates.unit`."""

    inputs: Inputs
    name: str
    survey: Survey
    as_reference: bool
    clip: float | None
    W: LowRank | None
    products: list[LowRank]
    thetas: list[LowRank]
    updates: Updates
    stack: Stack
    size: float  # ||W||_F in units

    @classmethod
    def read(cls, inputs: Inputs, name: str, survey: Survey, as_reference: bool, clip: float | None) -> _Module:
        W, products, deltas = adapter_deltas(inputs, name)
        order = summing_order(inputs, name, [_size(delta) for delta in deltas])
        sent = [*products, *([] if W is None else [W])]
        narrow = all(term.B.dtype != torch.float64 for product in sent for term in product.terms)
        stack = Stack([[] if W is None else W.terms, *(deltas[i].terms for i in order)], narrow)
        few = len(order) <= MOST_COSINES  # pair by pair the time grows with the square of the clients
        found, cosines = norms_and_cosines([deltas[i] for i in order], stack, pairs=few)
        norms = check_norms([norm for _, norm in sorted(zip(order, found, strict=True))], inputs, name)
        check_finite([inputs.reference_of(name)], name, list(inputs.template(name).layers[name].keys))
        factors = clip_factors(norms, clip)
        clipped = [norm * factor for norm, factor in zip(norms, factors, strict=True)]
        size = 0.0 if W is None else W.norm()
        unit = power_of_two([*clipped, size])
        # an update within rounding of zero is zero: it must not vote with its rounding
        thetas = [deltas[i] * (factors[i] / unit if norms[i] > 0 else 0.0) for i in order]
        sizes = torch.tensor([clipped[i] / unit for i in order], dtype=torch.float64)
        inner = None if cosines is None else sizes[:, None] * cosines * sizes
        updates = Updates(norms, factors, order, unit, sizes.tolist(), inner)
        module = cls(inputs, name, survey, as_reference, clip, W, products, thetas, updates, stack, size / unit)
        return module if few else replace(module, updates=replace(updates, sketch=module.sketch()))

    def sketch(self) -> Tensor:
        """Return (n, at most 2^10) float64: P theta_i Q, P and Q of 32 random rows and columns.

        Inner products of sketches are about 2^10 times those of the updates, to within some percent of their norms.
        """
        (d_out, d_in), device = self.thetas[0].shape, self.thetas[0].terms[0].B.device
        left = random_normal(min(_SKETCH, d_out), d_out, "sketch of rows").to(device)
        right = random_normal(d_in, min(_SKETCH, d_in), "sketch of columns").to(device)
        return self.stack.sketch([self.stack.mixture(theta.terms) for theta in self.thetas], left, right).cpu()

    def merged(self, weighing: Weighing) -> tuple[dict[str, Tensor], LayerReport]:
        """Return the module's tensors and its report."""
        updates, method, alpha, w = self.updates, weighing.method, weighing.server_lr, weighing.weights
        assert isinstance(method, ProductMethod)
        own = self.W.rank if self.W is not None else max(self.products[i].rank for i in self.inputs.with_weight)
        rank = _rank(method.rank, own, self.products, self.thetas[0].shape, self.name, caps=self.as_reference)
        sizes = torch.tensor(updates.sizes, dtype=torch.float64)
        squares = float(w @ sizes.square())  # sum_i w_i ||theta_i||^2
        coefficients = weighing.coefficients
        if method.linear:
            coefficients = coefficients * (sizes > 0)  # a zero delta adds nothing but rounding
        change = method.combine_products(self.thetas, coefficients, self._context(method, rank, alpha))
        target = change * alpha if self.W is None else LowRank.sum([self.W, change], [1 / updates.unit, alpha])
        solution = keep_unchanged(self.W, self.products, target, change, alpha, rank, updates.unit, self._scaling_out())
        if solution is None:
            rows = own if self.as_reference else None
            parts = self.size**2 + alpha**2 * float((coefficients * sizes).square().sum())
            solution = method.solve(target, rank, self.name, alpha**2 * squares, rows, self.stack, parts)
            if self.inputs.template(self.name).layers[self.name].is_embedding:
                # PEFT starts embedding_B (here A) as standard normal: its entries leave with that size
                root = target.shape[1] ** 0.5
                solution = replace(solution, matrix=LowRank(solution.matrix.B / root, solution.matrix.A * root))
        inner, size = self._sizes(weighing, coefficients, change, solution)
        spread = max(0.0, squares - 2 * inner + size)  # sum_i w_i ||theta_i - theta*||^2
        report = LayerReport(
            name=self.name,
            kind="adapter",
            has_reference=self.W is not None,
            ranks_in=[product.rank for product in self.products],
            rank_out=solution.rank,
            energy_dropped=solution.residual / solution.energy if solution.energy else 0.0,
            objective=(solution.residual + alpha**2 * spread) * updates.unit * updates.unit,
            excess=max(0.0, solution.residual - solution.optimum) / squares if squares else 0.0,
            iterations=solution.iterations,
            **updates.report(weighing, squares, spread),
        )
        return self._write(solution, weighing), report

    def _context(self, method: ProductMethod, rank: int | float, server_lr: float) -> Context:
        order, thresholds = self.updates.order, self.survey.thresholds
        shape = method.statistics_shape(self.thetas[0].shape)
        return Context(
            self.name,
            statistics=self.inputs.statistics_of(self.name, order, shape) if method.needs else None,
            thresholds=None if thresholds is None else [thresholds[i] / self.updates.unit for i in order],
            rank=rank if isinstance(rank, int) else None,
            base=None if self.W is None else self.W * (1 / self.updates.unit),
            server_lr=server_lr,
            tolerance=max(
                rank_tolerance(sent.state.stored_dtype(key))
                for sent in self.inputs.sent
                for part, key in sent.layers[self.name].keys.items()
                if part in L.RANK_DIMENSION
            ),
        )

    def _sizes(
        self, weighing: Weighing, coefficients: Tensor, change: LowRank, solution: Solution
    ) -> tuple[float, float]:
        """Return <sum_i w_i theta_i, theta*> and ||theta*||^2."""
        if not weighing.method.linear:
            return LowRank.sum(self.thetas, weighing.weights.tolist()).inner(change), change.norm() ** 2
        if self.updates.gram is not None:
            inner = self.updates.gram @ coefficients
            return float(weighing.weights @ inner), max(0.0, float(coefficients @ inner))
        if self.W is None and weighing.server_lr:  # T is alpha theta*
            size = solution.energy / weighing.server_lr**2
        else:
            size = self._energy(change, solution.rank)
        factor = float(weighing.coefficients.sum())  # theta* is so many times the weighted mean
        return size / factor if factor else 0.0, size

    def _energy(self, change: LowRank, rank: int) -> float:
        """Return ||theta*||^2, by the way that costs least; among very many clients an estimate."""
        if self.stack.holds(change.terms):
            operator = self.stack.operator(change.terms, columns_of(rank))
            if operator is not None:
                return energy_of(operator, energy_probes(change.shape[1]).to(self.stack.left.device))
        return float(torch.linalg.matrix_norm(change.core(self.stack).C)) ** 2

    def _scaling_out(self) -> float:
        """Return s of the config that goes with the result."""
        return self.inputs.template(self.name).scaling(self.name) if self.as_reference else 1.0

    def _write(self, solution: Solution, weighing: Weighing) -> dict[str, Tensor]:
        template = self.inputs.template(self.name)
        layer, scaling = template.layers[self.name], self._scaling_out()
        part = L.write_adapter(layer, solution.matrix * self.updates.unit, template.state, scaling)
        for extra in {"bias", "magnitude"} & layer.keys.keys():
            part[layer.keys[extra]] = merge_beside(
                self.inputs, self.name, extra, weighing, self.updates.order, self.clip, scaling
            )
        return part


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
            received.append(read.setdefault(id(cut), _part_of(W, cut.adapter(name))))
    for sent, product, ref in zip(inputs.sent, products, received, strict=True):
        rank = products[0].rank if ref is None else ref.rank
        if sent.config is None and product.rank != rank:
            why = "as the others" if ref is None else "as it was sent"
            raise ValueError(
                f"{sent.who}, {name!r}: expected rank {rank} {why}, found {product.rank}: unequal ranks have unequal "
                "scalings; give each client's adapter config (configs=)"
            )
    deltas = []
    loaded: dict[tuple[int, float], LowRank] = {}  # clients of one scaling share what they started from
    for product, ref in zip(products, received, strict=True):
        if ref is None:
            deltas.append(product)
            continue
        scaling = product.terms[0].coefficient
        is_rescaled = scaling != ref.terms[0].coefficient and product.rank >= ref.rank
        if is_rescaled:
            place = id(ref), scaling
            if place not in loaded:
                loaded[place] = _loaded(ref, scaling)
            ref = loaded[place]
        zero = is_rescaled and _is_rescaling(product, ref)
        deltas.append(ref * 0.0 if zero else _delta(product, ref))
    return W, products, deltas


def _part_of(W: LowRank | None, received: LowRank) -> LowRank:
    """Return what a client was sent; where that is the leading part of W, in W's memory."""
    assert W is not None
    (_, B, A), (s, B_i, A_i) = W.terms[0], received.terms[0]
    B, A = B[:, : received.rank], A[: received.rank]
    return LowRank(B, A, s) if torch.equal(B, B_i) and torch.equal(A, A_i) else received


def _loaded(received: LowRank, scaling: float) -> LowRank:
    """Return what a client of this scaling made of what it received: B in its own scaling, rounded to B's dtype."""
    given, B, A = received.terms[0]
    return LowRank(rescaled(B, given / scaling), A, scaling)


def _is_rescaling(sent: LowRank, received: LowRank) -> bool:
    """Return whether a client sent back what it received, multiplied by numbers of its own for A and for B.

    A client that loads its adapter without `fedfrom.client.load` may rescale A, B or both, and by other operations.
    Then its factors are those that it received but for rounding, and it has trained nothing.

    Parameters
    ----------
    sent : LowRank
        One product, with at least the columns that were received.
    received : LowRank
        One product in the client's scaling.
    """
    (_, B_i, A_i), (_, B, A) = sent.terms[0], received.terms[0]
    common = received.rank
    start = A.to(torch.float64)
    size = float(torch.linalg.vector_norm(start)) ** 2
    if size == 0.0 or bool(B_i[:, common:].any()):
        return False
    share = float((A_i[:common].to(torch.float64) * start).sum()) / size  # how many times A the client's A is
    if share == 0.0:
        return False
    return is_rounding(A_i[:common], start * share) and is_rounding(B_i[:, :common], B.to(torch.float64) / share)


def _delta(sent: LowRank, received: LowRank) -> LowRank:
    """Return theta_i = W_i - ref_i, where it can be by way of what changed in the factors.

    With B_i = B + dB_i, A_i = A + dA_i and one scaling it is s (dB_i A + dB_i dA_i + B dA_i): no digits cancel, and all
    clients' factors, B, dB_1, ..., dB_n, are far from dependent, which B, B_1, ..., B_n are where updates are small. A
    client of a larger rank than it was sent adds the product of its factors beyond.
    """
    (s, B_i, A_i), (given, B, A) = sent.terms[0], received.terms[0]
    common = len(A)
    if s != given or len(A_i) < common:
        return sent - received
    dB = B_i[:, :common].to(torch.float64) - B.to(torch.float64)
    dA = A_i[:common].to(torch.float64) - A.to(torch.float64)
    parts = [(dB, A), (dB, dA), (B, dA)]
    moved = {id(dB): bool(dB.any()), id(dA): bool(dA.any())}
    terms = [
        LowRank(left, right, s) for left, right in parts if moved.get(id(left), True) and moved.get(id(right), True)
    ]
    if len(A_i) > common and bool(B_i[:, common:].any()):
        terms.append(LowRank(B_i[:, common:], A_i[common:], s))
    return LowRank.sum(terms) if terms else received * 0.0


def _size(delta: LowRank) -> float:
    """Return a number of a delta's content alone, which the clients are ordered by; 0 where it is zero."""
    first, last = delta.terms[0], delta.terms[-1]
    if first.coefficient == 0.0:
        return 0.0
    # those that tie are parted by a digest of all there is
    return 1.0 + float(torch.linalg.vector_norm(first.B[0]) * torch.linalg.vector_norm(last.A[0]))


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
        raise ValueError(
            f"rank, {name!r}: expected at most {limit} for a matrix of shape {shape}, found {asked}: give a smaller "
            "rank, or a share of the energy such as 0.99, which fits every layer"
        )
    return min(asked, *shape)
