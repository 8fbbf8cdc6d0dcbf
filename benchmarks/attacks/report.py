"""Tables and pictures of what was measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.attacks.attacks import MALFORMED, UNTARGETED
from benchmarks.attacks.bench import Outcome
from benchmarks.attacks.contenders import CONTENDERS, FEDFROM
from benchmarks.attacks.rounds import SKEWED
from fedfrom.atomic import whole_file, write_whole
from fedfrom.pages import intervals
from fedfrom.pages.look import COLOURS, MARKERS, STYLE
from simulations.tables import write_table

BAR = 0.95
LEAST = 1e-4  # what is closer to the honest merge is drawn here
NINTH = ("#7A3E9D", "h")
HONEST = (
    "The honest merge is the same strategy's, of the honest clients' replies alone (told that there are no attackers)."
)
UNUSABLE = "0: no usable model (the run ends with an exception, or NaN, infinity or other shapes in the arrays)."


def counts_for_bar(outcome: Outcome) -> bool:
    """Return whether the bar holds for it: one untargeted attacker of 10, a pairwise cosine >= 0.5 or trained.

    Not in the round of skewed labels, whose updates are all but orthogonal: below 0.1 one sign-flip alone is too much.
    """
    untargeted = outcome.attack in MALFORMED or outcome.attack in UNTARGETED
    return outcome.attackers == 1 and untargeted and outcome.round not in ("cosine 0.1", SKEWED)


def write_outcomes(outcomes: Sequence[Outcome], cosines: Mapping[str, float], folder: Path, work: Path) -> None:
    """Write every outcome into `work`, and into `folder` the tables by attack and the means over all of it."""
    rows = [list(outcome.to_dict().values()) for outcome in outcomes]
    header = list(outcomes[0].to_dict())
    write_table(work, "outcomes", header, rows, "Every outcome: see `benchmarks/attacks/bench.py`.")
    strategies = [name for name in CONTENDERS if any(o.strategy == name for o in outcomes)]
    said = ", ".join(f"{name}: {value:.2f}" for name, value in cosines.items())
    for attackers in sorted({o.attackers for o in outcomes}):
        table = []
        for attack in dict.fromkeys(o.attack for o in outcomes):
            cells: list[object] = [attack]
            for name in strategies:
                cells.append(
                    _cell([o for o in outcomes if (o.attackers, o.attack, o.strategy) == (attackers, attack, name)])
                )
            own = [o for o in outcomes if (o.attackers, o.attack, o.strategy) == (attackers, attack, FEDFROM)]
            weights = [o.weight for o in own if o.weight is not None]
            cells += [max(weights) if weights else "", float(np.mean([o.distance for o in own]))]
            table.append(cells)
        about = (
            f"Cosine of the global update to the honest merge with {attackers} of 10 clients attacking: mean over the "
            f"rounds, and in brackets the lowest. {HONEST} {UNUSABLE} Mean pairwise cosine of the honest updates: "
            f"{said}. The last two columns are {FEDFROM}'s: the most that the attackers weigh together in a layer, and "
            "the mean distance to the honest merge, relative to its norm."
        )
        write_table(folder, f"attackers-{attackers}", ["attack", *strategies, "weight", "distance"], table, about)
    _write_means(outcomes, strategies, folder)


def _cell(found: Sequence[Outcome]) -> str:
    if not found:
        return "n/a"
    values = [o.cosine for o in found]
    mean, least = float(np.mean(values)), min(values)
    return f"{mean:.2f}" if f"{mean:.2f}" == f"{least:.2f}" else f"{mean:.2f} ({least:.2f})"


def _write_means(outcomes: Sequence[Outcome], strategies: Sequence[str], folder: Path) -> None:
    table = []
    for name in strategies:
        own = [o for o in outcomes if o.strategy == name]
        sound = [o for o in own if o.attack not in MALFORMED]
        of_each = [[o.cosine for o in own if o.attackers == count] for count in (1, 2, 3)]
        table.append(
            [
                name,
                *(f"{np.mean(values):.3f}" if values else "n/a" for values in of_each),
                f"{np.mean([o.cosine for o in own]):.3f}",
                f"{np.mean([o.cosine for o in sound]):.3f}",
                f"{np.mean([o.common for o in own]):.3f}",
                f"{np.mean([o.common for o in sound]):.3f}",
                f"{min(o.cosine for o in own if counts_for_bar(o)):.3f}",
            ]
        )
    about = (
        f"Mean cosine over the tables of 1, 2 and 3 attackers. {HONEST} Well-formed: without the attacks whose replies "
        "are malformed (NaN, keys, shapes, num-examples). Common target: the cosine to the example-weighted mean of "
        "the honest clients' products, the same for all strategies. Bar: the lowest of one untargeted attacker at a "
        "pairwise cosine of 0.5 and 0.9 and in the trained round. Krum, MultiKrum, Bulyan and FedTrimmedAvg are told "
        "the number of attackers, and so is FedFroM's select; Bulyan is run where n >= 4f + 3."
    )
    header = ["strategy", "1", "2", "3", "all", "well-formed", "common, all", "common, well-formed", "bar"]
    write_table(folder, "means", header, table, about)


def draw_scales(curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], path: Path) -> None:
    """Draw how far the cosine is from 1 against the scale of a sign-flip: a panel a title, a line a strategy."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(curves), figsize=(5 * len(curves), 5), dpi=150, layout="constrained", sharey=True, squeeze=False
        )
        for plot, (title, lines) in zip(axes[0], curves.items(), strict=True):
            _draw_lines(plot, title, lines)
        axes[0, 0].set_ylabel("1 − cosine to the honest merge\n(0: nothing lost, 2: opposite)")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5)
        with whole_file(path) as hidden:
            figure.savefig(hidden)
        plt.close(figure)


def _draw_lines(plot: Axes, title: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    for name, points in lines.items():
        position, own = list(CONTENDERS).index(name), name.startswith(FEDFROM)
        plot.plot(
            [x for x, _ in points],
            [max(1 - y, LEAST) for _, y in points],
            color=(*COLOURS, NINTH[0])[position],
            marker=(*MARKERS, NINTH[1])[position],
            linestyle="-" if own else "--",
            linewidth=2.4 if own else 1.3,
            markersize=5,
            label=name,
        )
    plot.axhline(1 - BAR, color="#555555", linewidth=1, linestyle=":")
    plot.set_xscale("log")
    plot.set_yscale("log")
    plot.set_ylim(LEAST / 1.5, 3)
    plot.set_xlabel("scale of the attackers' sign-flip")
    plot.set_title(title)


def write_tradeoff(
    accuracies: Mapping[tuple[str, float | None], Sequence[float]],
    held: Mapping[tuple[str, float | None], Mapping[str, float]],
    chosen: tuple[float | None, float | None],
    folder: Path,
) -> None:
    """Write and draw what each clip and each cap holds and what it costs; `chosen` are FedFroM's (clip, cap)."""
    baseline = accuracies["clip", None]
    table: list[list[Any]] = []
    for (kind, value), found in accuracies.items():
        cosine = held[kind, value]
        bound = "n/a" if value is None and kind == "clip" else cosine["at the bound"]
        table.append(
            [
                kind,
                "None" if value is None else f"{value:g}",
                intervals.mean(found),
                intervals.paired(found, baseline),
                cosine["cosine"],
                bound,
                cosine["with 1e12 examples"],
            ]
        )
    about = (
        "Clip: FedFroM's `clip` with `examples_cap=None`; cap: `examples_cap` with `clip=None`. Accuracy of six "
        f"honest, unequal clients (mean of the last rounds, {len(baseline)} paired seeds, ± half a 95 % interval), and "
        "its difference to neither clip nor cap. Cosines: the lowest to the honest merge with one untargeted attacker "
        "of 10, at a pairwise cosine of 0.5 and in the trained round, the other setting at its default; at the bound: "
        "of a sign-flip that is as large as still counts in full."
    )
    header = [
        "setting",
        "value",
        "accuracy",
        "difference",
        "lowest cosine",
        "flip at the bound",
        "flip with 1e12 examples",
    ]
    write_table(folder, "tradeoff", header, table, about)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2, 2, figsize=(10.5, 7), dpi=150, layout="constrained", sharex="col", sharey="row", height_ratios=(3, 2)
        )
        for column, kind in enumerate(("clip", "cap")):
            _draw_tradeoff(axes[:, column], [row for row in table if row[0] == kind])
            default = "None" if chosen[column] is None else f"{chosen[column]:g}"
            axes[0, column].set_title(f"{('clip', 'examples_cap')[column]}: {default} by default")
            axes[1, column].set_xlabel(("times the median norm", "times the median number of examples")[column])
        axes[0, 0].set_ylabel("lowest cosine, one attacker of 10")
        axes[1, 0].set_ylabel("accuracy of honest clients,\npoints above no bound")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        with whole_file(folder / "tradeoff.png") as hidden:
            figure.savefig(hidden)
        plt.close(figure)


def _draw_tradeoff(axes: Sequence[Axes], rows: Sequence[Sequence[Any]]) -> None:
    places = range(len(rows))
    labels = ("any untargeted attack", "sign-flip as large as counts in full", "sign-flip that claims 1e12 examples")
    for position, label in enumerate(labels):
        values = [np.nan if row[4 + position] == "n/a" else row[4 + position] for row in rows]
        axes[0].plot(places, values, color=COLOURS[position], marker=MARKERS[position], linewidth=1.8, label=label)
    axes[0].axhline(BAR, color="#555555", linewidth=1, linestyle=":")
    means, errors = ([100 * getattr(row[3], name) for row in rows] for name in ("mean", "half_width"))
    axes[1].errorbar(places, means, errors, color="#000000", marker="o", linestyle="none", capsize=3)
    axes[1].axhline(0, color="#555555", linewidth=1)
    axes[1].set_xticks(places, [row[1] for row in rows])


def write_accuracies(found: Mapping[tuple[float, int, str, str], float], folder: Path) -> None:
    """Write the accuracy of whole federations under attack."""
    strategies = [name for name in CONTENDERS if any(key[3] == name for key in found)]
    table = []
    for alpha, attackers, attack in dict.fromkeys(key[:3] for key in found):
        values = [found.get((alpha, attackers, attack, name)) for name in strategies]
        cells = ["n/a" if value is None else f"{value:.3f}" for value in values]
        table.append([f"{alpha:g}", attackers, attack, *cells])
    about = (
        "Accuracy of the global model on SST-2's 872 held-out sentences: 10 clients with shares from a Dirichlet "
        "distribution over labels (10: like labels, 1: unlike) train a LoRA module and a head on frozen sentence "
        "vectors, and the attackers attack in every round. Mean of the last three of ten rounds and of two seeds. A "
        "constant answer has 0.509."
    )
    write_table(folder, "accuracy", ["Dirichlet", "attackers", "attack", *strategies], table, about)


def write_about(folder: Path, seeds: int, paired_seeds: int) -> None:
    """Write what was run, and how to run it again."""
    lines = [
        "# Attacks of 1 to 3 clients of 10",
        "",
        "Means over everything: [means](means.md). By attack, with [1](attackers-1.md), [2](attackers-2.md) and "
        "[3](attackers-3.md) attackers. Accuracy of federations under attack: [accuracy](accuracy.md). What FedFroM's "
        "defaults were chosen by: [tradeoff](tradeoff.md). Pictures: scales.png, tradeoff.png. A run leaves every "
        "number in work/outcomes.csv.",
        "",
        "![Cosine to the honest merge against the scale of a sign-flip](scales.png)",
        "",
        "![What clips and caps hold and cost](tradeoff.png)",
        "",
        f"- Rounds with a known cosine (0.1, 0.5, 0.9; {seeds} seed{'s' if seeds > 1 else ''}): three plain tensors, "
        "norms and numbers of examples unequal.",
        "- The trained round: the first of 10 clients with like labels who train LoRA (r = 8) and a head on frozen "
        "sentence vectors of SST-2 (MiniLM cut to 3 layers), ten steps each on all that they have.",
        "- The encoder's round: the first of 10 clients with Dirichlet 1 shares of 1,500 sentences who fine-tune LoRA "
        "(r = 8) on the encoder itself, 12 steps of 8 examples. Its updates are all but orthogonal.",
        "- Attackers are the first clients, and know all honest replies. Flower's strategies are run through their own "
        "aggregate_train, on real messages; those that can be told the number of attackers are told.",
        f"- The trade-off: {paired_seeds} paired seeds of 6 clients with Dirichlet 0.5 shares, 8 rounds.",
        "- Again: `python -m benchmarks.attacks`, with FEDFROM_GLUE_DIR naming a folder that has GLUE's SST-2.",
    ]
    write_whole(folder / "README.md", "\n".join(lines) + "\n")
