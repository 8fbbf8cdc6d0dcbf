"""The study's tables, as CSV and Markdown."""

from pathlib import Path

import pandas as pd

from fedfrom.pages import intervals
from simulations.studies.paper.data import VALIDATION
from simulations.studies.paper.findings import COLUMNS, KIND_NAMES, Findings, correlations, points
from simulations.studies.paper.grids import KS_FIGURE, KS_TABLE, rows
from simulations.studies.paper.options import CHECKPOINTS, CHECKPOINTS_OF, TASKS
from simulations.studies.tables import by_seed, gain, means
from simulations.tables import write_table

AGAINST = "average"


def write_all(found: Findings, folder: Path) -> None:
    """Write every table of one kind."""
    for table in (_table_3, _wilson, _search, _scores, _checkpoints, _interference, _correlation):
        name, frame, about = table(found)
        write_table(folder, f"{name}-{found.kind}", frame, about)
    for name, part, column, values, title in (
        ("table5-alpha", "alpha", "alpha", None, "Table 5: Task Arithmetic by its coefficient alpha"),
        ("table6-k", "k", "k", KS_TABLE, "Table 6: FroM by k"),
        ("figure5-k", "k", "k", KS_FIGURE, "Figure 5: FroM by k"),
    ):
        write_table(folder, f"{name}-{found.kind}", _sweep(found, part, column, values), _about_sweep(found, title))


def average(found: Findings) -> str:
    """Return the label of the average's row, with which the other methods are compared."""
    return next(row.label for row in rows(found.kind) if row.name == AGAINST)


def table_3(found: Findings) -> pd.DataFrame:
    """Return Table 3: a row for each bound and method."""
    scores, other = found.scores(), average(found)
    methods = {row.label for row in rows(found.kind)} - {other}
    table = means(scores).rename_axis("method").reset_index()
    gains = {label: str(gain(scores, label, other)) for label in methods}
    return table.assign(**{f"mean less {AGAINST}": table["method"].map(gains).fillna("")})


def _about(found: Findings, what: str) -> str:
    count = len(found.seeds)
    seeds = f"mean over {count} seeds with its 95 % interval" if count > 1 else "one seed"
    return f"{what}, {KIND_NAMES[found.kind]}. Accuracy on the reported half, {seeds}."


def _table_3(found: Findings) -> tuple[str, pd.DataFrame, str]:
    chosen = found.part("search").drop_duplicates(["method", "seed"]).groupby("method").setting
    counts = chosen.agg(
        lambda texts: "; ".join(f"{text} (x{n})" if n > 1 else text for text, n in texts.value_counts().items())
    )
    table = table_3(found)
    table["chosen on the validation half, by seed"] = table["method"].map(counts).fillna("")
    return "table3", table, _about(found, "Table 3: every method")


def _wilson(found: Findings) -> tuple[str, pd.DataFrame, str]:
    def bounds(scores: pd.DataFrame) -> str:
        total = int(scores.n.iloc[0])
        right = round(float((scores.score * scores.n).mean()))
        low, high = intervals.proportion(right, total)
        return f"{right} of {total}: {low:.3f} to {high:.3f}"

    every = found.table()
    texts = {key: bounds(one) for key, one in every.groupby(["method", "task"])}
    lines = [[method, *(texts[method, task] for task in TASKS)] for method in every.method.unique()]
    about = (
        "Wilson's 95 % interval for one model with the mean number of right answers over seeds: how far so few "
        "examples reach. WNLI's dev set is adversarial to its training set, and its reported half is "
        f"{int(every[every.task == 'wnli'].n.iloc[0])} examples."
    )
    return "wilson", pd.DataFrame(lines, columns=["method", *TASKS]), about


def _search(found: Findings) -> tuple[str, pd.DataFrame, str]:
    tried = found.part("search", VALIDATION)
    best = {(row.method, row.seed): row.setting for row in found.part("search").itertuples()}
    parts = []
    for (method, seed), one in tried.groupby(["method", "seed"], sort=False):
        scores = by_seed(one, "setting", TASKS).reset_index()
        marks = ["chosen" if text == best[method, seed] else "" for text in scores.setting]
        scores.insert(0, "method", method.partition(" = ")[0])
        parts.append(scores.assign(**{"": marks}))
    order = [row.name for row in rows(found.kind)]
    table = pd.concat(parts)[["method", "seed", "setting", *COLUMNS, ""]]
    table = table.sort_values("method", key=lambda names: names.map(order.index), kind="stable")
    return "search", table, "Accuracy on the validation half of every setting that was tried."


def _scores(found: Findings) -> tuple[str, pd.DataFrame, str]:
    every = found.table()
    right = (every.score * every.n).round().astype(int)
    table = every.assign(right=right, of=every.n.astype(int))
    order = {name: number for number, name in enumerate(every.method.unique())}
    table = table.assign(at=table.method.map(order), task_at=table.task.map(TASKS.index))
    table = table.sort_values(["at", "seed", "task_at"])[["method", "seed", "task", "right", "of"]]
    return "scores", table, "The right answers behind Table 3: on the reported half, by seed."


def _sweep(found: Findings, part: str, column: str, values: tuple[float, ...] | None) -> pd.DataFrame:
    scores = found.sweep(part)
    values = values or tuple(scores.index.unique(level=0))
    table = means(scores).loc[list(values)]
    table.insert(0, column, [f"{value:g}" for value in values])
    first = values[0]
    gains = ["" if value == first else str(gain(scores, value, first)) for value in values]
    return table.assign(**{f"mean less that at {first:g}": gains})


def _about_sweep(found: Findings, title: str) -> str:
    return f"{_about(found, title)} These values were not chosen by, nor do they choose anything in Table 3."


def _checkpoints(found: Findings) -> tuple[str, pd.DataFrame, str]:
    every = found.part("checkpoints")
    scores = by_seed(every, "method", (CHECKPOINTS_OF,))
    names = list(every.method.unique())
    settings = every.drop_duplicates("method").set_index("method").setting
    last = names[len(CHECKPOINTS) - 1]
    table = pd.DataFrame(
        {
            "method": [f"{name} ({settings[name]})" if settings[name] else name for name in names],
            CHECKPOINTS_OF: means(scores)[CHECKPOINTS_OF].loc[names].tolist(),
            "less the last": [str(gain(scores, name, last)) for name in names],
        }
    )
    title = f"Figure 4: three checkpoints of {CHECKPOINTS_OF} merged, each method at one setting unsearched"
    return "figure4-checkpoints", table, _about(found, title)


def _interference(found: Findings) -> tuple[str, pd.DataFrame, str]:
    lines = [
        [point.seed, " ".join(point.tasks), f"{point.k:g}", point.interference, point.misalignment, point.lost]
        for point in points(found)
    ]
    columns = ["seed", "tasks", "k", "interference", "misalignment", "accuracy lost"]
    about = (
        "FroM's merges of two and three tasks: the share of energy lost, and the accuracy lost on the reported half."
    )
    return "interference", pd.DataFrame(lines, columns=columns), about


def _correlation(found: Findings) -> tuple[str, pd.DataFrame, str]:
    lines = [
        [name, part, "undefined" if one is None else str(one), "" if one is None else one.count]
        for (name, part), one in correlations(found).items()
    ]
    about = "Spearman's correlation with the accuracy lost by merging; 95 % intervals by bootstrap of whole merges."
    table = pd.DataFrame(lines, columns=["measure", "of", "Spearman", "points"])
    return "interference-correlation", table, about
