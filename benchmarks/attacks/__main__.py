"""`python -m benchmarks.attacks`: the attack bench's command line."""

import argparse
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.attacks import federation, figures, tables, tradeoff
from benchmarks.attacks.attacks import FLIP, TRAINED, UNTARGETED
from benchmarks.attacks.bench import Outcome, compare
from benchmarks.attacks.contenders import CONTENDERS, FEDFROM, applies
from benchmarks.attacks.rounds import CLIENTS, COSINES, Round, encoder, synthetic, trained
from fedfrom import FedFroM

SCALES = (0.1, 0.3, 1, 1.5, 2, 3, 10, 30, 100, 1e3, 1e6)
UNDER_ATTACK = {name: UNTARGETED[name] for name in (f"{FLIP} ×10",)} | dict(TRAINED)


def outcomes(rounds: Sequence[tuple[Round, int]], attackers: Sequence[int]) -> list[Outcome]:
    """Return every attack on every strategy, for rounds with their seeds."""
    return [o for one, seed in rounds for count in attackers for o in compare(one, count, seed)]


def curves(one: Round, attackers: int, scales: Sequence[float] = SCALES) -> Mapping[str, list[tuple[float, float]]]:
    """Return by strategy (scale, cosine) of sign-flips of these scales."""
    attacks = {str(scale): lambda known, s=scale: known.scaled(-s) for scale in scales}  # type: ignore[misc]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS if applies(name, CLIENTS, attackers)}
    for outcome in compare(one, attackers, attacks=attacks):
        found[outcome.strategy].append((float(outcome.attack), outcome.cosine))
    return found


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description="Attacks of 1 to 3 clients of 10 against FedFroM and Flower's own.")
    parser.add_argument("--out", type=Path, default=Path("results/attacks"), help="folder of tables and pictures")
    parser.add_argument("--work", type=Path, default=None, help="folder of what was trained [default: OUT/work]")
    parser.add_argument("--seeds", type=int, default=3, help="of the rounds with a known cosine")
    parser.add_argument("--paired-seeds", type=int, default=8, help="of the trade-off's federations")
    parser.add_argument("--parts", default="table,scales,tradeoff,accuracy", help="what to measure")
    options = parser.parse_args()
    out, parts = options.out, options.parts.split(",")
    work = options.work or out / "work"
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # every rejection is meant here
    start = time.perf_counter()
    data = federation.features(work)
    real, half = trained(data), synthetic(0.5, 0)
    made = [(synthetic(cosine, seed), seed) for cosine in COSINES for seed in range(options.seeds)]
    if "table" in parts:
        rounds = [*made, (real, 0), (encoder(work), 0)]
        found = tables.frame(outcomes(rounds, (1, 2, 3)))
        tables.write_outcomes(found, {one.name: one.cosine for one, _ in rounds}, out, work)
        bar = tables.counting_for_bar(found[found["strategy"] == FEDFROM])["cosine"].min()
        print(f"Lowest cosine of FedFroM that the bar counts: {bar:.3f} (bar: {tables.BAR})")
    if "scales" in parts:
        panels = {
            f"One attacker of 10, {half.name}": curves(half, 1),
            f"One attacker of 10, trained round (cosine {real.cosine:.2f})": curves(real, 1),
            "Three attackers of 10, trained round": curves(real, 3),
        }
        figures.draw_scales(panels, out / "scales.png")
    if "tradeoff" in parts:
        chosen = FedFroM().clip, FedFroM().examples_cap
        accuracies = tradeoff.honest(data, range(options.paired_seeds))
        table = tables.tradeoff(accuracies, tradeoff.held([half, real], chosen))
        tables.write_tradeoff(table, options.paired_seeds, out)
        figures.draw_tradeoff(table, chosen, out / "tradeoff.png")
    if "accuracy" in parts:
        tables.write_accuracies(tradeoff.under_attack(data, UNDER_ATTACK), out)
    tables.write_about(out, options.seeds, options.paired_seeds)
    print(f"Tables and pictures in {out} after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
