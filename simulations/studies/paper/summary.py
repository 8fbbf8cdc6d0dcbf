"""All files of the study's report: tables, pictures, and results.md with settings, machine and findings."""

from collections.abc import Mapping
from pathlib import Path

from fedfrom.atomic import write_whole
from fedfrom.errors import BadInput
from fedfrom.pages import intervals
from simulations import environment
from simulations.studies.frame import Frame
from simulations.studies.paper import figures, heatmaps, tables
from simulations.studies.paper.cells import BASE, CONSTANT, POOLED
from simulations.studies.paper.findings import KIND_NAMES, OWN, Correlation, Findings, correlations
from simulations.studies.paper.grids import rows
from simulations.studies.paper.options import TASKS, PaperOptions
from simulations.studies.tables import gain, interval
from simulations.tables import markdown


def write(options: PaperOptions, frame: Frame, folder: Path) -> None:
    """Write tables, pictures and results.md for every kind with a finished seed.

    Raises
    ------
    BadInput
        No seed of any kind is finished, or the folder can't be written.
    """
    every = [Findings.of(frame, kind) for kind in options.kinds]
    every = [found for found in every if found.seeds]
    if not every:
        raise BadInput(f"--out {folder}: no seed is finished yet")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for found in every:
            tables.write_all(found, folder)
            figures.draw_all(found, folder)
            heatmaps.draw(found, folder)
        text = "\n".join(_page(options, frame, every)) + "\n"
        write_whole(folder / "results.md", text)
    except OSError as error:
        raise BadInput(f"--out {folder}: can't be written: {error}") from None


def _page(options: PaperOptions, frame: Frame, every: list[Findings]) -> list[str]:
    lines = ["# Merging QNLI, RTE and WNLI under one head", "", *_made(options, frame, every)]
    for found in every:
        lines += ["", f"## {KIND_NAMES[found.kind]}", "", *markdown(tables.table_3(found)), "", *_reading(found)]
    return [*lines, "", "Files: for each kind `lora` and `full`,", *_files()]


def _made(options: PaperOptions, frame: Frame, every: list[Findings]) -> list[str]:
    cpu, seconds = (frame.took(name) / 60 for name in ("cpu-seconds", "seconds"))
    settings = {**options.settings(), "layers": options.simulation("full", 0).kept_layers or "all"}
    seeds = ", ".join(f"{found.kind} {len(found.seeds)}" for found in every)
    total = int(every[0].bounds().query("task == 'wnli'").n.iloc[0])
    low, high = intervals.proportion(total // 2, total)
    command = environment.command("python -m simulations.studies paper")
    text = ", ".join(f"{name} {value}" for name, value in settings.items())
    return [
        f"Machine: {environment.machine()}, one thread a process. Time: {cpu:.0f} CPU minutes, {seconds:.0f} minutes "
        "by the clock.",
        f"Finished seeds: {seeds}. Settings: {text}.",
        "",
        f"Reproduce with `{command}`; it goes on with what is missing in `work/`.",
        "",
        "Every task's dev set is cut into two halves that share no example: hyperparameters are chosen on one, and "
        "every number here is from the other. Intervals are Student's, 95 %, over seeds of training; how far so few "
        "examples reach is in `wilson-*.md`. WNLI's dev set is adversarial to its training set and its half is tiny: a "
        f"model that is right half of the time comes out anywhere in {low:.2f} to {high:.2f}.",
    ]


def _reading(found: Findings) -> list[str]:
    """Return sentences that follow from the numbers alone."""
    scores = found.scores()
    means = {row.label: interval(scores, row.label).mean for row in rows(found.kind)}
    order = sorted(means, key=lambda name: -means[name])
    place = order.index("from") + 1
    lines = [f"- Best mean: {order[0]} ({means[order[0]]:.3f}); FroM is {place} of {len(order)} ({means['from']:.3f})."]
    for row in rows(found.kind):
        if row.name.startswith("from"):
            verdict = _verdict(gain(scores, row.label, tables.average(found)))
            lines.append(f"- {row.label} less the average, paired: {verdict}.")
    for name in (CONSTANT, BASE, OWN, POOLED):
        lines.append(f"- {name[0].upper()}{name[1:]}: {interval(scores, name)}.")
    found_all = correlations(found)
    for measure in dict.fromkeys(measure for measure, _ in found_all):
        parts = {part: one for (name, part), one in found_all.items() if name == measure}
        lines.append(f"- {measure[0].upper()}{measure[1:]} and accuracy lost: {predicts(parts)}.")
    return lines


def _verdict(gain: intervals.Interval) -> str:
    if gain.count < 2:
        return f"{gain.signed}, one seed, no interval"
    return f"{gain.signed}, {'settled' if gain.settled else 'not settled: the interval holds 0'}"


def predicts(parts: Mapping[str, Correlation | None]) -> str:
    """Return the verdict on a measure from its correlations over all k and at each k."""
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
        "- `table3-*`: the table above with the chosen settings; `scores-*.csv` and `search-*.csv` its scores by seed;",
        "- `table5-alpha-*`, `table6-k-*`, `figure5-k-*`: sweeps, scored on the reported half and choosing nothing;",
        "- `figure4-checkpoints-*`: three checkpoints of one training merged;",
        "- `interference-*`: what FroM's merges lose, of updates and of accuracy; `cosines-*`, `layers-*`: heat maps;",
        f"- `wilson-*`: intervals for {', '.join(task.upper() for task in TASKS)} by their numbers of examples.",
    ]
