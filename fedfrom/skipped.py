"""Rounds that merge nothing: how many there may be before the run is an error, and what it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from fedfrom.wire.rejections import Kind, by_kind
from fedfrom.wire.reply import Rejection

_REMEDIES = {
    "keys": "compare the clients' keys with those of initial_arrays",
    "shapes": "compare the clients' shapes, dtypes and ranks with those of initial_arrays",
    "config": "compare the clients' adapter configs with the strategy's lora_config",
    "not-finite": "look at the clients' data, or lower their learning rate",
    "too-large": "look at the clients' data, or lower their learning rate",
    "spool": "give the folder spool= room, or raise memory_budget",
}


def check_max_skipped(most: int | None) -> None:
    """Raise ValueError where the number of rounds is neither a whole number >= 1 nor None."""
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
        raise ValueError(f"max_skipped: expected a whole number of rounds >= 1 or None, found {most!r}")


@dataclass(frozen=True)
class Skipped:
    """What a run has seen so far of rounds in which replies came and every one of them was rejected.

    Attributes
    ----------
    in_a_row : int (default: 0)
        Such rounds since one in which a reply was valid. Rounds without any reply are not looked at.
    is_newest : bool (default: False)
        Whether the newest round was such a one.
    rounds : int (default: 0)
        Such rounds since one merged something.
    has_merged : bool (default: False)
        Whether any round of the run merged something.
    kinds : dict[str, Kind]
        The rejections of `rounds`, by their kind, with the newest example of each.
    failures : int (default: 0)
        Other rounds that merged nothing, though something came: too few valid replies, a merge that failed, or errors
        alone.
    failure : str (default: "")
        Why, in the newest of them.
    """

    in_a_row: int = 0
    is_newest: bool = False
    rounds: int = 0
    has_merged: bool = False
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    failures: int = 0
    failure: str = ""

    def after(self, *, merged: bool, valid: bool, rejected: Mapping[int, Rejection], failure: str = "") -> Self:
        """Return what is known after another round.

        Parameters
        ----------
        merged : bool
            Whether the round merged something.
        valid : bool
            Whether a reply was valid: one that is not merged, as too few others came, or as the merge failed, still
            ends the row, since it is not the clients' replies that can't be merged.
        rejected : Mapping[int, Rejection]
            Why which nodes' replies were rejected. Replies that are errors are not among them: a round of errors alone
            is one without replies.
        failure : str (default: "")
            Why else the round merged nothing; "" where nothing came.
        """
        if merged:
            return type(self)(has_merged=True)
        if rejected and not valid:
            kinds = dict(self.kinds)
            for kind, new in by_kind(rejected).items():
                kinds[kind] = new._replace(times=new.times + (kinds[kind].times if kind in kinds else 0))
            return replace(self, in_a_row=self.in_a_row + 1, is_newest=True, rounds=self.rounds + 1, kinds=kinds)
        after = replace(self, is_newest=False, in_a_row=0 if valid else self.in_a_row)
        return replace(after, failures=self.failures + 1, failure=failure) if failure else after

    def check(self, most: int | None, is_last: bool) -> None:
        """Raise RuntimeError where too many rounds were such: clients and server don't fit each other.

        Parameters
        ----------
        most : int | None
            How many rounds in a row may be such; None is any number.
        is_last : bool
            Whether the run has no further round. One that merged nothing, though replies came, is an error then.
        """
        if most is not None and self.is_newest and self.in_a_row >= most:
            raise RuntimeError(
                f"max_skipped: expected fewer than {most} {_rounds(most)} in a row whose replies are all rejected, "
                f"found {self.in_a_row}: {self._why()}"
            )
        if not is_last or self.has_merged:
            return
        if self.failures and not self.rounds:
            raise RuntimeError(
                f"expected at least one round that merges its replies, found none: {self.failures} "
                f"{_rounds(self.failures)} merged nothing, the last one because of: {self.failure}"
            )
        if self.rounds:
            raise RuntimeError(
                f"expected at least one round that merges a reply, found none: in {self.rounds} {_rounds(self.rounds)} "
                f"all replies were rejected: {self._why()}"
            )

    def _why(self) -> str:
        """Return the most frequent kind of rejection with its example, and what to do."""
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


def _rounds(count: int) -> str:
    return "round" if count == 1 else "rounds"
