"""The pictures of a simulation: scores, weights, updates and partition."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from fedfrom.pages.canvas import canvas, write_values
from fedfrom.pages.look import COLOURS, MARKERS, display_name, module_name, percent

MOST_LAYER_NAMES = 32
MANY_CLIENTS = 7  # above this, lines become a heat map


def draw_comparison(experiment: Any, histories: Sequence[Any], path: Path) -> None:
    """Draw the score by round of every strategy, and the clients' weights in the first strategy that reports them."""
    weighted = next((history for history in histories if any(entry.weights for entry in history.rounds)), None)
    columns, width = (2, 11.5) if weighted else (1, 6)
    with canvas(path, columns=columns, figsize=(width, 4.8)) as (_, axes):
        _draw_scores(axes[0, 0], experiment, histories)
        if weighted:
            few = experiment.shares and experiment.options.clients <= MANY_CLIENTS
            draw = _draw_weight_lines if few else _draw_weight_map
            draw(axes[0, 1], experiment, weighted)


def _draw_scores(axes: Axes, experiment: Any, histories: Sequence[Any]) -> None:
    correlation = any(task.name in ("cola", "stsb") for task in experiment.tasks)
    for position, history in enumerate(histories):
        axes.plot(
            [entry.number for entry in history.scored],
            history.curve,
            color=COLOURS[position % len(COLOURS)],
            marker=MARKERS[position % len(MARKERS)],
            label=f"{display_name(history.label)}: {_value(history.final, correlation)} at the end",
            linewidth=2,
            clip_on=False,
        )
    constant = "majority class" if not correlation and len(experiment.tasks) == 1 else "constant answer"
    axes.axhline(
        experiment.baseline,
        color="#555555",
        linestyle="--",
        linewidth=1.2,
        label=f"{constant}: {_value(experiment.baseline, correlation)}",
    )
    names = ", ".join(task.name for task in experiment.tasks)
    examples = sum(len(tokens) for tokens in experiment.held_out)
    axes.set_title(f"Global model on held-out data ({names})")
    axes.set_xlabel("round")
    metric = experiment.metric if len(experiment.metric) < 40 else "mean of the tasks' metrics"
    axes.set_ylabel(f"{metric}, {examples:,} examples")
    if not correlation:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=8.5)


def _value(score: float, correlation: bool) -> str:
    return f"{score:.3f}" if correlation else percent(score, 1)


def _weight_table(experiment: Any, history: Any) -> tuple[list[int], np.ndarray]:
    rounds = [entry for entry in history.rounds if entry.number]
    table = [[entry.weights.get(client, np.nan) for entry in rounds] for client in range(experiment.options.clients)]
    return [entry.number for entry in rounds], np.array(table)


def _draw_weight_lines(axes: Axes, experiment: Any, history: Any) -> None:
    rounds, table = _weight_table(experiment, history)
    total = sum(len(share.examples) for share in experiment.shares)
    for client, share in enumerate(experiment.shares):
        colour = COLOURS[client % len(COLOURS)]
        label = f"client {client} ({_about(experiment, share)})"
        axes.plot(rounds, table[client], color=colour, marker=MARKERS[client % len(MARKERS)], linewidth=2, label=label)
        axes.axhline(len(share.examples) / total, color=colour, linestyle=":", linewidth=1.2)
    axes.plot([], [], color="#555555", linestyle=":", label="FedAvg's weight: share of examples")
    axes.set_title(f"Weight of each client in {display_name(history.label)}")
    axes.set_xlabel("round")
    axes.set_ylabel("weight, mean over layers")
    axes.set_ylim(0, None)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=8.5)


def _about(experiment: Any, share: Any) -> str:
    count = f"{len(share.examples):,}"
    if len(experiment.tasks) > 1:
        return f"{share.task.name}, {count} examples"
    if share.task.regression:
        return f"{count} examples"
    label, most = max(share.label_counts.items(), key=lambda pair: pair[1])
    return f"{count} examples, {percent(most / len(share.examples))} {label}"


def _draw_weight_map(axes: Axes, experiment: Any, history: Any) -> None:
    rounds, table = _weight_table(experiment, history)
    image = axes.imshow(
        table,
        aspect="auto",
        cmap="viridis",
        vmin=0,
        interpolation="nearest",
        extent=(0.5, len(rounds) + 0.5, len(table) - 0.5, -0.5),
    )
    axes.figure.colorbar(image, ax=axes, label="weight, mean over layers", format=PercentFormatter(1.0, decimals=0))
    axes.set_title(f"Weight of each client in {display_name(history.label)}")
    axes.set_xlabel("round")
    axes.set_ylabel("client")
    axes.grid(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def draw_updates(experiment: Any, histories: Sequence[Any], path: Path) -> None:
    """Draw the cosines of the clients' updates in the last merged round, and each client's weight in each layer.

    The merge is one of the first strategy that reports merges. Nothing is drawn without such a strategy, or above 32
    clients.
    """
    for history in histories:
        merges = [(number, report) for number, report in history.reports.items() if report["merge"]]
        if merges and merges[-1][1]["merge"]["cosines"]:
            break
    else:
        return
    number, report = merges[-1]
    order = sorted(range(len(report["clients"])), key=lambda i: report["clients"][i])
    clients = [report["clients"][i] for i in order]
    cosines = np.array(report["merge"]["cosines"])[order][:, order]
    layers = [layer for layer in report["merge"]["layers"] if layer["weights"]]
    weights = np.array([layer["weights"] for layer in layers])[:, order]
    with canvas(path, columns=2, grid=False, figsize=(12, 5.4)) as (figure, ((left, right),)):
        image = left.imshow(cosines, cmap="RdBu", vmin=-1, vmax=1)
        if len(clients) <= MANY_CLIENTS:
            write_values(left, image, size=10)
        figure.colorbar(image, ax=left, label="cosine of the updates", shrink=0.8)
        left.set_title(f"{display_name(history.label)}, round {number}: do clients pull the same way?")
        left.set_ylabel("client")
        image = right.imshow(weights, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
        figure.colorbar(image, ax=right, label="weight", format=PercentFormatter(1.0, decimals=0), shrink=0.8)
        right.set_title("Weight of each client in each layer")
        shown = range(0, len(layers), -(-len(layers) // MOST_LAYER_NAMES))
        right.set_yticks(list(shown), [module_name(layers[i]["name"]) for i in shown], fontsize=7)
        for axes in (left, right):
            axes.set_xlabel("client")
            axes.set_xticks(range(len(clients)), clients)
        left.set_yticks(range(len(clients)), clients)


def draw_partition(experiment: Any, path: Path) -> None:
    """Draw each client's number of training examples by label."""
    shares = experiment.shares
    names = list(dict.fromkeys(label for share in shares for label in share.label_counts))
    greys = len(names) > len(COLOURS)
    with canvas(path, figsize=(7, 1.6 + 0.36 * len(shares))) as (_, ((axes,),)):
        start = np.zeros(len(shares))
        for position, label in enumerate(names):
            counts = np.array([share.label_counts.get(label, 0) for share in shares])
            colour = plt.get_cmap("viridis")(position / max(len(names) - 1, 1)) if greys else COLOURS[position]
            axes.barh(range(len(shares)), counts, left=start, color=colour, label=label, height=0.72)
            start += counts
        several = len(experiment.tasks) > 1
        rows = [f"{client}  {share.task.name}" if several else str(client) for client, share in enumerate(shares)]
        axes.set_yticks(range(len(shares)), rows)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_ylabel("client")
        axes.set_xlabel("training examples")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        options = experiment.options
        drawn = f" (alpha {options.alpha:g})" if options.partition == "dirichlet" else ""
        axes.set_title(f"Who holds what: {options.partition}{drawn}, {', '.join(t.name for t in experiment.tasks)}")
        axes.legend(title="score" if shares[0].task.regression else "label", loc="center left", bbox_to_anchor=(1, 0.5))
