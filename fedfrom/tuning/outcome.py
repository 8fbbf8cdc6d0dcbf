"""What tuning found, as tables, sentences, a section of the model card, and JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from fedfrom.files.card import cell
from fedfrom.files.heads import FOLDER
from fedfrom.tuning.answers import LOSS, Answers
from fedfrom.tuning.candidates import AVERAGE, Candidate
from fedfrom.tuning.choice import Difference, Input


@dataclass(frozen=True)
class Tried:
    """One method at its best scale.

    Attributes
    ----------
    candidate : Candidate
        The method.
    scale : float
        The scale.
    share : float
        The mean share that it keeps.
    answers : Sequence[Answers]
        What it answers, by input.
    trials : list[dict[str, Any]]
        Each scale that was tried: see `halving.halved`.
    """

    candidate: Candidate
    scale: float
    share: float
    answers: Sequence[Answers]
    trials: list[dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What tuning found.

    Attributes
    ----------
    inputs : Sequence[Input]
        The inputs as they were.
    tried : Sequence[Tried]
        Each method; the average comes first.
    best : Tried
        What is taken.
    gain : Difference
        Its mean share less the average's.
    refit : bool
        Whether biases were fitted anew.
    has_heads : bool
        Whether each input has a head of its own.
    heads_agree : bool
        Whether OUT has a merged head too.
    whole : float | None
        Score of OUT itself, under the merged head, where all inputs have the same rows.
    """

    inputs: Sequence[Input]
    tried: Sequence[Tried]
    best: Tried
    gain: Difference
    refit: bool
    has_heads: bool
    heads_agree: bool
    whole: float | None = None

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """One row an input: name, rows, metric, own, constant answer, merged, share kept."""
        found: list[tuple[str, ...]] = []
        for known, answers in zip(self.inputs, self.best.answers, strict=True):
            score = answers.score(answers.bias() if self.refit else None)
            kept = f"{known.share(score):.3f}" if known.is_counted else "left out"
            scores = (known.shown(known.own), known.shown(known.constant), known.shown(score))
            found.append((known.name, str(known.count), known.metric, *scores, kept))
        return found

    @property
    def titles(self) -> tuple[str, ...]:
        nothing = "base model" if self.inputs[0].metric == LOSS else "constant answer"
        merged = "merged, bias refitted" if self.refit else "merged"
        return "input", "rows", "score", "own adapter", nothing, merged, "share kept"

    def tables(self) -> Iterator[Table]:
        """Yield a table of the inputs and one of the methods."""
        table = Table(title="What each input keeps", title_justify="left", title_style="bold")
        for place, title in enumerate(self.titles):
            table.add_column(title, justify="left" if place in (0, 2) else "right", overflow="fold")
        for row in self.rows:
            table.add_row(Text(row[0]), *row[1:])
        yield table
        table = Table(title="Methods, each at its best scale", title_justify="left", title_style="bold")
        table.add_column("method")
        table.add_column("scale", justify="right")
        table.add_column("mean share kept", justify="right")
        for each in self.tried:
            table.add_row(Text(str(each.candidate)), f"{each.scale:g}", f"{each.share:.3f}")
        yield table

    def sentences(self) -> list[str]:
        """Return what was chosen, how the average compares, what was left out, and what the scores are worth."""
        scales = len({trial["scale"] for trial in self.best.trials})
        among = f"{len(self.tried)} method{'s' * (len(self.tried) > 1)} and {scales} scale{'s' * (scales > 1)} tried"
        found = [f"Chosen: {self.best.candidate} at scale {self.best.scale:g}, {among}. {self._average()}"]
        if left := [known.name for known in self.inputs if not known.is_counted]:
            than = "the base model" if self.inputs[0].metric == LOSS else "a constant answer"
            own = "own adapter is" if len(left) == 1 else "own adapters are"
            found.append(f"Left out of the mean: {', '.join(left)}, whose {own} not better than {than} on these rows.")
        found.append("Scores are on the rows that were tuned on: expect a little less on others.")
        if self.has_heads:
            beside = "The heads differ in names or shapes, so OUT itself has the merged body alone."
            if self.heads_agree:
                scored = (
                    "which these scores don't use"
                    if self.whole is None
                    else f"and scores {self.inputs[0].shown(self.whole)} on these rows"
                )
                beside = f"OUT itself has the inputs' heads merged into one, {scored}."
            found.append(
                f"{FOLDER}/ has an adapter for each input: the merged body with the input's own head. {beside}"
            )
        return found

    def _average(self) -> str:
        """Return how the average, at its best scale, compares."""
        average = self.tried[0]
        if average is self.best:
            others = len(self.tried) - 1
            return f"No other method keeps more than the scaled average, {average.share:.3f}." if others else ""
        at = f"the average at scale {average.scale:g}"
        paired = f"the difference's standard error, paired by row, is {self.gain.error:.3f}"
        if self.gain.is_within_error:
            return (
                f"The scaled average is as good: it keeps {average.share:.3f} against {self.best.share:.3f}, and "
                f"{paired} (--method {AVERAGE} --server-lr {average.scale:g})."
            )
        if self.gain.value < 0:
            return f"It keeps {-self.gain.value:.3f} less than {at}; {paired}: --method {AVERAGE} is better."
        return f"It keeps {self.gain.value:.3f} more than {at}; {paired}."

    def card(self) -> str:
        """Return a section of the model card."""
        lines = ["## Tuned", "", "| " + " | ".join(self.titles) + " |", "|" + "---|" * len(self.titles)]
        lines += ["| " + " | ".join(cell(each) for each in row) + " |" for row in self.rows]
        for sentence in self.sentences():
            lines += ["", cell(sentence, most=5000)]
        return "\n".join(lines) + "\n"

    def record(self) -> dict[str, Any]:
        """Return all of it as JSON has it; what is not finite is None."""
        inputs = [
            {
                "name": known.name,
                "rows": known.rows,
                "count": known.count,
                "metric": known.metric,
                "own": _finite(known.own),
                "constant": _finite(known.constant),
                "merged": _finite(score := answers.score(answers.bias() if self.refit else None)),
                "share": _finite(known.share(score)) if known.is_counted else None,
            }
            for known, answers in zip(self.inputs, self.best.answers, strict=True)
        ]
        tried = [
            {
                "method": each.candidate.name,
                "options": dict(each.candidate.options),
                "scale": each.scale,
                "share": _finite(each.share),
                "trials": [{**trial, "merit": _finite(trial["merit"])} for trial in each.trials],
            }
            for each in self.tried
        ]
        return {
            "inputs": inputs,
            "methods": tried,
            "chosen": self.tried.index(self.best),
            "less the average": {"difference": _finite(self.gain.value), "standard error": self.gain.error},
            "refit-bias": self.refit,
            "merged head": None if self.whole is None else _finite(self.whole),
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
