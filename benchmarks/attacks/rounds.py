"""Rounds of honest clients, the global model and the replies: synthetic with a known cosine, or trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.messages import State

CLIENTS = 10
COSINES = (0.1, 0.5, 0.9)
SHAPES = {"first.weight": (24, 32), "second.weight": (40, 24), "second.bias": (40,)}
SKEWED, TRAINED = "encoder, unlike labels", "trained"


@dataclass(frozen=True)
class Round:
    """One round of honest clients.

    Attributes
    ----------
    name : str
        "cosine 0.5", or the name of a trained round.
    sent : Mapping[str, ndarray]
        W, the global model. Adapters start from B = 0: scaling a client's B scales its update by the same factor.
    honest : list[Mapping[str, ndarray]]
        (n,) each client's reply.
    examples : list[int]
        (n,) num-examples.
    flipped : Mapping[int, Mapping[str, ndarray]]
        Replies of some clients after training on wrong labels; empty in synthetic rounds.
    """

    name: str
    sent: State
    honest: list[State]
    examples: list[int]
    flipped: Mapping[int, State] = field(default_factory=dict)

    def update(self, state: State) -> np.ndarray:
        """Return a state less W as one float64 vector, with adapters as products."""
        found, start = dense(state), dense(self.sent)
        return np.concatenate([(found[name] - start[name]).ravel() for name in start])

    @property
    def cosine(self) -> float:
        """Mean cosine of the honest clients' updates, pair by pair."""
        updates = np.stack([self.update(state) for state in self.honest])
        updates /= np.linalg.norm(updates, axis=1, keepdims=True)
        n = len(updates)
        return float((np.linalg.norm(updates.sum(axis=0)) ** 2 - n) / (n * (n - 1)))


def dense(state: State) -> dict[str, np.ndarray]:
    """Return a state's tensors in float64, BA in place of lora_A and lora_B."""
    found = {}
    for key, value in state.items():
        if ".lora_A." in key:
            with np.errstate(all="ignore"):  # a strategy's result may overflow
                found[key] = state[key.replace("lora_A", "lora_B")].astype(np.float64) @ value.astype(np.float64)
        elif ".lora_B." not in key:
            found[key] = value.astype(np.float64)
    return found


def synthetic(cosine: float, seed: int, clients: int = CLIENTS) -> Round:
    """Return a round of plain tensors, as Flower's strategies expect, whose updates have this cosine in each layer.

    Norms and numbers of examples are unequal: the logarithms of the norms have a standard deviation of 0.3, those of
    the examples 0.5.
    """
    draw = np.random.default_rng([seed, round(100 * cosine)])
    sizes, counts = np.exp(0.3 * draw.normal(size=clients)), np.exp(0.5 * draw.normal(size=clients))
    sent = {name: draw.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    honest: list[dict[str, np.ndarray]] = [{} for _ in range(clients)]
    for name, shape in SHAPES.items():
        directions = np.linalg.qr(draw.normal(size=(int(np.prod(shape)), clients + 1)))[0].T
        for state, size, own in zip(honest, sizes, directions[1:], strict=True):
            update = cosine**0.5 * directions[0] + (1 - cosine) ** 0.5 * own
            state[name] = (sent[name] + size * update.reshape(shape)).astype(np.float32)
    return Round(f"cosine {cosine:g}", sent, list(honest), [int(100 * count) for count in counts])


def encoder(folder: Path, clients: int = CLIENTS, attackers: int = 3) -> Round:
    """Return the first round of clients with unlike labels who fine-tune LoRA adapters of an encoder, and a head.

    See `federation.encoder_round`.
    """
    from benchmarks.attacks.federation import encoder_round  # an import of seconds, which synthetic rounds don't need

    found = encoder_round(folder, attackers)
    flipped = {i: found[f"flipped-{i}"] for i in range(attackers)}
    honest = [found[str(i)] for i in range(clients)]
    return Round(SKEWED, found["sent"], list(honest), found["sizes"]["examples"].tolist(), flipped)


def trained(data: Mapping[str, np.ndarray], clients: int = CLIENTS, attackers: int = 3) -> Round:
    """Return the first round of clients with like labels who train a LoRA module and a head on an encoder's vectors.

    See `federation.Federation`. Each client takes ten steps on all of its examples: the clients' mean has learned.
    """
    from benchmarks.attacks.federation import Federation

    federation = Federation(data, clients, alpha=100.0, seed=0, epochs=10, examples=len(data["train"]), batch=512)
    honest = [federation.trained(i, federation.initial, 1) for i in range(clients)]
    flipped = {i: federation.trained(i, federation.initial, 1, flipped=True) for i in range(attackers)}
    return Round(TRAINED, federation.initial, list(honest), federation.sizes, dict(flipped))
