"""Tables of what was measured, and the README beside them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from benchmarks.attacks.attacks import MALFORMED, UNTARGETED
from benchmarks.attacks.bench import Outcome
from benchmarks.attacks.contenders import CONTENDERS, FEDFROM
from benchmarks.attacks.rounds import SKEWED
from fedfrom.atomic import write_whole
from fedfrom.pages import intervals
from simulations.tables import write_table

BAR = 0.95
HONEST = (
    "The honest merge is the same strategy's, of the honest clients' replies alone (told that there are no attackers)."
)
UNUSABLE = "0: no usable model (the run ends with an exception, or NaN, infinity or other shapes in the arrays)."


def frame(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """Return the outcomes as a frame, a row each."""
    return pd.DataFrame([asdict(outcome) for outcome in outcomes])


def counting_for_bar(found: pd.DataFrame) -> pd.DataFrame:
    """Return the outcomes that the bar is for: one untargeted attacker of 10, a pairwise cosine >= 0.5 or trained.

    The round of skewed labels is left out. Its updates are nearly orthogonal, and at a pairwise cosine below 0.1 one
    sign-flip alone is too much for any strategy.
    """
    untargeted = found["attack"].isin([*MALFORMED, *UNTARGETED])
    return found[(found["attackers"] == 1) & untargeted & ~found["round"].isin(["cosine 0.1", SKEWED])]


def write_outcomes(found: pd.DataFrame, cosines: Mapping[str, float], folder: Path, work: Path) -> None:
    """Write every outcome into `work`, and into `folder` the tables by attack and the means over all attacks.

    Parameters
    ----------
    found : pd.DataFrame
        The outcomes, from `frame`.
    cosines : Mapping[str, float]
        The mean pairwise cosine of the honest updates of each round.
    folder, work : Path
        Folders, made where they are missing.
    """
    write_table(
        work,
        "outcomes",
        found.astype(object).where(found.notna(), ""),
        "Every outcome: see `benchmarks/attacks/bench.py`.",
    )
    strategies = [name for name in CONTENDERS if (found["strategy"] == name).any()]
    said = ", ".join(f"{name}: {value:.2f}" for name, value in cosines.items())
    for attackers, some in found.groupby("attackers"):
        cells = (
            some.groupby(["attack", "strategy"], sort=False)["cosine"].agg(_cell).unstack().reindex(columns=strategies)
        )
        own = some[some["strategy"] == FEDFROM].groupby("attack")
        table = cells.reindex(found["attack"].unique()).fillna("n/a")
        table["weight"] = own["weight"].max().astype(object).where(lambda values: values.notna(), "")
        table["distance"] = own["distance"].mean()
        about = (
            f"Cosine of the global update to the honest merge with {attackers} of 10 clients attacking: mean over the "
            f"rounds, and in brackets the lowest. {HONEST} {UNUSABLE} Mean pairwise cosine of the honest updates: "
            f"{said}. The last two columns are {FEDFROM}'s: the most that the attackers weigh together in a layer, and "
            "the mean distance to the honest merge, relative to its norm."
        )
        write_table(folder, f"attackers-{attackers}", table.reset_index(), about)
    _write_means(found, strategies, folder)


def _cell(cosines: pd.Series) -> str:
    mean, least = f"{cosines.mean():.2f}", f"{cosines.min():.2f}"
    return mean if mean == least else f"{mean} ({least})"


def _write_means(found: pd.DataFrame, strategies: Sequence[str], folder: Path) -> None:
    sound = found[~found["attack"].isin(MALFORMED)]
    every, sound_only = found.groupby("strategy"), sound.groupby("strategy")
    by_count = found.pivot_table(index="strategy", columns="attackers", values="cosine").reindex(columns=(1, 2, 3))
    table = by_count.rename(columns=str).assign(
        **{
            "all": every["cosine"].mean(),
            "well-formed": sound_only["cosine"].mean(),
            "common, all": every["common"].mean(),
            "common, well-formed": sound_only["common"].mean(),
            "bar": counting_for_bar(found).groupby("strategy")["cosine"].min(),
        }
    )
    about = (
        f"Mean cosine over the tables of 1, 2 and 3 attackers. {HONEST} Well-formed: without the attacks whose replies "
        "are malformed (NaN, keys, shapes, num-examples). Common target: the cosine to the example-weighted mean of "
        "the honest clients' products, the same for all strategies. Bar: the lowest of one untargeted attacker at a "
        "pairwise cosine of 0.5 and 0.9 and in the trained round. Krum, MultiKrum, Bulyan and FedTrimmedAvg are told "
        "the number of attackers, and so is FedFroM's select; Bulyan is run where n >= 4f + 3."
    )
    texts = table.loc[strategies].map(lambda value: "n/a" if pd.isna(value) else f"{value:.3f}")
    write_table(folder, "means", texts.reset_index(), about)


def tradeoff(
    accuracies: Mapping[tuple[str, float | None], Sequence[float]],
    held: Mapping[tuple[str, float | None], Mapping[str, float]],
) -> pd.DataFrame:
    """Return what each clip and each cap costs honest clients, and the lowest cosines that it leaves attackers.

    Parameters
    ----------
    accuracies : Mapping
        Accuracies of honest clients by setting, from `tradeoff.honest`.
    held : Mapping
        Lowest cosines by setting, from `tradeoff.held`.
    """
    baseline = accuracies["clip", None]
    rows = [
        {
            "setting": kind,
            "value": "None" if value is None else f"{value:g}",
            "accuracy": intervals.mean(found),
            "difference": intervals.paired(found, baseline),
            "lowest cosine": held[kind, value]["cosine"],
            "flip at the bound": "n/a" if value is None and kind == "clip" else held[kind, value]["at the bound"],
            "flip with 1e12 examples": held[kind, value]["with 1e12 examples"],
        }
        for (kind, value), found in accuracies.items()
    ]
    return pd.DataFrame(rows, dtype=object)


def write_tradeoff(table: pd.DataFrame, seeds: int, folder: Path) -> None:
    """Write the table that `tradeoff` returned."""
    about = (
        "Clip: FedFroM's `clip` with `examples_cap=None`; cap: `examples_cap` with `clip=None`. Accuracy of six "
        f"honest, unequal clients (mean of the last rounds, {seeds} paired seeds, ± half a 95 % interval), and "
        "its difference to neither clip nor cap. Cosines: the lowest to the honest merge with one untargeted attacker "
        "of 10, at a pairwise cosine of 0.5 and in the trained round, the other setting at its default; at the bound: "
        "of a sign-flip that is as large as still counts in full."
    )
    write_table(folder, "tradeoff", table, about)


def write_accuracies(found: Mapping[tuple[float, int, str, str], float], folder: Path) -> None:
    """Write the accuracy of whole federations under attack, from `tradeoff.under_attack`."""
    strategies = [name for name in CONTENDERS if any(key[3] == name for key in found)]
    accuracies = pd.Series(found).unstack().reindex(list(dict.fromkeys(key[:3] for key in found)))[strategies]
    accuracies.index.names = ["Dirichlet", "attackers", "attack"]
    table = accuracies.map(lambda value: "n/a" if pd.isna(value) else f"{value:.3f}").reset_index()
    table["Dirichlet"] = table["Dirichlet"].map("{:g}".format)
    about = (
        "Accuracy of the global model on SST-2's 872 held-out sentences: 10 clients with shares from a Dirichlet "
        "distribution over labels (10: like labels, 1: unlike) train a LoRA module and a head on frozen sentence "
        "vectors, and the attackers attack in every round. Mean of the last three of ten rounds and of two seeds. A "
        "constant answer has 0.509."
    )
    write_table(folder, "accuracy", table, about)


def write_about(folder: Path, seeds: int, paired_seeds: int) -> None:
    """Write README.md: the rounds that were run, the files, and the command that repeats the run."""
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
