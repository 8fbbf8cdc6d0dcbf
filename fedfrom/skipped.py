"""Rounds that merge nothing: how many of them end the run, and what the error says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from fedfrom.outcome import Outcome
from fedfrom.wire.rejections import Kind, by_kind
from fedfrom.wire.wording import num_replies

_REMEDIES = {
    "keys": "compare the clients' keys with those of initial_arrays",
    "shapes": "compare the clients' shapes, dtypes and ranks with those of initial_arrays",
    "config": "compare the clients' adapter configs with the strategy's lora_config",
    "not-finite": "look at the clients' data, or lower their learning rate",
    "too-large": "look at the clients' data, or lower their learning rate",
    "spool": "give the folder spool= room, or raise memory_budget",
}


@dataclass(frozen=True)
class Skipped:
    """The rounds of a run so far that merged nothing.

    A round counts as rejected where replies came and all of them were rejected.

    Attributes
    ----------
    in_a_row : int (default: 0)
        Rejected rounds since the last valid reply. Rounds without replies in between are ignored.
    is_newest : bool (default: False)
        Whether the newest round is a rejected one.
    rounds : int (default: 0)
        Rejected rounds since the last merge.
    has_merged : bool (default: False)
        Whether any round of the run merged something.
    kinds : dict[str, Kind]
        The rejections of those `rounds`, by kind, with the newest example of each.
    failures : int (default: 0)
        Other rounds that merged nothing: too few valid replies, a merge that failed, or errors alone.
    failure : str (default: "")
        Why the newest of these merged nothing.
    """

    in_a_row: int = 0
    is_newest: bool = False
    rounds: int = 0
    has_merged: bool = False
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    failures: int = 0
    failure: str = ""

    def after(self, outcome: Outcome, failed: Mapping[int, str]) -> Self:
        """Return the value after another round.

        Parameters
        ----------
        outcome : Outcome
            What came of the round's replies. A valid reply ends the row even where it was not merged, because the merge
            failed or too few others came: the clients' replies fit the server.
        failed : Mapping[int, str]
            Node id -> the error that it replied with. A round of errors alone neither counts as rejected nor ends the
            row.
        """
        if outcome.merge is not None:
            return type(self)(has_merged=True)
        if outcome.rejected and not outcome.valid:
            kinds = dict(self.kinds)
            for kind, new in by_kind(outcome.rejected).items():
                kinds[kind] = new._replace(times=new.times + (kinds[kind].times if kind in kinds else 0))
            return replace(self, in_a_row=self.in_a_row + 1, is_newest=True, rounds=self.rounds + 1, kinds=kinds)
        after = replace(self, is_newest=False, in_a_row=0 if outcome.valid else self.in_a_row)
        reason = outcome.reason if outcome.valid or not failed else _errors_alone(failed)
        return replace(after, failures=self.failures + 1, failure=reason) if reason else after

    def check(self, most: int | None, is_last: bool) -> None:
        """Raise RuntimeError where too many rounds were rejected: clients and server do not fit each other.

        Parameters
        ----------
        most : int | None
            Rejected rounds in a row that end the run; None is no bound.
        is_last : bool
            Whether the run has no further round. A run that merged nothing, though replies or errors came, then ends in
            an error.
        """
        if most is not None and self.is_newest and self.in_a_row >= most:
            raise RuntimeError(
                f"max_skipped: expected fewer than {most} {_rounds(most)} in a row whose replies are all rejected, "
                f"found {self.in_a_row}: {self._why()}"
            )
        if not is_last or self.has_merged:
            return
        if self.rounds:
            raise RuntimeError(
                f"expected at least one round that merges a reply, found none: in {self.rounds} {_rounds(self.rounds)} "
                f"all replies were rejected: {self._why()}"
            )
        if self.failures:
            raise RuntimeError(
                f"expected at least one round that merges its replies, found none: {self.failures} "
                f"{_rounds(self.failures)} merged nothing, the last one because of: {self.failure}"
            )

    def _why(self) -> str:
        """Return the most frequent kind of rejection with its example, and a remedy."""
        kind, (times, node_id, reason) = max(self.kinds.items(), key=lambda item: item[1].times)
        total = sum(each.times for each in self.kinds.values())
        remedy = _REMEDIES.get(kind, "correct what the clients send")
        return f"{times} of {total} for {kind!r}, such as node {node_id}'s: {reason}; {remedy}, and start again"

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and numbers."""
        return {**asdict(self), "kinds": {kind: list(found) for kind, found in self.kinds.items()}}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        """Return what `to_dict` wrote."""
        return cls(**{**saved, "kinds": {kind: Kind(*found) for kind, found in saved["kinds"].items()}})


def _errors_alone(failed: Mapping[int, str]) -> str:
    """Return the most frequent error of a round in which every reply is an error, with one node that sent it."""
    reason = Counter(failed.values()).most_common(1)[0][0]
    node_id = next(node_id for node_id, found in failed.items() if found == reason)
    return f"{num_replies(len(failed))}, errors alone, such as node {node_id}'s: {reason}"


def _rounds(count: int) -> str:
    return "round" if count == 1 else "rounds"
