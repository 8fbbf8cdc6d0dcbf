"""Everything that is written of the finished work, and the page that says where it was done and what it says."""

import os
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from fedfrom.pages import intervals
from simulations import training
from simulations.errors import BadInput
from simulations.paper import figures, heatmaps, tables
from simulations.paper.findings import MEAN, Correlation, Findings, chances, values
from simulations.paper.grids import rows
from simulations.paper.options import TASKS, PaperOptions
from simulations.study import Study


def write(options: PaperOptions, study: Study, folder: Path) -> None:
    """Write tables, pictures and results.md for every kind of which a seed is whole.

    Raises
    ------
    BadInput
        None is, or the folder can't be written.
    """
    every = [Findings.of(options, study, kind) for kind in options.kinds]
    every = [found for found in every if found.seeds]
    if not every:
        raise BadInput(f"--out {folder}: no seed is finished yet")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for found in every:
            tables.write_all(found, folder)
            figures.draw_all(found, folder)
            heatmaps.draw(found, folder)
        text = "\n".join(_page(options, study, every)) + "\n"
        (folder / "results.md").write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--out {folder}: can't be written: {error}") from None


def _page(options: PaperOptions, study: Study, every: list[Findings]) -> list[str]:
    lines = ["# Merging QNLI, RTE and WNLI under one head", "", *_made(options, study, every)]
    for found in every:
        lines += ["", f"## {tables.KIND_NAMES[found.kind]}", "", *_table(found), "", *_reading(found)]
    return [*lines, "", "Files: for each kind `lora` and `full`,", *_files()]


def _made(options: PaperOptions, study: Study, every: list[Findings]) -> list[str]:
    took = [result["took"] for piece in study.pieces if (result := study.get(piece)) is not None]
    cpu, seconds = (sum(one[name] for one in took) / 60 for name in ("cpu-seconds", "seconds"))
    settings = {**options.settings(), "layers": options.simulation("full", 0).kept_layers or "all"}
    where = "a GPU" if training.device().type == "cuda" else f"{training.cores()} cores of {cpu_name()}"
    seeds = ", ".join(f"{found.kind} {len(found.seeds)}" for found in every)
    low, high = chances(every[0])
    text = ", ".join(f"{name} {value}" for name, value in settings.items())
    return [
        f"Machine: {where}, one thread a process. Time: {cpu:.0f} CPU minutes, {seconds:.0f} minutes by the clock.",
        f"Finished seeds: {seeds}. Settings: {text}.",
        "",
        f"Reproduce with `{command()}`; it goes on with what is missing in `work/`.",
        "",
        "Every task's dev set is cut into two halves that share no example: hyperparameters are chosen on one, and "
        "every number here is from the other. Intervals are Student's, 95 %, over seeds of training; how far so few "
        "examples reach is in `wilson-*.md`. WNLI's dev set is adversarial to its training set and its half is tiny: a "
        f"model that is right half of the time comes out anywhere in {low:.2f} to {high:.2f}.",
    ]


def command() -> str:
    """Return the command line without what is this machine's alone."""
    dropped, kept = False, []
    for word in sys.argv[1:]:
        if dropped or word in ("--glue-dir", "--out", "--processes"):
            dropped = not dropped
        elif word != "--report":
            kept.append(shlex.quote(word))
    return " ".join(["python -m simulations.paper", *kept])


def cpu_name() -> str:
    """Return the CPU's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or os.name


def _table(found: Findings) -> list[str]:
    table = tables.table_3(found)
    return [f"| {' | '.join(row)} |" for row in [table[0], ["---"] * len(table[0]), *table[1:]]]


def _reading(found: Findings) -> list[str]:
    """Return sentences that follow from the numbers alone."""
    means = {row.label: intervals.mean(values(found.reported(row), MEAN)).mean for row in rows(found.kind)}
    order = sorted(means, key=lambda name: -means[name])
    place = order.index("from") + 1
    lines = [f"- Best mean: {order[0]} ({means[order[0]]:.3f}); FroM is {place} of {len(order)} ({means['from']:.3f})."]
    for row in rows(found.kind):
        if row.name.startswith("from"):
            lines.append(f"- {row.label} less the average, paired: {_verdict(tables.against(found, row))}.")
    bounds = {name: intervals.mean(values(scores, MEAN)) for name, scores in found.bounds().items()}
    for name in ("constant answer", "base head", "each task by its own", "all data pooled"):
        lines.append(f"- {name[0].upper()}{name[1:]}: {bounds[name]}.")
    correlations = tables.correlations(found)
    for measure in dict.fromkeys(measure for measure, _ in correlations):
        parts = {part: one for (name, part), one in correlations.items() if name == measure}
        lines.append(f"- {measure[0].upper()}{measure[1:]} and accuracy lost: {_predicts(parts)}.")
    return lines


def _verdict(gain: intervals.Interval) -> str:
    if gain.count < 2:
        return f"{gain.mean:+.3f}, one seed, no interval"
    settled = abs(gain.mean) > gain.half_width
    return f"{gain.mean:+.3f} ± {gain.half_width:.3f}, {'settled' if settled else 'not settled: the interval holds 0'}"


def _predicts(parts: Mapping[str, Correlation | None]) -> str:
    """Return what a measure's correlations, over all k and at each, come to."""
    every, *single = parts.values()
    if every is None:
        return "undefined"
    alone = "; ".join(f"{part} {one or 'undefined'}" for part, one in list(parts.items())[1:])
    told = any(one is not None and one.settled and one.rho * every.rho > 0 for one in single)
    if not every.settled:
        verdict = "it does not predict"
    elif not told:
        verdict = "they go together as k changes both, but at no k alone is that settled: it is not shown to predict"
    else:
        verdict = "it predicts" if every.rho > 0 else "it predicts the reverse"
    return f"Spearman over {every.count} merges {every} ({alone}): {verdict}"


def _files() -> list[str]:
    return [
        "- `table3-*`: the table above with the chosen settings; `scores-*.csv` and `search-*.csv` what it is of;",
        "- `table5-alpha-*`, `table6-k-*`, `figure5-k-*`: sweeps, scored on the reported half and choosing nothing;",
        "- `figure4-checkpoints-*`: three checkpoints of one training merged;",
        "- `interference-*`: what FroM's merges lose, of updates and of accuracy; `cosines-*`, `layers-*`: heat maps;",
        f"- `wilson-*`: intervals for {', '.join(task.upper() for task in TASKS)} by their numbers of examples.",
    ]
