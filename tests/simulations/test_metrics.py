"""GLUE's metrics against values worked out by hand."""

import numpy as np
import pytest

from simulations import metrics

LABELS = np.array([1, 1, 1, 0, 0, 1])
PREDICTIONS = np.array([1, 0, 1, 0, 1, 1])  # 3 true, 1 false positive, 1 true, 1 false negative


def test_accuracy() -> None:
    assert metrics.scores("rte", PREDICTIONS, LABELS) == {"accuracy": 4 / 6, "score": 4 / 6}


def test_f1_is_of_class_one_and_the_score_is_the_mean() -> None:
    f1 = 2 * 3 / (2 * 3 + 1 + 1)
    assert metrics.scores("mrpc", PREDICTIONS, LABELS) == pytest.approx(
        {"accuracy": 4 / 6, "f1": f1, "score": (4 / 6 + f1) / 2}
    )


def test_matthews() -> None:
    expected = (3 * 1 - 1 * 1) / np.sqrt((3 + 1) * (3 + 1) * (1 + 1) * (1 + 1))
    assert metrics.scores("cola", PREDICTIONS, LABELS)["score"] == pytest.approx(expected)


def test_correlations() -> None:
    labels = np.array([0.0, 1.0, 2.0, 3.0])
    found = metrics.scores("stsb", labels**3, labels)
    assert found["spearman"] == pytest.approx(1)
    assert found["pearson"] == pytest.approx(np.corrcoef(labels**3, labels)[0, 1])


def test_a_constant_answer_has_no_correlation() -> None:
    assert metrics.scores("stsb", np.zeros(4), np.arange(4.0))["score"] == 0
    assert metrics.scores("cola", np.zeros(4, int), np.array([0, 1, 0, 1]))["score"] == 0


def test_what_a_constant_answer_scores() -> None:
    assert metrics.constant_score("sst2", LABELS) == pytest.approx(4 / 6)
    assert metrics.constant_score("mrpc", LABELS) == pytest.approx((4 / 6 + 2 * 4 / (2 * 4 + 2)) / 2)
    assert metrics.constant_score("cola", LABELS) == 0
    assert metrics.constant_score("stsb", np.arange(4.0)) == 0
