"""The measurement by which FedFroM's `clip` and `examples_cap` were chosen: robustness against accuracy lost.

Accuracy is that of six honest, unequal clients with Dirichlet 0.5 shares of each label of SST-2. In each round a client
takes one pass over its share, so that larger shares give larger updates. Every setting has the same seeds.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.attacks.attacks import HIJACK, UNTARGETED, Attack, Attackers, Sent
from benchmarks.attacks.bench import compare, merge
from benchmarks.attacks.contenders import CONTENDERS, applies
from benchmarks.attacks.federation import Federation
from benchmarks.attacks.rounds import Round
from benchmarks.messages import State
from fedfrom import FedFroM

CLIPS: Sequence[float | None] = (None, 2.0, 1.5, 1.25, 1.0)
CAPS: Sequence[float | None] = (None, 10.0, 3.0, 2.0)
LAST = 3  # final accuracy is the mean of the last three rounds', which varies less than one round's


def federated(
    federation: Federation, strategy: Any, rounds: int, attack: Attack | None = None, attackers: int = 0
) -> list[float]:
    """Return the global model's accuracy after each round; a round without a usable model changes nothing.

    The first clients attack in every round; their attack starts from their honest training in that round.
    """
    state, curve = federation.initial, []
    clients = range(len(federation.sizes))
    for server_round in range(1, rounds + 1):
        trained = [federation.trained(i, state, server_round) for i in clients]
        counts = [float(size) for size in federation.sizes]
        sent = [Sent(reply, count) for reply, count in zip(trained, counts, strict=True)]
        if attack is not None:
            flipped = [federation.trained(i, state, server_round, flipped=True) for i in range(attackers)]
            own, honest = trained[:attackers], trained[attackers:]
            known = Attackers(state, list(honest), list(own), counts[:attackers], list(flipped), server_round)
            sent[:attackers] = attack(known)
        state = merge(strategy, state, sent)[0] or state
        curve.append(federation.accuracy(state))
    return curve


def honest(
    data: Mapping[str, np.ndarray], seeds: Sequence[int], rounds: int = 8
) -> dict[tuple[str, float | None], list[float]]:
    """Return by ("clip" or "cap", setting) the accuracy of each seed; the other of the two is off."""
    found: dict[tuple[str, float | None], list[float]] = {}
    for seed in seeds:
        federation = Federation(data, 6, 0.5, seed)
        for clip in CLIPS:
            curve = federated(federation, FedFroM(clip=clip, examples_cap=None), rounds)
            found.setdefault(("clip", clip), []).append(float(np.mean(curve[-LAST:])))
        found.setdefault(("cap", None), []).append(found["clip", None][-1])
        for cap in CAPS[1:]:
            curve = federated(federation, FedFroM(clip=None, examples_cap=cap), rounds)
            found.setdefault(("cap", cap), []).append(float(np.mean(curve[-LAST:])))
    return found


def at_the_bound(known: Attackers, clip: float) -> list[Sent]:
    """Return sign-flips of the largest norms that the clip leaves whole: the attackers know the clip."""

    def change(state: State, i: int) -> State:
        def flipped(key: str, delta: np.ndarray) -> np.ndarray:
            norms = [np.linalg.norm(other[key].astype(np.float64) - known.sent[key]) for other in known.honest]
            return delta * (-clip * float(np.median(norms)) / float(np.linalg.norm(delta)))

        return known.moved(state, flipped)

    return known.each(change)


def held(
    rounds: Sequence[Round], chosen: tuple[float | None, float | None]
) -> dict[tuple[str, float | None], dict[str, float]]:
    """Return the lowest cosine to the honest merge that one untargeted attacker of 10 leaves.

    Keys are ("clip" or "cap", setting); the other of the two is that of `chosen`, (clip, cap). "cosine" is over all
    untargeted attacks, "with 1e12 examples" for the sign-flip with that claim, "at the bound" for the largest sign-flip
    that the clip leaves whole.
    """
    found = {}
    settings = [("clip", clip, clip, chosen[1]) for clip in CLIPS] + [("cap", cap, chosen[0], cap) for cap in CAPS]
    for kind, value, clip, cap in settings:
        made = {"FedFroM": lambda f, c=clip, e=cap: FedFroM(clip=c, examples_cap=e)}  # type: ignore[misc]
        attacks = {**UNTARGETED, "at the bound": lambda known, c=clip: at_the_bound(known, c or 1.0)}  # type: ignore[misc]
        outcomes = [o for one in rounds for o in compare(one, 1, attacks=attacks, strategies=made)]
        found[kind, value] = {
            "cosine": min(o.cosine for o in outcomes if "1e12" not in o.attack and o.attack != "at the bound"),
            "with 1e12 examples": min(o.cosine for o in outcomes if o.attack == HIJACK),
            "at the bound": min(o.cosine for o in outcomes if o.attack == "at the bound"),
        }
    return found


def under_attack(
    data: Mapping[str, np.ndarray],
    attacks: Mapping[str, Attack],
    alphas: Sequence[float] = (10.0, 1.0),
    attackers: Sequence[int] = (1, 3),
    rounds: int = 10,
    seeds: Sequence[int] = (0, 1),
) -> dict[tuple[float, int, str, str], float]:
    """Return by (alpha, attackers, attack, strategy) the accuracy of 10 clients, mean over the last rounds and seeds.

    alpha is the Dirichlet distribution's: with 10 the clients have like labels, with 1 unlike ones.
    """
    found: dict[tuple[float, int, str, str], list[float]] = {}
    for alpha, seed, count in itertools.product(alphas, seeds, attackers):
        federation = Federation(data, 10, alpha, seed, examples=1000, batch=16)
        for attack, send in {"no attack": None, **attacks}.items():
            for strategy, make in CONTENDERS.items():
                if applies(strategy, 10, count):
                    curve = federated(federation, make(count), rounds, send, count)
                    found.setdefault((alpha, count, attack, strategy), []).append(float(np.mean(curve[-LAST:])))
    return {key: float(np.mean(values)) for key, values in found.items()}
