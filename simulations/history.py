"""The rounds of one strategy: scores, seconds, bytes and weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Round:
    """One round: the global model's scores after it, and its seconds and bytes. Round 0 is the untrained model.

    Rounds that `--eval-every` leaves out have no scores.
    """

    number: int
    scores: dict[str, float]
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    server_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    clients: dict[int, dict[str, float]] = field(default_factory=dict)  # partition id -> loss, seconds, speed, process
    weights: dict[int, float] = field(default_factory=dict)  # partition id -> mean weight over the layers
    distance_from_mean: float | None = None  # see simulations.aggregation
    train_metrics: dict[str, Any] = field(default_factory=dict)
    evaluate_metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds_by_process(self) -> dict[float, float]:
        """Seconds of training in each client process that trained."""
        found: dict[float, float] = {}
        for client in self.clients.values():
            found[client["process"]] = found.get(client["process"], 0.0) + client["seconds"]
        return found

    @property
    def training_seconds(self) -> float:
        """Seconds of training in the client process that trained longest; the other processes waited for it."""
        return max(self.seconds_by_process.values(), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return the round as plain JSON types."""
        names = {name.replace("_", "-"): value for name, value in vars(self).items()}
        return {**names, "clients": _text_keys(self.clients), "weights": _text_keys(self.weights)}


@dataclass
class History:
    """All rounds of one strategy, its report of each merge, and its final weights."""

    label: str
    rounds: list[Round] = field(default_factory=list)
    reports: dict[int, Any] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    client_states: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # --save-clients: by partition id
    wall_seconds: float = 0.0
    started: float = 0.0  # by time.perf_counter of this process

    @property
    def split(self) -> dict[str, float]:
        """The wall time in parts that add up to it.

        training: mean over the client processes. idle: mean time for which they waited for the busiest process.
        merging and evaluation: the server's. transport: the rest, that is messages, their packing and unpacking, polls,
        and loading weights into models. Two further numbers are no parts: "processes", and "beyond-training", the wall
        time relative to training, less 1.
        """
        processes = len({process for entry in self.rounds for process in entry.seconds_by_process})
        trained = sum(seconds for entry in self.rounds for seconds in entry.seconds_by_process.values())
        training, longest = trained / max(1, processes), self.total("training_seconds")
        merging, evaluation = self.total("server_seconds"), self.total("evaluation_seconds")
        return {
            "processes": processes,
            "training": training,
            "idle": longest - training,
            "transport": self.wall_seconds - longest - merging - evaluation,
            "merging": merging,
            "evaluation": evaluation,
            "beyond-training": self.wall_seconds / training - 1 if training else 0.0,
        }

    @property
    def overhead(self) -> float:
        """Share of the wall time in which the busiest client process did not train and the server did not evaluate."""
        busy = self.total("training_seconds") + self.total("evaluation_seconds")
        return 1 - busy / self.wall_seconds if self.wall_seconds else 0.0

    @property
    def scored(self) -> list[Round]:
        """The rounds after which the global model was scored, from the untrained model's on."""
        return [entry for entry in self.rounds if entry.scores]

    @property
    def curve(self) -> list[float]:
        """Scores of the scored rounds."""
        return [entry.scores["score"] for entry in self.scored]

    @property
    def final(self) -> float:
        """Score after the last round."""
        return self.curve[-1]

    @property
    def best(self) -> float:
        """Best score of any round."""
        return max(self.curve)

    def rounds_to(self, target: float) -> int | None:
        """Return the first scored round that reaches the target, None if none does."""
        return next((entry.number for entry in self.scored if entry.scores["score"] >= target), None)

    def total(self, name: str) -> float:
        """Return the sum of a quantity over the rounds."""
        return sum(getattr(entry, name) for entry in self.rounds)

    def to_dict(self, target: float) -> dict[str, Any]:
        """Return the history as plain JSON types, without the weights."""
        return {
            "final": self.final,
            "best": self.best,
            "rounds-to-target": self.rounds_to(target),
            "bytes-up": self.total("bytes_up"),
            "bytes-down": self.total("bytes_down"),
            "seconds": self.total("seconds"),
            "server-seconds": self.total("server_seconds"),
            "training-seconds": self.total("training_seconds"),
            "evaluation-seconds": self.total("evaluation_seconds"),
            "wall-seconds": self.wall_seconds,
            "overhead": self.overhead,
            "split": self.split,
            "rounds": [entry.to_dict() for entry in self.rounds],
            "reports": _text_keys(self.reports),
        }


def client_weights(report: Mapping[str, Any], client_of_node: Mapping[int, int]) -> dict[int, float]:
    """Return each client's mean weight over the layers of a merge.

    Parameters
    ----------
    report : Mapping[str, Any]
        A fedfrom strategy's report of one round: "nodes", and under "merge" its "layers", each with "weights" in
        the order of the nodes.
    client_of_node : Mapping[int, int]
        Partition id of each node; node ids are drawn anew in every run.
    """
    layers = (report.get("merge") or {}).get("layers", [])
    weights = [layer["weights"] for layer in layers if layer["weights"]]
    if not weights:
        return {}
    means = [sum(column) / len(column) for column in zip(*weights, strict=True)]
    by_client = {client_of_node[node]: mean for node, mean in zip(report["nodes"], means, strict=True)}
    return dict(sorted(by_client.items()))


def _text_keys(values: Mapping[int, Any]) -> dict[str, Any]:
    return {str(key): values[key] for key in sorted(values)}
