"""One attack on one strategy: the distance of its merge from the merge of the honest clients alone."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.attacks.attacks import ATTACKS, TRAINED, Attack, Attackers, Sent
from benchmarks.attacks.contenders import CONTENDERS, applies
from benchmarks.attacks.rounds import Round
from benchmarks.messages import State, aggregate, reply, state_of


@dataclass(frozen=True)
class Outcome:
    """The result of a strategy in a round with attackers.

    Attributes
    ----------
    cosine, distance : float
        Cosine of the global update to the honest merge, and their distance relative to the honest merge's norm. The
        honest merge is the same strategy's without the attackers' replies; a strategy that is told the number of
        attackers is told 0. Without a usable model (the run ended with an exception, or arrays have NaN or infinity) 0
        and 1, as of a zero update.
    common : float
        Cosine to a target that is the same for all strategies: the honest clients' mean product, weighted by examples.
    weight : float | None
        The attackers' total weight in the layer where it is largest; None for a strategy that reports no weights.
    note : str
        The failure, if there was one.
    """

    round: str
    seed: int
    attackers: int
    attack: str
    strategy: str
    cosine: float
    distance: float
    common: float
    weight: float | None
    note: str = ""


def compare(
    round: Round,
    attackers: int,
    seed: int = 0,
    attacks: Mapping[str, Attack] = ATTACKS,
    strategies: Mapping[str, Any] = CONTENDERS,
) -> Iterator[Outcome]:
    """Run every attack against every strategy; the first clients of the round are the attackers."""
    gc.freeze()  # Bulyan collects garbage after every reply: leave earlier objects out of the collection
    n = len(round.honest)
    own, honest = round.honest[:attackers], round.honest[attackers:]
    counts = [float(count) for count in round.examples]
    flipped = [round.flipped[i] for i in range(attackers)] if round.flipped else []
    known = Attackers(round.sent, honest, own, counts[:attackers], flipped, seed)
    share = np.array(counts[attackers:]) / sum(counts[attackers:])
    target = share @ np.stack([round.update(state) for state in honest])
    for strategy, make in strategies.items():
        if not applies(strategy, n, attackers):
            continue
        alone = [Sent(state, count) for state, count in zip(honest, counts[attackers:], strict=True)]
        merged, note = merge(make(0), round.sent, alone, attackers)
        assert merged is not None, note
        reference = round.update(merged)
        for attack, send in attacks.items():
            if attack in TRAINED and not round.flipped:
                continue
            sent = [*send(known), *alone]
            made = make(attackers)
            merged, note = merge(made, round.sent, sent)
            found = None if merged is None else round.update(merged)
            cosine, distance, common = 0.0, 1.0, 0.0
            if found is not None:
                cosine = cosine_of(found, reference)
                distance = float(np.linalg.norm(found - reference) / np.linalg.norm(reference))
                common = cosine_of(found, target)
            weight = None if found is None else attackers_weight(made, attackers)
            yield Outcome(round.name, seed, attackers, attack, strategy, cosine, distance, common, weight, note)


def merge(
    strategy: Any, sent: State, replies: Sequence[Sent], first: int = 0
) -> tuple[dict[str, np.ndarray] | None, str]:
    """Return a strategy's merge of the replies, or None, and the reason where there is no usable model.

    Nodes are numbered from `first` + 1: clients keep their numbers where the first ones are left out.
    """
    try:
        messages = [reply(first + i + 1, state, count) for i, (state, count) in enumerate(replies)]
        with np.errstate(all="ignore"):
            arrays = aggregate(strategy, sent, messages)
    except Exception as error:  # whatever ends the run
        return None, f"{type(error).__name__} ends the run"
    if arrays is None:
        return None, "round skipped"
    found = state_of(arrays)
    if {key: value.shape for key, value in found.items()} != {key: value.shape for key, value in sent.items()}:
        return None, "other keys or shapes"
    if not all(np.isfinite(value).all() for value in found.values()):
        return None, "NaN or infinity"
    return found, ""


def cosine_of(a: np.ndarray, b: np.ndarray) -> float:
    """Return the cosine of two vectors, 0 where one of them is zero."""
    sizes = [float(np.abs(x).max()) for x in (a, b)]
    if min(sizes) == 0:
        return 0.0
    a, b = a / sizes[0], b / sizes[1]  # no square may overflow
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def attackers_weight(strategy: Any, attackers: int) -> float | None:
    """Return the first nodes' total weight in the layer where it is largest; None without a report."""
    report = getattr(strategy, "reports", {}).get(1)
    if report is None or report.merge is None:
        return None
    places = [i for i, node in enumerate(report.nodes) if node <= attackers]
    layers = [layer for layer in report.merge.layers if layer.is_update]
    return max(sum(layer.weights[i] for i in places) for layer in layers)
