"""The attack bench in tiny: attacks are what they say, and what is measured is the distance to the honest merge."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg

from benchmarks.attacks import figures, tables
from benchmarks.attacks.attacks import ATTACKS, FLIP, MALFORMED, TRAINED, UNTARGETED, Attackers, Sent, replacement
from benchmarks.attacks.bench import compare, cosine_of, merge
from benchmarks.attacks.contenders import CONTENDERS, FLOWERS, applies
from benchmarks.attacks.rounds import Round, synthetic
from fedfrom import FedFroM

A, B, HEAD = "m.q.lora_A.weight", "m.q.lora_B.weight", "m.head.weight"


@pytest.fixture(autouse=True)
def identity(task_identity: None) -> Iterator[None]:
    yield


def adapters(clients: int = 10, alike: float = 1.0, seed: int = 0) -> Round:
    """A round of clients with an adapter that starts from B = 0 and a head, who have something in common."""
    draw = np.random.default_rng(seed)
    sent = {A: draw.normal(size=(3, 9)), B: np.zeros((8, 3)), HEAD: draw.normal(size=(2, 8))}
    common = {key: draw.normal(size=value.shape) for key, value in sent.items()}
    states = [
        {
            key: value + (0.1 if key == A else 1.0) * (alike * common[key] + draw.normal(size=value.shape))
            for key, value in sent.items()
        }
        for _ in range(2 * clients)
    ]
    flipped = dict(enumerate(states[clients:]))
    return Round("adapters", sent, list(states[:clients]), [10 * (i + 1) for i in range(clients)], flipped)


def known(one: Round, attackers: int = 2) -> Attackers:
    counts = [float(count) for count in one.examples[:attackers]]
    flipped = [one.flipped[i] for i in range(attackers)]
    return Attackers(one.sent, one.honest[attackers:], one.honest[:attackers], counts, flipped)


@pytest.mark.parametrize("cosine", [0.1, 0.5, 0.9])
def test_synthetic_rounds_have_the_cosine_they_are_named_for(cosine: float) -> None:
    one = synthetic(cosine, seed=3)
    assert one.cosine == pytest.approx(cosine, abs=1e-4)  # float32 states
    norms = [np.linalg.norm(one.update(state)) for state in one.honest]
    assert max(norms) > 1.5 * min(norms) and len(set(one.examples)) > 5  # unequal


@pytest.mark.parametrize("scale", [1, 10, 1e6])
def test_a_flip_turns_and_scales_the_product_itself(scale: float) -> None:
    one = adapters()
    for sent, own in zip(known(one).scaled(-scale), one.honest, strict=False):
        np.testing.assert_allclose(one.update(sent.state), -scale * one.update(own), rtol=1e-9, atol=1e-9 * scale)


@pytest.mark.parametrize("attack", [name for name in ATTACKS if name not in MALFORMED])
def test_sound_attacks_send_what_was_asked_for(attack: str) -> None:
    for one in (adapters(), synthetic(0.5, 0)):
        if attack in TRAINED and not one.flipped:
            continue
        attackers = known(one) if one.flipped else Attackers(one.sent, one.honest[2:], one.honest[:2], [5.0, 6.0], [])
        found = ATTACKS[attack](attackers)
        assert len(found) == 2
        for state, count in found:
            assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in one.sent.items()}
            assert all(np.isfinite(value).all() for value in state.values()) and count > 0


def test_alie_and_minmax_are_the_papers() -> None:
    one = synthetic(0.5, 1)
    attackers = Attackers(one.sent, one.honest[2:], one.honest[:2], [5.0, 6.0], [])
    honest = np.stack([one.update(state) for state in one.honest[2:]])
    mean = honest.mean(axis=0)
    for state, _ in ATTACKS["ALIE"](attackers):
        np.testing.assert_allclose(one.update(state), mean - 1.5 * honest.std(axis=0), atol=1e-5)
    widest = max(np.linalg.norm(a - b) for a in honest for b in honest)
    for state, _ in ATTACKS["MinMax"](attackers):
        found = one.update(state)
        assert cosine_of(mean - found, honest.std(axis=0)) > 0.999
        furthest = max(np.linalg.norm(found - update) for update in honest)
        assert furthest == pytest.approx(widest, rel=1e-4)  # as far as hides it, and no further


def test_model_replacement_outlives_the_average() -> None:
    """Of clients that stand still FedAvg makes the attackers' model, to the letter."""
    one = synthetic(0.5, 0)
    still = [one.sent] * 8
    target = [one.honest[0]] * 2
    sent = replacement(Attackers(one.sent, still, target, [10.0, 10.0], target))
    merged, note = merge(FedAvg(), one.sent, [*sent, *(Sent(state, 10.0) for state in still)])
    assert merged is not None and not note
    np.testing.assert_allclose(one.update(merged), one.update(one.honest[0]), atol=1e-5)


def test_malformed_replies_leave_fedfrom_the_honest_merge_and_cost_fedavg_its_model() -> None:
    for one in (adapters(), synthetic(0.5, 0)):
        strategies = {"FedFroM": lambda f: FedFroM(), "FedAvg": lambda f: FedAvg()}
        found = {(o.attack, o.strategy): o for o in compare(one, 2, attacks=MALFORMED, strategies=strategies)}
        for attack in MALFORMED:
            fedfrom = found[attack, "FedFroM"]
            if attack != "1e30":  # which a plain tensor of float32 can hold: it is clipped
                assert fedfrom.cosine == pytest.approx(1.0) and fedfrom.distance < 1e-6, attack
            assert fedfrom.cosine > 0.5
        for attack in ("NaN", "Inf", "missing key", "num-examples NaN"):
            fedavg = found[attack, "FedAvg"]
            assert (fedavg.cosine, fedavg.distance) == (0.0, 1.0) and fedavg.note


@pytest.mark.parametrize("cosine", [0.5, 0.9])
def test_one_untargeted_attacker_of_ten_leaves_fedfrom_near_the_honest_merge(cosine: float) -> None:
    strategies = {"FedFroM": CONTENDERS["FedFroM"]}
    for outcome in compare(synthetic(cosine, 0), 1, attacks=UNTARGETED, strategies=strategies):
        assert outcome.cosine >= 0.95, outcome


def test_the_honest_merge_is_the_same_strategys() -> None:
    """Attackers that send what they trained leave a cosine of 1 to a merge that counts them too little to show."""
    one = synthetic(0.9, 0)
    honest = {"none": lambda known: [Sent(state, 1e-9) for state in known.own]}
    strategies = {"FedAvg": lambda f: FedAvg()}
    (outcome,) = compare(one, 2, attacks=honest, strategies=strategies)
    assert outcome.cosine == pytest.approx(1.0) and outcome.distance < 1e-5


def test_weights_are_the_attackers_own() -> None:
    flip = {FLIP: lambda known: known.scaled(-100.0)}
    clipped, bare = (
        next(compare(synthetic(0.5, 0), 1, attacks=flip, strategies={"FedFroM": lambda f, c=clip: FedFroM(clip=c)}))
        for clip in (1.0, None)
    )
    assert clipped.weight is not None and bare.weight is not None
    assert 0 < clipped.weight < 0.25 < bare.weight < 1


def test_bulyan_runs_where_it_may() -> None:
    assert applies("Bulyan", 10, 1) and not applies("Bulyan", 10, 2) and applies("Krum", 10, 3)
    assert set(FLOWERS) == {"FedAvg", "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan"}


def test_cosines_of_huge_and_of_zero_updates() -> None:
    one = np.array([1.0, 2.0])
    assert cosine_of(1e200 * one, -one) == pytest.approx(-1) and cosine_of(0 * one, one) == 0.0


def test_tables_and_the_picture_are_written(tmp_path: Path) -> None:
    one = adapters()
    attacks = {name: ATTACKS[name] for name in ("NaN", "sign-flip ×10", "label-flip")}
    outcomes = [o for f in (1, 2, 3) for o in compare(one, f, attacks=attacks)]
    tables.write_outcomes(tables.frame(outcomes), {one.name: one.cosine}, tmp_path, tmp_path / "work")
    table = (tmp_path / "attackers-1.md").read_text()
    header, nan = (
        next(line for line in table.splitlines() if line.startswith(f"| {name} |")) for name in ("attack", "NaN")
    )
    cells = dict(zip(header.split(" | "), nan.split(" | "), strict=True))
    assert (cells["FedFroM"], cells["FedAvg"]) == ("1.00", "0.00") and "adapters: 0." in table
    assert "n/a" in (tmp_path / "attackers-2.md").read_text()  # Bulyan
    assert len((tmp_path / "work" / "outcomes.csv").read_text().splitlines()) == len(outcomes) + 1
    means = (tmp_path / "means.md").read_text()
    assert all(name in means for name in CONTENDERS)
    figures.draw_scales({"one": {"FedFroM": [(1.0, 0.9), (10.0, 0.8)]}}, tmp_path / "scales.png")
    accuracies = {("clip", None): [0.7, 0.8], ("clip", 1.0): [0.7, 0.7], ("cap", 2.0): [0.6, 0.7]}
    held = dict.fromkeys(accuracies, {"cosine": 0.9, "with 1e12 examples": 0.8, "at the bound": 0.7})
    tradeoff = tables.tradeoff(accuracies, held)
    tables.write_tradeoff(tradeoff, 2, tmp_path)
    figures.draw_tradeoff(tradeoff, (1.0, 2.0), tmp_path / "tradeoff.png")
    tables.write_accuracies({(10.0, 1, "none", "FedFroM"): 0.75, (10.0, 1, "none", "FedAvg"): 0.5}, tmp_path)
    tables.write_about(tmp_path, 1, 8)
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("scales.png", "tradeoff.png"))
