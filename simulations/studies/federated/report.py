"""Tables and pictures of the study's frame."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedfrom.atomic import whole_file, write_whole
from fedfrom.pages import intervals
from fedfrom.pages.look import COLOURS, MARKERS, STYLE
from simulations.environment import command, machine
from simulations.studies.federated.options import FederatedOptions
from simulations.studies.federated.plan import BASELINE, BEST, GRID, POWERS, ROWS, SETTINGS, best, final, from_spec
from simulations.studies.frame import Frame
from simulations.studies.tables import MEAN, gain, write

WHO = {"dirichlet": "Dirichlet 0.5 over labels, unequal sizes", "equal": "equal-sized, labels alike"}
STUCK = 0.03  # above the untrained model's accuracy: what counts as not having learned


def write_report(options: FederatedOptions, frame: Frame, folder: Path) -> None:
    """Write what can be said of the cells that are there: grid, comparison, curves."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = frame.rows()
    grid, comparison = rows[rows["part"] == "grid"], rows[rows["part"] == "comparison"]
    if len(grid):
        about = "Accuracy, mean of the last three rounds; ± is half a 95 % interval over seeds."
        write(folder, "grid", grid_table(grid), about)
        _draw_grid(grid, folder / "grid.png")
    if len(comparison):
        write(folder, "comparison", comparison_table(comparison, options.target), ABOUT)
        _draw_curves(comparison, folder / "curves.png")
    _write_about(options, frame, folder)


ABOUT = (
    "Accuracy, mean of the last three rounds; ± is half a 95 % interval over seeds, of the paired difference where "
    "FedAvg is subtracted. Rounds to the target by seed, - for never. Distance from the mean: "
    "‖merged − mean of products‖ / ‖mean of products − global‖, mean over rounds. λ_max: the layers' largest, mean "
    "over rounds."
)


def _scores(rows: pd.DataFrame, setting: str) -> pd.DataFrame:
    """Return the accuracies that are compared on one kind of clients, by method and seed."""
    found = final(rows[rows["kind"] == setting])
    return found.set_index(["method", "seed"])[["score"]].rename(columns={"score": MEAN})


def _stuck(rows: pd.DataFrame) -> int:
    start = rows[rows["round"] == 0].set_index("seed")["score"]
    return int((final(rows).set_index("seed")["score"] < start + STUCK).sum())


def grid_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a line for each kind of clients, p and k."""
    lines = []
    for setting in SETTINGS:
        for k, p in GRID[setting]:
            own = rows[(rows["kind"] == setting) & (rows["method"] == from_spec(k, p))]
            if len(own):
                values = final(own)["score"].tolist()
                lines.append([setting, p, k, len(values), str(intervals.mean(values)), min(values), _stuck(own)])
    return pd.DataFrame(lines, columns=["clients", "p", "k", "seeds", "accuracy", "worst seed", "stuck"], dtype=object)


def comparison_table(rows: pd.DataFrame, target: float) -> pd.DataFrame:
    """Return a line for each kind of clients and strategy."""
    lines = []
    for (setting, row), own in rows.groupby(["kind", "method"], sort=False):
        scores = _scores(rows, setting)
        values = scores.loc[row, MEAN].tolist()
        there = row != BASELINE and BASELINE in scores.index.unique(level=0)
        shared = there and len(scores.loc[row].index.intersection(scores.loc[BASELINE].index))
        ahead = gain(scores, row, BASELINE) if shared else None
        trained = own[own["round"] > 0]
        lines.append(
            {
                "clients": setting,
                "strategy": row,
                "spec": own["setting"].iloc[0],
                "seeds": len(values),
                "accuracy": str(intervals.mean(values)),
                "ahead of FedAvg": "" if ahead is None else f"{ahead.mean:+.3f} ± {ahead.half_width:.3f}",
                "worst seed": min(values),
                "stuck": _stuck(own),
                f"rounds to {target:g}": " ".join(rounds_to(own, target)),
                "MB up": f"{own.groupby('seed')['bytes_up'].sum().mean() / 1e6:.1f}",
                "distance from the mean": _mean(trained["distance_from_mean"]),
                "λ_max": _mean(trained["lambda_max"]),
                "k": _mean(trained["k"]),
            }
        )
    return pd.DataFrame(lines, dtype=object)


def rounds_to(rows: pd.DataFrame, target: float) -> list[str]:
    """Return the first round of each seed that reaches the target, "-" where none does."""
    reached = rows[rows["score"] >= target].groupby("seed")["round"].min()
    return [str(int(reached[seed])) if seed in reached.index else "-" for seed in rows["seed"].unique()]


def _mean(values: pd.Series) -> str:
    known = values.dropna().astype(float)
    return f"{known.mean():.2f}" if len(known) else ""


def _draw_grid(rows: pd.DataFrame, path: Path) -> None:
    """Draw the accuracy of each p and k, every seed a dot."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(GRID), figsize=(10.5, 4.2), dpi=150, layout="constrained", sharey=True)
        for plot, setting in zip(axes, GRID, strict=True):
            scores = _scores(rows, setting)[MEAN]
            powers = sorted({p for _, p in GRID[setting]})
            for position, p in enumerate(powers):
                shift = (position - (len(powers) - 1) / 2) * 0.06
                label = f"p = {p:g}" if len(powers) > 1 else "any p"
                points = [
                    (k + shift, scores[scores.index.get_level_values(0) == from_spec(k, p)].tolist()) for k in POWERS
                ]
                _draw_seeds(plot, points, position, label)
            plot.set_title(WHO[setting])
            plot.set_xlabel("k, power of the norm")
            plot.set_xticks(POWERS)
            plot.legend(loc="lower left")
        axes[0].set_ylabel("accuracy, mean of the last three rounds")
        axes[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        with whole_file(path) as hidden:
            figure.savefig(hidden)
        plt.close(figure)


def _draw_seeds(plot: Axes, points: Sequence[tuple[float, list[float]]], position: int, label: str) -> None:
    colour, marker = COLOURS[position], MARKERS[position]
    for x, values in points:
        plot.scatter([x] * len(values), values, color=colour, marker=marker, s=18, alpha=0.45)
    means = [float(np.mean(values)) if values else np.nan for _, values in points]
    plot.plot([x for x, _ in points], means, color=colour, marker=marker, linewidth=2, label=label)


def _draw_curves(rows: pd.DataFrame, path: Path) -> None:
    """Draw the accuracy by round of each strategy: the mean over seeds, and below how far ahead of FedAvg it is."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, len(SETTINGS), figsize=(11.5, 7.4), dpi=150, layout="constrained", sharey="row")
        for column, setting in enumerate(SETTINGS):
            curves = rows[rows["kind"] == setting].pivot(index=["method", "seed"], columns="round", values="score")
            there = curves.index.unique(level=0)
            for number, row in enumerate(ROWS):
                look = {"color": COLOURS[number], "marker": MARKERS[number]}
                if row not in there:
                    continue
                _draw_mean(axes[0, column], curves.loc[row], look, row, band=False)
                gains = (curves.loc[row] - curves.loc[BASELINE]).dropna() if BASELINE in there else curves.loc[row][:0]
                if row != BASELINE and len(gains):
                    _draw_mean(axes[1, column], gains, look, row, band=True)
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
        with whole_file(path) as hidden:
            figure.savefig(hidden)
        plt.close(figure)


def _draw_mean(plot: Axes, curves: pd.DataFrame, look: dict[str, Any], label: str, band: bool) -> None:
    """Draw the mean by round of curves, a row a seed."""
    found = [intervals.mean(curves[number].tolist()) for number in curves.columns]
    offset = MARKERS.index(look["marker"]) * 0.06 - 0.18 if band else 0.0
    places = [number + offset for number in curves.columns]
    means = [value.mean for value in found]
    plot.plot(places, means, linewidth=1.8, markersize=4, label=label, **look)
    if band and len(curves) > 1:
        errors = [value.half_width for value in found]
        plot.errorbar(places, means, errors, fmt="none", ecolor=look["color"], elinewidth=0.8, alpha=0.6)


def _write_about(options: FederatedOptions, frame: Frame, folder: Path) -> None:
    missing, cells, rows = frame.missing(), frame.study.cells, frame.rows()
    hours = rows["seconds"].sum() / 3600
    chosen = "not known yet" if any(cell.part == "grid" for cell in missing) else best(rows)
    simulation = options.simulation()
    grid, others = frame.study.seeds[: options.grid_seeds], frame.study.seeds[options.grid_seeds :]
    lines = [
        "# FedFroM's powers p and k on SST-2",
        "",
        f"{BEST}: `{chosen}`. Tables: [grid](grid.md), [comparison](comparison.md). Pictures: grid.png, curves.png.",
        "",
        f"- {simulation.clients} clients, {simulation.rounds} rounds of {simulation.steps} steps of "
        f"{simulation.batch_size} examples, AdamW at {simulation.learning_rate:g}; {simulation.model}, "
        f"{simulation.kept_layers or 'all'} layers, LoRA r = {simulation.lora_r}; accuracy on "
        f"{simulation.eval_examples} held-out examples; k=auto chooses on {simulation.validation_examples} others.",
        f"- Seeds of the grid: {', '.join(map(str, grid))}; of the comparison: {', '.join(map(str, others))}. A seed "
        "fixes partition, initial weights, batches and examples.",
        f"- {len(cells) - len(missing)} of {len(cells)} runs{' (not complete)' if missing else ''}, {hours:.1f} hours "
        f"of rounds on {machine()}, beside other work.",
        f"- Again: `{command('python -m simulations.studies federated')} --glue-dir GLUE`, with GLUE's TSV files in "
        "GLUE/SST-2.",
    ]
    write_whole(folder / "README.md", "\n".join(lines) + "\n")
