"""The study's tables: the grid of p and k, and the comparison of strategies."""

import pandas as pd

from fedfrom.pages import intervals
from simulations.studies.federated.plan import BASELINE, GRID, SETTINGS, final, from_spec
from simulations.studies.tables import MEAN, gain

LEARNED = 0.03  # least gain in accuracy over the untrained model of a run that is not stuck
ABOUT_GRID = "Accuracy, mean of the last three rounds; ± is half a 95 % interval over seeds."
ABOUT_COMPARISON = (
    "Accuracy, mean of the last three rounds; ± is half a 95 % interval over seeds, of the paired difference where "
    "FedAvg is subtracted. Rounds to the target by seed, - for never. Distance from the mean: "
    "‖merged − mean of products‖ / ‖mean of products − global‖, mean over rounds. λ_max: the layers' largest, mean "
    "over rounds."
)


def scores_by_seed(rows: pd.DataFrame, setting: str) -> pd.DataFrame:
    """Return each method's final accuracy with one kind of clients, by method and seed."""
    found = final(rows[rows["kind"] == setting])
    return found.set_index(["method", "seed"])[["score"]].rename(columns={"score": MEAN})


def grid(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the grid's table: a line for each kind of clients, p and k."""
    lines = []
    for setting in SETTINGS:
        for k, p in GRID[setting]:
            own = rows[(rows["kind"] == setting) & (rows["method"] == from_spec(k, p))]
            if len(own):
                values = final(own)["score"].tolist()
                lines.append([setting, p, k, len(values), str(intervals.mean(values)), min(values), _stuck(own)])
    return pd.DataFrame(lines, columns=["clients", "p", "k", "seeds", "accuracy", "worst seed", "stuck"], dtype=object)


def comparison(rows: pd.DataFrame, target: float) -> pd.DataFrame:
    """Return the comparison's table: a line for each kind of clients and strategy."""
    lines = []
    scores_of = {setting: scores_by_seed(rows, setting) for setting in rows["kind"].unique()}
    for (setting, row), own in rows.groupby(["kind", "method"], sort=False):
        scores = scores_of[setting]
        values = scores.loc[row, MEAN].tolist()
        there = row != BASELINE and BASELINE in scores.index.unique(level=0)
        shared = there and len(scores.loc[row].index.intersection(scores.loc[BASELINE].index))
        trained = own[own["round"] > 0]
        lines.append(
            {
                "clients": setting,
                "strategy": row,
                "spec": own["setting"].iloc[0],
                "seeds": len(values),
                "accuracy": str(intervals.mean(values)),
                "ahead of FedAvg": gain(scores, row, BASELINE).signed if shared else "",
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


def _stuck(rows: pd.DataFrame) -> int:
    """Return the number of seeds whose final accuracy is less than LEARNED above the untrained model's."""
    start = rows[rows["round"] == 0].set_index("seed")["score"]
    return int((final(rows).set_index("seed")["score"] < start + LEARNED).sum())


def _mean(values: pd.Series) -> str:
    mean = values.astype(float).mean()
    return "" if pd.isna(mean) else f"{mean:.2f}"
