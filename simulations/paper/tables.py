"""The tables, as CSV and Markdown."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedfrom.pages import intervals
from simulations.paper.arena import Scores
from simulations.paper.findings import COLUMNS, MEAN, Correlation, Findings, correlate, points, values
from simulations.paper.grids import KS_FIGURE, KS_PAIRS, KS_TABLE, Row, Setting, rows
from simulations.paper.options import CHECKPOINTS, CHECKPOINTS_OF, TASKS
from simulations.tables import write_table

AGAINST = "average"
KIND_NAMES = {"lora": "LoRA adapters", "full": "full fine-tuning"}


def write_all(found: Findings, folder: Path) -> None:
    """Write every table of one kind."""
    _table_3(found, folder)
    _wilson(found, folder)
    _search(found, folder)
    _scores(found, folder)
    about = _about(found, "Table 5: Task Arithmetic by its coefficient alpha")
    _sweep(folder, f"table5-alpha-{found.kind}", "alpha", found.sweep("alpha", "coefficient"), about)
    ks = found.sweep("k", "k")
    about = _about(found, "Table 6: FroM by k")
    _sweep(folder, f"table6-k-{found.kind}", "k", {k: ks[k] for k in KS_TABLE}, about)
    about = _about(found, "Figure 5: FroM by k")
    _sweep(folder, f"figure5-k-{found.kind}", "k", {k: ks[k] for k in KS_FIGURE}, about)
    _checkpoints(found, folder)
    _interference(found, folder)


def _about(found: Findings, what: str) -> str:
    count = len(found.seeds)
    seeds = f"mean over {count} seeds with its 95 % interval" if count > 1 else "one seed"
    return f"{what}, {KIND_NAMES[found.kind]}. Accuracy on the reported half, {seeds}."


def _cells(scores: Sequence[Scores]) -> list[str]:
    return [str(intervals.mean(values(scores, column))) for column in COLUMNS]


def setting_text(setting: Setting) -> str:
    """Return a setting as it is typed."""
    return ", ".join(f"{name} {value:g}" for name, value in setting.items())


def _chosen(found: Findings, row: Row) -> str:
    counts = Counter(setting_text(search["chosen"]) for search in found.searches(row))
    return "; ".join(f"{text} (x{count})" if count > 1 else text for text, count in counts.most_common())


def against(found: Findings, row: Row) -> intervals.Interval:
    """Return a row's mean accuracy less the average's, paired by seed."""
    (other,) = (other for other in rows(found.kind) if other.name == AGAINST)
    return intervals.paired(values(found.reported(row), MEAN), values(found.reported(other), MEAN))


def table_3(found: Findings) -> list[list[str]]:
    """Return Table 3: the header, the bounds, and a row a method."""
    lines = [["method", *COLUMNS, f"mean less {AGAINST}"]]
    lines += [[name, *_cells(scores), ""] for name, scores in found.bounds().items()]
    for row in rows(found.kind):
        lines.append([row.label, *_cells(found.reported(row)), "" if row.name == AGAINST else str(against(found, row))])
    return lines


def _table_3(found: Findings, folder: Path) -> None:
    header, *lines = table_3(found)
    settings = [""] * len(found.bounds()) + [_chosen(found, row) for row in rows(found.kind)]
    lines = [[*line, setting] for line, setting in zip(lines, settings, strict=True)]
    header.append("chosen on the validation half, by seed")
    write_table(folder, f"table3-{found.kind}", header, lines, _about(found, "Table 3: every method"))


def _wilson(found: Findings, folder: Path) -> None:
    lines = []
    for name, scores in found.table().items():
        cells = []
        for task in TASKS:
            total = int(scores[0][task]["total"])
            right = round(sum(one[task]["correct"] for one in scores) / len(scores))
            low, high = intervals.proportion(right, total)
            cells.append(f"{right} of {total}: {low:.3f} to {high:.3f}")
        lines.append([name, *cells])
    about = (
        "Wilson's 95 % interval for one model with the mean number of right answers over seeds: how far so few "
        "examples reach. WNLI's dev set is adversarial to its training set, and its reported half is "
        f"{int(found.bounds()['base head'][0]['wnli']['total'])} examples."
    )
    write_table(folder, f"wilson-{found.kind}", ["method", *TASKS], lines, about)


def _search(found: Findings, folder: Path) -> None:
    lines: list[list[object]] = []
    for row in rows(found.kind):
        for seed, search in zip(found.seeds, found.searches(row), strict=True):
            for candidate in search["candidates"]:
                mark = "chosen" if candidate["setting"] == search["chosen"] else ""
                cells = [values([candidate["scores"]], column)[0] for column in COLUMNS]
                lines.append([row.name, seed, setting_text(candidate["setting"]), *cells, mark])
    about = "Accuracy on the validation half of every setting that was tried."
    write_table(folder, f"search-{found.kind}", ["method", "seed", "setting", *COLUMNS, ""], lines, about)


def _scores(found: Findings, folder: Path) -> None:
    lines: list[list[object]] = []
    for name, scores in found.table().items():
        for seed, one in zip(found.seeds, scores, strict=True):
            lines += [[name, seed, task, int(one[task]["correct"]), int(one[task]["total"])] for task in TASKS]
    about = "What Table 3 is of: right answers on the reported half, by seed."
    write_table(folder, f"scores-{found.kind}", ["method", "seed", "task", "right", "of"], lines, about)


def _sweep(folder: Path, name: str, key: str, sweep: Mapping[float, Sequence[Scores]], about: str) -> None:
    first = next(iter(sweep))
    lines = []
    for value, scores in sweep.items():
        gain = intervals.paired(values(scores, MEAN), values(sweep[first], MEAN))
        lines.append([f"{value:g}", *_cells(scores), "" if value == first else str(gain)])
    about += " These values were not chosen by, nor do they choose anything in Table 3."
    write_table(folder, name, [key, *COLUMNS, f"mean less that at {first:g}"], lines, about)


def _checkpoints(found: Findings, folder: Path) -> None:
    pieces = found.pieces("checkpoints")
    named: dict[str, list[Scores]] = {
        f"checkpoint at {share:.0%} of the steps".replace("%", " %"): [piece["alone"][number] for piece in pieces]
        for number, share in enumerate(CHECKPOINTS)
    }
    for row in rows(found.kind):
        if row.name in pieces[0]["merged"]:
            text = f"{row.label} ({setting_text(row.grid[0])})"
            named[text] = [piece["merged"][row.name] for piece in pieces]
    last = [one[CHECKPOINTS_OF]["correct"] / one[CHECKPOINTS_OF]["total"] for one in [p["alone"][-1] for p in pieces]]
    lines = []
    for name, scores in named.items():
        own = values(scores, CHECKPOINTS_OF)
        lines.append([name, str(intervals.mean(own)), str(intervals.paired(own, last))])
    about = _about(
        found, f"Figure 4: three checkpoints of {CHECKPOINTS_OF} merged, each method at one setting unsearched"
    )
    write_table(folder, f"figure4-checkpoints-{found.kind}", ["method", CHECKPOINTS_OF, "less the last"], lines, about)


def correlations(found: Findings) -> dict[tuple[str, str], Correlation | None]:
    """Return what interference and misalignment have to do with the accuracy lost: all k and each."""
    every = points(found)
    parts = {"all k": every} | {f"k = {k:g}": [point for point in every if point.k == k] for k in KS_PAIRS}
    return {
        (name, part): correlate(some, name) for name in ("interference", "misalignment") for part, some in parts.items()
    }


def _interference(found: Findings, folder: Path) -> None:
    lines: list[list[object]] = [
        [
            point.seed,
            " ".join(point.tasks),
            f"{point.k:g}",
            point.interference,
            point.misalignment,
            point.lost,
        ]
        for point in points(found)
    ]
    header = ["seed", "tasks", "k", "interference", "misalignment", "accuracy lost"]
    about = (
        "FroM's merges of two and three tasks: the share of energy lost, and the accuracy lost on the reported half."
    )
    write_table(folder, f"interference-{found.kind}", header, lines, about)
    lines = [
        [name, part, "undefined" if one is None else str(one), "" if one is None else one.count]
        for (name, part), one in correlations(found).items()
    ]
    about = "Spearman's correlation with the accuracy lost by merging; 95 % intervals by bootstrap of whole merges."
    header = ["measure", "of", "Spearman", "points"]
    write_table(folder, f"interference-correlation-{found.kind}", header, lines, about)
