"""The study's pictures: methods, tasks, and scales."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.ticker import FixedLocator, NullLocator

from fedfrom.pages import intervals
from fedfrom.pages.canvas import canvas, write_values
from fedfrom.pages.look import COLOURS, MARKERS
from simulations.studies.frame import Frame
from simulations.studies.glue.options import DESIGN
from simulations.studies.glue.plan import FULL, MERGE, TUNED, counts, share
from simulations.studies.glue.rows import PRIMARY, ROWS

KEPT = "share of the own models' lead that is kept"


def draw_methods(shares: pd.DataFrame, path: Path) -> None:
    """Draw each method's mean share at its tuned scale with its interval, at each rank, best first.

    Parameters
    ----------
    shares : pd.DataFrame
        `summary.shares`.
    path : Path
        The picture.
    """
    tuned = shares[shares["setting"] == TUNED]
    ranks = list(tuned["rank"].unique())
    order = tuned[tuned["rank"] == ranks[0]].groupby("method")["share"].mean().sort_values(ascending=False).index
    size = (2.6 + 4.2 * len(ranks), 1.5 + 0.28 * len(order))
    with canvas(path, columns=len(ranks), figsize=size, sharey=True) as (figure, (panels,)):
        for axes, rank in zip(panels, ranks, strict=True):
            for place, name in enumerate(order):
                found = tuned[(tuned["rank"] == rank) & (tuned["method"] == name)]
                colour = COLOURS[1] if name.startswith("from") else COLOURS[0]
                design = found[found["seed"] == DESIGN]["share"]
                axes.plot(design, [place] * len(design), "o", color=colour, markerfacecolor="none", markersize=6)
                confirmed = found[found["seed"] != DESIGN]["share"].tolist()
                if confirmed:
                    one = intervals.mean(confirmed)
                    half = None if np.isnan(one.half_width) else one.half_width
                    axes.errorbar(one.mean, place, xerr=half, fmt="o", color=colour, markersize=5, capsize=2.5)
            axes.set_title("full rank" if rank == FULL else f"cut to rank {rank}")
            axes.set_xlabel(KEPT)
            axes.set_ylim(len(order) - 0.5, -0.5)
        panels[0].set_yticks(range(len(order)), order)
        figure.suptitle("Scale chosen on tuning rows: confirming seeds (dot, 95 % interval), design seed (ring)")


def draw_tasks(rows: pd.DataFrame, path: Path) -> None:
    """Draw what each merged body keeps of each task's own lead, at full rank and its tuned scale."""
    found = rows[(rows["part"] == MERGE) & (rows["rank"] == FULL) & (rows["setting"] == TUNED)]
    found = found[counts(found["own"], found["constant"])]
    kept = found.assign(share=share(found["score"], found["constant"], found["own"]))
    table = kept.groupby(["method", "task"], sort=False)["share"].mean().unstack()
    table = table.assign(mean=table.mean(axis=1)).sort_values("mean", ascending=False)
    size = (2.6 + 0.85 * len(table.columns), 1.4 + 0.3 * len(table))
    with canvas(path, grid=False, figsize=size) as (figure, ((axes,),)):
        image = axes.imshow(table.to_numpy(), cmap="viridis", vmin=0, vmax=1, aspect="auto")
        write_values(axes, image)
        axes.set_xticks(range(len(table.columns)), table.columns)
        axes.set_yticks(range(len(table)), table.index)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        figure.suptitle(f"{KEPT.capitalize()}, by task")


def draw_scales(frame: Frame, path: Path) -> None:
    """Draw the mean share on the first tuning rows by scale, at full rank, one line a method."""
    rows = [
        {"method": cell.method, "scale": trial["scale"], "merit": trial["merit"]}
        for cell in frame.study.cells
        if cell.part == MERGE and cell in frame
        for trial in frame.beside(cell)["tried"][FULL]
        if trial["rows"] == "first"
    ]
    table = pd.DataFrame(rows).groupby(["method", "scale"], sort=False)["merit"].mean().unstack(level=0)
    strong = {name: place for place, name in enumerate([*PRIMARY[::-1], "from k=1", "ties", "iso-cts", "core-ties"])}
    with canvas(path, figsize=(8.6, 4.6)) as (_, ((axes,),)):
        for name in (row.name for row in ROWS if row.name in table):
            place = strong.get(name)
            look = {"color": "#BBBBBB", "linewidth": 1.0, "zorder": 1}
            if place is not None:
                look = {"color": COLOURS[place], "marker": MARKERS[place], "linewidth": 1.8, "label": name}
            axes.plot(table.index, table[name], **look)
        axes.plot([], [], color="#BBBBBB", label="other methods")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(list(table.index)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([f"{scale:g}" for scale in table.index])
        axes.set_xlabel("scale: what the merged update is multiplied by")
        axes.set_ylabel(KEPT)
        axes.set_title("On the first tuning rows, mean over seeds")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
