"""Each input's rows, and what the network answers on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from fedfrom.tuning.answers import Answers
from fedfrom.tuning.network import Network, Tokens

_FIRST = 64  # every scale is tried on a third of the rows, but on at least so many


@dataclass(frozen=True)
class Data:
    """One input's rows, in the order in which they are used.

    Attributes
    ----------
    rows : str
        The file.
    tokens : Tokens
        (n,) as the model takes them.
    labels : NDArray
        (n,) classes or real numbers; zeros for language models.
    metric : str
        See `Answers`.
    """

    rows: str
    tokens: Tokens
    labels: NDArray[Any]
    metric: str

    @property
    def first(self) -> int:
        """Number of the rows on which every scale is tried."""
        return min(len(self.tokens), max(_FIRST, len(self.tokens) // 3))

    def part(self, name: str) -> slice:
        """Return the place of "all" rows, of the "first", or of the "rest"."""
        return {"all": slice(None), "first": slice(self.first), "rest": slice(self.first, None)}[name]


class Scoring:
    """A network and what it is scored on.

    Parameters
    ----------
    network : Network
        With an adapter loaded, or none.
    data : Sequence[Data]
        Each input's rows.
    causal : bool
        Of a language model: inputs of one file have one answer, as there are no heads.
    progress : Callable[[int, int], None] | None
        Called with the numbers of rows that were scored, and that are to be.
    """

    def __init__(
        self,
        network: Network,
        data: Sequence[Data],
        causal: bool,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.network, self.data, self.causal = network, data, causal
        self._progress, self._done, self._total = progress, 0, 0

    def expect(self, scales: int, methods: int) -> None:
        """Note how many scales and methods will be tried, for the progress."""
        every, first = (sum(self._sizes(part).values()) for part in ("all", "first"))
        own = sum(len(each.tokens) for each in self.data)
        halved = scales * first + max(1, scales // 2) * (every - first)
        self._total = own + (every if self.causal else 0) + methods * halved
        self._heard(0)

    @property
    def is_parted(self) -> bool:
        """Whether there are rows beside the first."""
        return any(each.first < len(each.tokens) for each in self.data)

    def answer(self, place: int, part: str = "all", head: int | None = None) -> Answers:
        """Return what the loaded adapter answers on part of an input's rows (not empty), under its head or another."""
        data = self.data[place]
        rows = data.part(part)
        outputs = self.network.answer(data.tokens[rows], place if head is None else head, self._heard)
        return Answers(data.metric, outputs, data.labels[rows])

    def answers(self, part: str = "all") -> list[Answers | None]:
        """Return `answer` of every input; None where the part is empty."""
        known: dict[object, Answers] = {}
        found: list[Answers | None] = []
        for place, data in enumerate(self.data):
            key = data.rows if self.causal else place
            if key not in known and data.tokens[data.part(part)]:
                known[key] = self.answer(place, part)
            found.append(known.get(key))
        return found

    def _sizes(self, part: str) -> dict[object, int]:
        return {
            (data.rows if self.causal else place): len(data.tokens[data.part(part)])
            for place, data in enumerate(self.data)
        }

    def _heard(self, rows: int) -> None:
        self._done += rows
        if self._progress is not None:
            self._progress(self._done, self._total)
