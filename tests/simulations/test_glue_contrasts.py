"""The intervals of the GLUE study: scores on drawn examples, contrasts, and several tests at once."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, matthews_corrcoef

from simulations.studies.glue.contrasts import RAW, Evidence, holm
from simulations.studies.glue.kept import packed
from simulations.studies.glue.plan import KIND, MERGE, OWN
from simulations.studies.glue.resampling import counts, scores

SEEDS, TASKS, N = (1, 2, 3), ("sst2", "cola", "stsb"), 400


@pytest.mark.parametrize("kind", ["accuracy", "matthews", "spearman"])
def test_scores_of_drawn_examples_are_those_of_the_examples_repeated(kind: str) -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, N) if kind != "spearman" else generator.normal(size=N)
    answers = np.stack([np.where(generator.random(N) < share, labels, 1 - labels) for share in (0.9, 0.6)])
    drawn = counts(generator, N, 20)
    assert (drawn[0] == 1).all() and (drawn.sum(1) == N).all() and drawn[1:].std() > 0.5
    found = scores(kind, labels, answers, drawn)
    oracle: Any = {"accuracy": accuracy_score, "matthews": matthews_corrcoef}.get(kind, lambda y, x: spearmanr(y, x)[0])
    # Spearman's ranks are those among all examples, so a drawn sample's is near, not the same
    limit = 0.05 if kind == "spearman" else 1e-12
    for row, times in zip(found, drawn.astype(int), strict=True):
        again = np.repeat(np.arange(N), times)
        expected = [oracle(labels[again], one[again]) for one in answers]
        np.testing.assert_allclose(row, expected, atol=limit)
    np.testing.assert_allclose(found[0], [oracle(labels, one) for one in answers], atol=1e-12)
    assert scores(kind, labels, np.zeros((1, N)), drawn)[0, 0] == (0 if kind != "accuracy" else (labels == 0).mean())


class Kept:
    """A frame whose methods are right on a share of the examples that is theirs."""

    def __init__(self, shares: dict[str, float]) -> None:
        self.study = type("Study", (), {"tasks": TASKS})()
        self._beside, rows = {}, []
        for task in TASKS:
            generator = np.random.default_rng(len(task))
            labels = generator.integers(0, 2, N) if task != "stsb" else generator.normal(size=N).astype(np.float32)
            for seed in SEEDS:
                order = generator.permutation(N)

                def right(share: float, order: Any = order, labels: Any = labels) -> Any:
                    wrong = order[round(share * N) :]
                    answers = labels.copy()
                    answers[wrong] = 1 - answers[wrong] if answers.dtype == int else -answers[wrong]
                    return answers

                self._beside[f"{OWN}/{KIND}/{seed}/{task}"] = {
                    "labels": packed(labels),
                    "answers": {OWN: {task: packed(right(0.95))}},
                }
                for name, share in shares.items():
                    cell = self._beside.setdefault(f"{MERGE}/{KIND}/{seed}/{name}", {"answers": {"full": {}}})
                    cell["answers"]["full"][task] = packed(right(share))
                own = 0.95 if task == "sst2" else 0.8
                rows.append({"part": OWN, "seed": seed, "task": task, "score": own, "constant": own - 0.3})
        self._rows = pd.DataFrame(rows)

    def rows(self) -> pd.DataFrame:
        return self._rows

    def beside(self, cell: str) -> dict[str, Any]:
        return self._beside[cell]


def evidence(frame: Any, *methods: str) -> Evidence:
    return Evidence(frame, "full", methods, SEEDS)


def test_a_contrast_is_the_difference_of_the_means_and_its_interval_holds_it() -> None:
    found = evidence(Kept({"a": 0.85, "b": 0.75}), "a", "b")
    raw = found.contrast("a", "b", RAW)
    assert raw.low < raw.by_seeds.mean < raw.high and raw.interval.half_width >= raw.by_seeds.half_width
    assert raw.by_seeds.mean == pytest.approx(np.mean(list(raw.without.values())))
    assert 0.08 < raw.by_seeds.mean < 0.3 and raw.p < 0.05
    share = found.contrast("a", "b")
    assert share.by_seeds.mean > raw.by_seeds.mean  # of a lead below 1
    reverse = found.contrast("b", "a")
    assert reverse.by_seeds.mean == pytest.approx(-share.by_seeds.mean) and reverse.p == pytest.approx(
        share.p, abs=2e-3
    )
    same = found.contrast("a", "a")
    assert same.by_seeds.mean == same.low == same.high == 0


def test_the_bootstrap_is_as_wide_as_the_examples_make_it() -> None:
    frame = Kept({"a": 0.85, "b": 0.85})
    for seed in SEEDS:  # b is wrong on other examples than a, as often
        for task in ("sst2", "cola"):
            cell = frame.beside(f"{MERGE}/{KIND}/{seed}/b")["answers"]["full"]
            cell[task] = frame.beside(f"{MERGE}/{KIND}/{SEEDS[seed % 3]}/a")["answers"]["full"][task]
    found = evidence(frame, "a", "b").contrast("a", "b", RAW)
    # in sst2 all seeds score alike, so that seeds alone would say nothing of it
    assert found.high - found.low > 0.01


def test_holm_is_the_step_down_method() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0]) and holm([]) == []
