"""The sentence at the top of a page: final scores, differences that the seeds settle, and lost replies."""

from collections.abc import Sequence

from fedfrom.pages import charts
from fedfrom.pages.groups import Group, Line, against
from fedfrom.pages.intervals import Interval, proportion
from fedfrom.pages.look import shown
from fedfrom.pages.parts import reference, with_interval


def summary(groups: Sequence[Group], lines: Sequence[Line]) -> str:
    """Return the sentence at the top of the page.

    It names a difference only where the paired 95 % interval over seeds excludes 0; with one seed there is none.
    """
    if len(groups) > 1:
        return _several(groups, lines)
    group, run = groups[0], groups[0].runs[0]
    unit = charts.unit_of(run)
    finals = [(line, line.mean(lambda entry: entry["final"])) for line in lines]
    scored = [(line, found) for line, found in finals if found is not None]
    if not scored:
        return f"{_runs(group)} ended without a score.".capitalize()
    rounds = max((entry["rounds"][-1] for line in lines for entry in line.entries if entry["rounds"]), default=0)
    said = _and([f"{line.name} at {with_interval(found, unit)}" for line, found in scored])
    constant = run["constant-answer"]
    beside = f" (a constant answer: {shown(constant, unit)})" if constant is not None else ""
    metric = f" {run['metric']}" if len(run["metric"]) < 40 else ""
    text = f"After {rounds} round{'s' * (rounds != 1)}{_over(group)}, {said}{metric}{beside}"
    return f"{text}{_verdicts(group, scored)}; {_lost(groups)}."


def _runs(group: Group) -> str:
    return "one run" if len(group.runs) == 1 else f"{len(group.runs)} runs"


def _over(group: Group) -> str:
    if len(group.runs) == 1:
        return " of one run"
    seeds = [shown(run["seed"], "count") for run in group.runs]
    return f" of {len(group.runs)} runs (seeds {', '.join(seeds)})"


def _and(parts: Sequence[str]) -> str:
    if len(parts) > 4:
        parts = [*parts[:3], f"{len(parts) - 3} more (see the table)"]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _verdicts(group: Group, scored: Sequence[tuple[Line, Interval]]) -> str:
    if len(scored) < 2:
        return ""
    if len(group.runs) == 1:
        return f": one seed can't tell which is better{_by_examples(scored[0][0])}"
    unit = charts.unit_of(group.runs[0])
    other = next((line for line, _ in scored if line.label == reference(group)), scored[0][0])
    apart, alike = [], []
    for line, _ in scored:
        found = None if line is other else against(line, other)
        if found is None:
            continue
        if found.settled:
            way = "ahead of" if found.mean > 0 else "behind"
            apart.append(f"{line.name} is {with_interval(found, unit, sign=True).lstrip('+-')} {way} {other.name}")
        else:
            alike.append(f"{line.name} ({with_interval(found, unit, sign=True)})")
    if alike:
        apart.append(
            f"{_and(alike)} {'is' if len(alike) == 1 else 'are'} not told apart from {other.name} by these seeds"
        )
    return f": {', '.join(apart)}" if apart else ""


def _by_examples(line: Line) -> str:
    """Return the clause on the half-width of Wilson's interval, which the number of held-out examples determines."""
    run = line.group.runs[0]
    final = line.entries[0]["final"]
    if len(run["tasks"]) != 1 or run["tasks"][0]["metric"] != "accuracy" or final is None or not 0 <= final <= 1:
        return ""
    total = run["tasks"][0]["held-out-examples"]
    if not total or total < 1 or total != int(total):
        return ""
    low, high = proportion(round(final * total), int(total))
    return f", and {total:,.0f} held-out examples alone leave each ± {50 * (high - low):.1f} points"


def _several(groups: Sequence[Group], lines: Sequence[Line]) -> str:
    count = sum(len(group.runs) for group in groups)
    start = f"{count} runs of {len(groups)} settings"
    metrics = {(group.runs[0]["metric"], charts.unit_of(group.runs[0])) for group in groups}
    finals = [(line, line.mean(lambda entry: entry["final"])) for line in lines]
    scored = [(line, found) for line, found in finals if found is not None]
    if len(metrics) > 1:
        return f"{start} with {len(metrics)} different metrics, which can't be ranked together; {_lost(groups)}."
    if not scored:
        return f"{start} ended without a score; {_lost(groups)}."
    unit = next(iter(metrics))[1]
    best, worst = max(scored, key=lambda pair: pair[1].mean), min(scored, key=lambda pair: pair[1].mean)
    ends = [f"from {with_interval(found, unit)} ({line.name})" for line, found in (worst, best)]
    text = f"{start}: the final score goes {ends[0]} {ends[1].replace('from', 'to', 1)}"
    if any(len(group.runs) < 2 for group in groups):
        text += ", where a single seed can't tell which is better"
    return f"{text}; {_lost(groups)}."


def _lost(groups: Sequence[Group]) -> str:
    replies = [
        reply for group in groups for run in group.runs for entry in run["strategies"] for reply in entry["replies"]
    ]
    merged = sum(reply["merged"] for reply in replies)
    lost = sum(len(reply["rejected"]) + len(reply["failed"]) + len(reply["missing"]) for reply in replies)
    skipped = sum(reply["skipped"] for reply in replies)
    if not replies:
        return "what became of the replies is not reported"
    if not lost and not skipped:
        return f"all {merged:,} reported replies were merged"
    rounds = f" and {skipped:,} round{'s' * (skipped != 1)} skipped" if skipped else ""
    return f"{lost:,} of {lost + merged:,} reported replies were lost{rounds}"
