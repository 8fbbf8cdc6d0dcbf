"""What each client changed of a layer, theta_i = W_i - ref_i: of a LoRA module as products, else as tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fedfrom.merging.linalg.blocks import Values
from fedfrom.merging.linalg.lowrank import LowRank
from fedfrom.merging.linalg.norms import delta_norms
from fedfrom.merging.linalg.rounding import is_rounding, rescaled
from fedfrom.merging.peft import layers as L
from fedfrom.merging.sources import Inputs, check_norms


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


def plain_norms(inputs: Inputs, name: str, values: list[Values], references: list[Tensor | None]) -> list[float]:
    """Return ||theta_i||_F of a plain layer, those that are not known yet from the entries; all are finite."""
    missing = [i for i, source in enumerate(inputs.sent) if name not in source.norms]
    found = dict(zip(missing, delta_norms([(values[i], references[i]) for i in missing]), strict=True))
    norms = [found[i] if i in found else source.norms[name] for i, source in enumerate(inputs.sent)]
    return check_norms(norms, inputs, name)


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
