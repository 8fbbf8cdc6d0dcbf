"""Tables and pictures of the pieces that are finished."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedfrom.pages import intervals
from fedfrom.pages.look import COLOURS, MARKERS, STYLE
from simulations.environment import machine
from simulations.federated.plan import BASELINE, BEST, GRID, POWERS, SETTINGS, Piece, Plan, accuracy, from_spec, rows
from simulations.federated.running import best
from simulations.study import Study
from simulations.tables import write_table

Results = dict[int, dict[str, Any]]  # by seed
WHO = {"dirichlet": "Dirichlet 0.5 over labels, unequal sizes", "equal": "equal-sized, labels alike"}
STUCK = 0.03  # above the untrained model's accuracy: what counts as not having learned


def write(plan: Plan, study: Study, folder: Path) -> None:
    """Write what can be said of the finished pieces: grid, comparison, curves."""
    target = plan.options.target or math.nan
    grid = {
        setting: {
            powers: _results(plan.grid_seeds, study, "grid", setting, from_spec(*powers)) for powers in GRID[setting]
        }
        for setting in SETTINGS
    }
    found = {
        setting: {row: _results(plan.seeds, study, "comparison", setting, row) for row in rows(setting)}
        for setting in SETTINGS
    }
    _write_grid(grid, folder)
    _draw_grid(grid, folder / "grid.png")
    if any(results for by_row in found.values() for results in by_row.values()):
        _write_comparison(found, target, folder)
        _draw_curves(found, folder / "curves.png")
    _write_about(plan, study, folder)


def _results(seeds: Sequence[int], study: Study, part: str, setting: str, label: str) -> Results:
    found = {seed: study.get(Piece(part, setting, seed, label).name) for seed in seeds}
    return {seed: result for seed, result in found.items() if result}


def _write_grid(grid: Mapping[str, Mapping[tuple[float, float], Results]], folder: Path) -> None:
    table = []
    for setting, by_powers in grid.items():
        for (k, p), results in by_powers.items():
            if results:
                values = [accuracy(result) for result in results.values()]
                table.append([setting, p, k, len(values), intervals.mean(values), min(values), _stuck(results)])
    header = ["clients", "p", "k", "seeds", "accuracy", "worst seed", "stuck"]
    about = "Accuracy, mean of the last three rounds; ± is half a 95 % interval over seeds."
    write_table(folder, "grid", header, table, about)


def _stuck(results: Results) -> int:
    return sum(accuracy(result) < result["accuracy"][0] + STUCK for result in results.values())


def _write_comparison(found: Mapping[str, Mapping[str, Results]], target: float, folder: Path) -> None:
    table = []
    for setting, by_row in found.items():
        for row, results in by_row.items():
            if not results:
                continue
            shared = sorted(results.keys() & by_row[BASELINE].keys())
            values = [accuracy(result) for result in results.values()]
            ahead = intervals.paired(
                [accuracy(results[seed]) for seed in shared], [accuracy(by_row[BASELINE][seed]) for seed in shared]
            )
            reached = [rounds_to(result["accuracy"], target) for result in results.values()]
            table.append(
                [
                    setting,
                    row,
                    next(iter(results.values()))["spec"],
                    len(values),
                    intervals.mean(values),
                    "" if row == BASELINE else f"{ahead.mean:+.3f} ± {ahead.half_width:.3f}",
                    min(values),
                    _stuck(results),
                    " ".join("-" if number is None else str(number) for number in reached),
                    f"{np.mean([result['bytes-up'] for result in results.values()]) / 1e6:.1f}",
                    _mean_of(results, "distance-from-mean"),
                    _mean_of(results, "lambda-max"),
                    _mean_of(results, "k"),
                ]
            )
    header = [
        "clients",
        "strategy",
        "spec",
        "seeds",
        "accuracy",
        "ahead of FedAvg",
        "worst seed",
        "stuck",
        f"rounds to {target:g}",
        "MB up",
        "distance from the mean",
        "λ_max",
        "k",
    ]
    about = (
        "Accuracy, mean of the last three rounds; ± is half a 95 % interval over seeds, of the paired difference where "
        "FedAvg is subtracted. Rounds to the target by seed, - for never. Distance from the mean: "
        "‖merged − mean of products‖ / ‖mean of products − global‖, mean over rounds. λ_max: the layers' largest, mean "
        "over rounds."
    )
    write_table(folder, "comparison", header, table, about)


def rounds_to(curve: Sequence[float], target: float) -> int | None:
    """Return the first round that reaches the target, None if none does."""
    return next((number for number, value in enumerate(curve) if value >= target), None)


def _mean_of(results: Results, name: str) -> str:
    values = [value for result in results.values() for value in result[name] if value is not None]
    return f"{np.mean(values):.2f}" if values else ""


def _draw_grid(grid: Mapping[str, Mapping[tuple[float, float], Results]], path: Path) -> None:
    """Draw the accuracy of each p and k, every seed a dot."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(grid), figsize=(10.5, 4.2), dpi=150, layout="constrained", sharey=True)
        for plot, (setting, by_powers) in zip(axes, grid.items(), strict=True):
            powers = sorted({p for _, p in by_powers})
            for position, p in enumerate(powers):
                shift = (position - (len(powers) - 1) / 2) * 0.06
                label = f"p = {p:g}" if len(powers) > 1 else "any p"
                _draw_seeds(plot, [(k + shift, by_powers[k, p]) for k in POWERS], position, label)
            plot.set_title(WHO[setting])
            plot.set_xlabel("k, power of the norm")
            plot.set_xticks(POWERS)
            plot.legend(loc="lower left")
        axes[0].set_ylabel("accuracy, mean of the last three rounds")
        axes[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        figure.savefig(path)
        plt.close(figure)


def _draw_seeds(plot: Axes, points: Sequence[tuple[float, Results]], position: int, label: str) -> None:
    colour, marker = COLOURS[position], MARKERS[position]
    means = []
    for x, results in points:
        values = [accuracy(result) for result in results.values()]
        plot.scatter([x] * len(values), values, color=colour, marker=marker, s=18, alpha=0.45)
        means.append(float(np.mean(values)) if values else math.nan)
    plot.plot([x for x, _ in points], means, color=colour, marker=marker, linewidth=2, label=label)


def _draw_curves(found: Mapping[str, Mapping[str, Results]], path: Path) -> None:
    """Draw the accuracy by round of each strategy: the mean over seeds, and below how far ahead of FedAvg it is."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, len(found), figsize=(11.5, 7.4), dpi=150, layout="constrained", sharey="row")
        order = list(dict.fromkeys(row for by_row in found.values() for row in by_row))
        for column, (setting, by_row) in enumerate(found.items()):
            for row, results in by_row.items():
                look = {"color": COLOURS[order.index(row)], "marker": MARKERS[order.index(row)]}
                if results:
                    curves = [result["accuracy"] for result in results.values()]
                    _draw_mean(axes[0, column], intervals.mean, zip(*curves, strict=True), look, row, band=False)
                shared = sorted(results.keys() & by_row[BASELINE].keys())
                if row != BASELINE and shared:
                    gains = [
                        [a - b for a, b in zip(results[s]["accuracy"], by_row[BASELINE][s]["accuracy"], strict=True)]
                        for s in shared
                    ]
                    _draw_mean(axes[1, column], intervals.mean, zip(*gains, strict=True), look, row, band=True)
            axes[0, column].set_title(f"{WHO[setting]}: mean over seeds")
            axes[1, column].set_title("Ahead of FedAvg on factors, 95 % intervals")
            axes[1, column].axhline(0, color="#555555", linewidth=1)
            axes[1, column].set_xlabel("round")
            for plot in axes[:, column]:
                plot.xaxis.set_major_locator(MaxNLocator(integer=True))
                plot.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes[0, 0].set_ylabel("accuracy on held-out data")
        axes[1, 0].set_ylabel("difference in accuracy")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        figure.savefig(path)
        plt.close(figure)


def _draw_mean(
    plot: Axes, mean: Callable[[Sequence[float]], intervals.Interval], columns: Any, look: dict, label: str, band: bool
) -> None:
    found = [mean(list(values)) for values in columns]
    offset = MARKERS.index(look["marker"]) * 0.06 - 0.18 if band else 0.0
    places = [number + offset for number in range(len(found))]
    means = [value.mean for value in found]
    plot.plot(places, means, linewidth=1.8, markersize=4, label=label, **look)
    if band and found[0].count > 1:
        errors = [value.half_width for value in found]
        plot.errorbar(places, means, errors, fmt="none", ecolor=look["color"], elinewidth=0.8, alpha=0.6)


def _write_about(plan: Plan, study: Study, folder: Path) -> None:
    done = [result for name in study.pieces if (result := study.get(name))]
    hours = sum(result["seconds"] for result in done) / 3600
    complete = len(done) == len(study.pieces)
    chosen = best(plan, study) if not [name for name in study.missing() if name.startswith("grid")] else "not known yet"
    options = plan.options
    lines = [
        "# FedFroM's powers p and k on SST-2",
        "",
        f"{BEST}: `{chosen}`. Tables: [grid](grid.md), [comparison](comparison.md). Pictures: grid.png, curves.png.",
        "",
        f"- {options.clients} clients, {options.rounds} rounds of {options.steps} steps of {options.batch_size} "
        f"examples, AdamW at {options.learning_rate:g}; {options.model}, {options.kept_layers or 'all'} layers, "
        f"LoRA r = {options.lora_r}; accuracy on {options.eval_examples} held-out examples; k=auto chooses on "
        f"{options.validation_examples} others.",
        f"- Seeds of the grid: {', '.join(map(str, plan.grid_seeds))}; of the comparison: "
        f"{', '.join(map(str, plan.seeds))}. A seed fixes partition, initial weights, batches and examples.",
        f"- {len(done)} of {len(study.pieces)} runs{'' if complete else ' (not complete)'}, {hours:.1f} hours of "
        f"rounds on {machine()}, beside other work.",
        "- Again: `python -m simulations.federated --glue-dir GLUE`, with GLUE's TSV files in GLUE/SST-2.",
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
