"""The study's tables, made of its frame."""

from pathlib import Path

import pandas as pd

from fedfrom.pages import intervals
from simulations.environment import command, machine
from simulations.studies.frame import Frame
from simulations.studies.glue.options import DESIGN, GATE
from simulations.studies.glue.plan import MERGE, OWN, REPORTED, TUNED
from simulations.studies.glue.rows import REFERENCE, ROWS
from simulations.tables import write_table


def write(frame: Frame, folder: Path) -> None:
    """Write scores.csv, own.md, methods.md and contrasts.md into the folder."""
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
    text = "Tuned against the tuned average, in shares, paired by seed."
    write_table(folder, "contrasts", contrasts(rows), f"{text} {about}")


def own(rows: pd.DataFrame) -> pd.DataFrame:
    """Return each task's own score, the constant answer's, and on how many seeds the task counts."""
    found = rows[(rows["part"] == OWN) & (rows["split"] == REPORTED)].copy()
    found["counts"] = found["score"] >= found["constant"] + GATE
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
    merged = merged[merged["own"] >= merged["constant"] + GATE]
    lead = merged.assign(
        share=(merged[score] - merged["constant"]) / (merged["own"] - merged["constant"]), raw=merged[score]
    )
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


def contrasts(rows: pd.DataFrame) -> pd.DataFrame:
    """Return each method's tuned share less the tuned average's, paired by confirming seed, at both ranks."""
    found = shares(rows)
    found = found[(found["setting"] == TUNED) & (found["seed"] != DESIGN)]
    table = []
    for rank, own in found.groupby("rank", sort=False):
        by = own.pivot(index="seed", columns="method", values="share")
        for row in ROWS:
            if row.name != REFERENCE and {row.name, REFERENCE} <= set(by.columns):
                paired = by[[row.name, REFERENCE]].dropna()
                gain = intervals.paired(paired[row.name].tolist(), paired[REFERENCE].tolist())
                table.append({"rank": rank, "method": row.name, f"less {REFERENCE}": str(gain), "seeds": len(paired)})
    return pd.DataFrame(table, columns=["rank", "method", f"less {REFERENCE}", "seeds"])


def _mean(values: pd.Series) -> str:
    return str(intervals.mean(values.tolist())) if len(values) else ""
