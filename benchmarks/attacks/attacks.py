"""The replies of attackers. All attackers know all honest replies.

An adapter starts from B = 0, and attacks change B alone: A stays as the attacker trained it, so that scaling B by s
scales the product BA by s. ALIE, IPM and MinMax send the honest clients' mean A.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from benchmarks.messages import State

Arrays = dict[str, np.ndarray]


class Sent(NamedTuple):
    """One attacker's reply: its state, and its number of examples."""

    state: State
    examples: float


@dataclass(frozen=True)
class Attackers:
    """The attackers' knowledge.

    Attributes
    ----------
    sent : Mapping[str, ndarray]
        W, the global model.
    honest : list[Mapping[str, ndarray]]
        The honest clients' replies.
    own : list[Mapping[str, ndarray]]
        The attackers' own states after honest training.
    examples : list[float]
        The attackers' true numbers of examples.
    flipped : list[Mapping[str, ndarray]]
        The attackers' states after training on wrong labels; may be empty.
    seed : int
        Seed of noise.
    """

    sent: State
    honest: list[State]
    own: list[State]
    examples: list[float]
    flipped: list[State]
    seed: int = 0

    def each(self, change: Callable[[State, int], State]) -> list[Sent]:
        """Return each attacker's own state, changed."""
        return [Sent(change(state, i), n) for i, (state, n) in enumerate(zip(self.own, self.examples, strict=True))]

    def count(self, value: float) -> list[Sent]:
        """Return honest updates under another number of examples."""
        return [Sent(state, value) for state in self.own]

    def moved(self, state: State, delta: Callable[[str, np.ndarray], np.ndarray]) -> Arrays:
        """Return W plus a function of each delta of a state; lora_A is the state's."""
        found = {}
        for key, sent in self.sent.items():
            if ".lora_A." in key:
                found[key] = state[key]
            else:
                with np.errstate(over="ignore"):
                    found[key] = (sent + delta(key, state[key].astype(np.float64) - sent)).astype(sent.dtype)
        return found

    def scaled(self, factor: float) -> list[Sent]:
        """Return the attackers' own updates times a factor."""
        return self.each(lambda state, i: self.moved(state, lambda key, delta: factor * delta))

    def filled(self, value: float) -> list[Sent]:
        """Return updates with one number in all entries."""
        return self.each(lambda state, i: self.moved(state, lambda key, delta: np.full_like(delta, value)))

    @property
    def mean(self) -> Arrays:
        """The honest clients' mean, entry by entry."""
        return {key: np.mean([state[key] for state in self.honest], axis=0) for key in self.sent}

    def together(self, delta: Callable[[str, np.ndarray], np.ndarray]) -> list[Sent]:
        """Return one update for all attackers, a function of the honest clients' mean update."""
        state = self.moved(self.mean, delta)
        return [Sent(state, n) for n in self.examples]


def noise(known: Attackers) -> list[Sent]:
    """Gaussian noise of ten times the norm of the attacker's own update of each tensor."""

    def change(state: State, i: int) -> Arrays:
        draw = np.random.default_rng([known.seed, i])

        def drawn(key: str, delta: np.ndarray) -> np.ndarray:
            found = draw.normal(size=delta.shape)
            return found * (10 * np.linalg.norm(delta) / np.linalg.norm(found))

        return known.moved(state, drawn)

    return known.each(change)


def alie(known: Attackers) -> list[Sent]:
    """A Little Is Enough (Baruch et al., 2019): the honest mean less 1.5 standard deviations of every entry.

    The paper's own bound on z, from n and f alone, is below 0.2 for 1 to 3 attackers of 10, which does nothing.
    """
    deviation = {key: np.std([state[key] for state in known.honest], axis=0) for key in known.sent}
    return known.together(lambda key, delta: delta - 1.5 * deviation[key])


def ipm(epsilon: float) -> Callable[[Attackers], list[Sent]]:
    """Inner product manipulation (Xie et al., 2020): minus epsilon times the honest mean."""
    return lambda known: known.together(lambda key, delta: -epsilon * delta)


def minmax(known: Attackers) -> list[Sent]:
    """MinMax (Shejwalkar & Houmansadr, 2021): as far from the honest mean as honest clients are from each other.

    The honest mean less gamma times the entries' standard deviations (the paper's "inverse standard deviation"). gamma
    is the largest for which no honest client is further away than two honest clients are from each other. Distances are
    computed on the attacked entries.
    """
    keys = [key for key in known.sent if ".lora_A." not in key]
    honest = np.stack(
        [np.concatenate([(s[key].astype(np.float64) - known.sent[key]).ravel() for key in keys]) for s in known.honest]
    )
    mean, direction = honest.mean(axis=0), honest.std(axis=0)
    squares = np.einsum("ij,ij->i", honest, honest)
    widest = float((squares[:, None] + squares - 2 * honest @ honest.T).max())
    low, high = 0.0, 10 * math.sqrt(widest) / float(np.linalg.norm(direction))
    for _ in range(60):
        gamma = (low + high) / 2
        if float(((honest - mean + gamma * direction) ** 2).sum(axis=1).max()) <= widest:
            low = gamma
        else:
            high = gamma
    deviation = {key: np.std([state[key] for state in known.honest], axis=0) for key in keys}
    return known.together(lambda key, delta: delta - low * deviation[key])


def wrong_shape(known: Attackers) -> list[Sent]:
    """Half the rank; of plain tensors the first row alone, which broadcasts."""

    def change(state: State, i: int) -> Arrays:
        found = dict(state)
        for key, value in state.items():
            if ".lora_A." in key:
                found[key] = value[: len(value) // 2]
            elif ".lora_B." in key:
                found[key] = value[:, : value.shape[1] // 2].copy()
            elif not any(".lora_" in other for other in state):
                found[key] = value[:1]
        return found

    return known.each(change)


def missing(known: Attackers) -> list[Sent]:
    """The last tensor is left out."""
    return known.each(lambda state, i: dict(list(state.items())[:-1]))


def extra(known: Attackers) -> list[Sent]:
    """A tensor more than was sent."""
    return known.each(lambda state, i: {**state, "one.more": np.ones(3, np.float32)})


def label_flip(known: Attackers) -> list[Sent]:
    """Honest training on labels that are all wrong."""
    return [Sent(state, n) for state, n in zip(known.flipped, known.examples, strict=True)]


def replacement(known: Attackers) -> list[Sent]:
    """Model replacement (Bagdasaryan et al., 2020): the flipped model's update times n / f, to outlive an average."""
    total = len(known.honest) + len(known.own)
    factor = total / len(known.own)
    return [
        Sent(known.moved(state, lambda key, delta: factor * delta), n)
        for state, n in zip(known.flipped, known.examples, strict=True)
    ]


Attack = Callable[[Attackers], list[Sent]]
FLIP = "sign-flip"
HIJACK = "num-examples 1e12, sign-flip"

# Replies that are malformed: a strategy that accepts them loses its model, or ends with an exception.
MALFORMED: Mapping[str, Attack] = {
    "NaN": lambda known: known.filled(math.nan),
    "Inf": lambda known: known.filled(math.inf),
    "1e30": lambda known: known.filled(1e30),
    "wrong rank or shape": wrong_shape,
    "missing key": missing,
    "extra key": extra,
    "num-examples 0": lambda known: known.count(0),
    "num-examples -1": lambda known: known.count(-1),
    "num-examples NaN": lambda known: known.count(math.nan),
}
# Replies that are well-formed, with wrong numbers.
UNTARGETED: Mapping[str, Attack] = {
    "zero": lambda known: known.scaled(0.0),
    "Gaussian noise": noise,
    **{f"{FLIP} ×{scale:g}": lambda known, s=scale: known.scaled(-s) for scale in (1, 10, 100, 1e6)},  # type: ignore[misc]
    **{f"scale-up ×{scale:g}": lambda known, s=scale: known.scaled(s) for scale in (10, 1e3, 1e6)},  # type: ignore[misc]
    "ALIE": alie,
    "IPM 0.1": ipm(0.1),
    "IPM 100": ipm(100),
    "MinMax": minmax,
    "num-examples 1e12": lambda known: known.count(1e12),
    HIJACK: lambda known: [Sent(state, 1e12) for state, _ in known.scaled(-1)],
}
TRAINED: Mapping[str, Attack] = {"label-flip": label_flip, "model replacement": replacement}
ATTACKS: Mapping[str, Attack] = {**MALFORMED, **UNTARGETED, **TRAINED}
