"""The study's tables, made of its frame."""

import math
from pathlib import Path

import pandas as pd

from fedfrom.pages import intervals
from simulations.environment import command, machine
from simulations.studies.frame import Frame
from simulations.studies.glue import figures
from simulations.studies.glue.contrasts import RAW, SHARE, Contrast, Evidence, holm
from simulations.studies.glue.options import DESIGN, GATE
from simulations.studies.glue.plan import MERGE, OWN, REPORTED, counts, share
from simulations.studies.glue.rows import PRIMARY, REFERENCE, ROWS, SECONDARY
from simulations.tables import write_table


def write(frame: Frame, folder: Path) -> None:
    """Write scores.csv, the tables own, methods and contrasts, and the pictures into the folder."""
    rows = frame.rows()
    folder.mkdir(parents=True, exist_ok=True)
    rows.to_csv(folder / "scores.csv", index=False, float_format="%.6g", lineterminator="\n")
    asked = command("python -m simulations.studies glue")
    about = f"`{asked}`; {machine()}; {frame.took('cpu-seconds') / 3600:.1f} core-hours."
    text = (
        "Own models by task, on the reported rows: Matthews' correlation for CoLA, MRPC and QQP, Spearman's for STS-B, "
        f"accuracy for the others. A task counts where its own model is {GATE:.2f} above the constant answer."
    )
    write_table(folder, "own", own(rows), f"{text} {about}")
    if not (rows["part"] == MERGE).any():
        return
    text = (
        "Share of each task's own lead over a constant answer that the merged body keeps, (s - c) / (own - c): mean "
        "over the tasks that count, then over seeds, ± half of a 95 % interval. `raw`: the same mean of the scores. "
        "`refit`: the share with the bias of each head fitted anew on the tuning rows."
    )
    write_table(folder, "methods", methods(rows), f"{text} {about}")
    text = (
        "One method less another, both at their tuned scales, on the confirming seeds. `share`: mean difference in the "
        "share of the own lead that is kept, ± the wider of the two half-widths that follow: `by seeds`, Student's t, "
        "and `bootstrap`, seeds and examples drawn anew. `raw`: the same of the scores. `p`: the larger p-value of "
        "both, of the first contrast; `p, Holm`: of the five named with it. The other contrasts are not corrected for "
        "being many. `without one task`: the smallest and the largest mean without one of the tasks."
    )
    ranks = list(rows["rank"].dropna().unique()) if "rank" in rows else []
    found = [table for table in (contrasts(frame, rank) for rank in ranks) if len(table)]
    if found:
        write_table(folder, "contrasts", pd.concat(found), f"{text} {about}")
    figures.draw_methods(shares(rows), folder / "methods.png")
    figures.draw_tasks(rows, folder / "tasks.png")
    figures.draw_scales(frame, folder / "scales.png")


def own(rows: pd.DataFrame) -> pd.DataFrame:
    """Return each task's own score, the constant answer's, and on how many seeds the task counts."""
    found = rows[(rows["part"] == OWN) & (rows["split"] == REPORTED)].copy()
    found["counts"] = counts(found["score"], found["constant"])
    grouped = found.groupby("task", sort=False)
    table = grouped.agg(
        n=("n", "first"),
        constant=("constant", "mean"),
        own=("score", "mean"),
        counts=("counts", "sum"),
        seeds=("seed", "nunique"),
    )
    return table.reset_index()


def shares(rows: pd.DataFrame, score: str = "score") -> pd.DataFrame:
    """Return the mean share over the tasks that count, by method, rank, setting and seed."""
    merged = rows[(rows["part"] == MERGE) & (rows["split"] == REPORTED)]
    merged = merged[counts(merged["own"], merged["constant"])]
    lead = merged.assign(share=share(merged[score], merged["constant"], merged["own"]), raw=merged[score])
    return lead.groupby(["method", "rank", "setting", "seed"], sort=False)[["share", "raw"]].mean().reset_index()


def methods(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each method, rank and setting: on the design seed, and on those that confirm."""
    plain, refit = shares(rows), shares(rows, "refit")
    table = []
    for row in ROWS:
        for (rank, setting), found in plain[plain["method"] == row.name].groupby(["rank", "setting"], sort=False):
            same = {"method": row.name, "rank": rank, "setting": setting}
            again = refit[(refit["method"] == row.name) & (refit["rank"] == rank) & (refit["setting"] == setting)]
            confirm, confirm_refit = (each[each["seed"] != DESIGN] for each in (found, again))
            table.append(
                {
                    **same,
                    "design seed": _mean(found[found["seed"] == DESIGN]["share"]),
                    "confirming seeds": _mean(confirm["share"]),
                    "raw": _mean(confirm["raw"]),
                    "refit": _mean(confirm_refit["share"]),
                    "seeds": len(confirm),
                }
            )
    return pd.DataFrame(table)


def contrasts(frame: Frame, rank: str) -> pd.DataFrame:
    """Return the contrasts at one rank: those named beforehand, then every other method less the average."""
    others = [(row.name, REFERENCE) for row in ROWS if row.name != REFERENCE]
    others = [pair for pair in others if pair not in (PRIMARY, *SECONDARY)]
    table, found = [], {pair: _contrasts(frame, rank, pair) for pair in (PRIMARY, *SECONDARY, *others)}
    tested = [pair for pair in SECONDARY if found[pair]]
    adjusted = dict(zip(tested, holm([found[pair][SHARE].p for pair in tested]), strict=True))
    for pair, of in found.items():
        if of:
            kept, raw = of[SHARE], of[RAW]
            table.append(
                {
                    "rank": rank,
                    "contrast": " - ".join(pair),
                    "share": kept.interval.signed,
                    "by seeds": _number(kept.by_seeds.half_width),
                    "bootstrap": f"{kept.low:+.3f} to {kept.high:+.3f}",
                    "raw": raw.interval.signed,
                    "p": _number(kept.p) if pair == PRIMARY else "",
                    "p, Holm": _number(adjusted[pair]) if pair in adjusted else "",
                    "without one task": f"{min(kept.without.values()):+.3f} to {max(kept.without.values()):+.3f}",
                    "seeds": kept.by_seeds.count,
                }
            )
    return pd.DataFrame(table)


def _contrasts(frame: Frame, rank: str, pair: tuple[str, str]) -> dict[str, Contrast]:
    """Return a contrast in shares and in plain scores, over the confirming seeds that have both; empty without one."""
    cells = frame.study.cells
    seeds = [
        seed
        for seed in frame.study.seeds
        if seed != DESIGN and all(cell in frame for cell in cells if cell.seed == seed and cell.method in pair)
    ]
    if not seeds:
        return {}
    evidence = Evidence(frame, rank, pair, seeds)
    return {of: evidence.contrast(*pair, of) for of in (SHARE, RAW)} if len(evidence.tasks) > 1 else {}


def _number(value: float) -> str:
    """Return a number as text; empty where one seed gives none."""
    return "" if math.isnan(value) else f"{value:.3f}"


def _mean(values: pd.Series) -> str:
    return str(intervals.mean(values.tolist())) if len(values) else ""
