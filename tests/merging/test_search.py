"""Options chosen by validation: coefficients, alone and together with k."""

import json
import math

import pytest
import torch

from fedfrom import FroM, merge
from fedfrom.merging import MergeReport, TaskArithmetic
from fedfrom.merging.linalg.entries import Entries
from fedfrom.merging.methods import knots
from tests.merging.samples import TENSOR, adapter_case, tensor_case

GRID = (0.5, 1.0, 2.0)
METHODS = [
    "from",
    "task-arithmetic",
    "ties",
    "dare",
    "dare-ties",
    "dare-from",
    "knots-ta",
    "knots-ties",
    "knots-dare-ties",
    "tsv",
    "iso",
    "iso-cts",
    "core-ties",
    "core-dare-ties",
    "ctm",
]
CASES = [adapter_case(0, start="trained"), tensor_case(0)]


def nearest_to(wanted):
    """A validation function whose best state is that one."""
    return lambda state: -sum(float((state[key] - value).norm()) for key, value in wanted.items())


@pytest.mark.parametrize("case", CASES, ids=["adapter", "tensor"])
@pytest.mark.parametrize("method", METHODS)
def test_the_coefficient_that_scores_best_is_taken(method, case):
    for own in GRID:
        wanted, fixed = merge(**case.arguments(), method=method, coefficient=own)
        options = {"coefficient": "auto", "search": {"coefficient": GRID[::-1]}, "validate": nearest_to(wanted)}
        merged, report = merge(**case.arguments(), method=method, **options)
        assert all(torch.equal(merged[key], value) for key, value in wanted.items())
        assert report.method == fixed.method and report.layers == fixed.layers
        assert report.searched == ["coefficient"] and [row[0] for row in report.validation] == list(GRID)
        assert dict(report.validation)[own] == 0 == max(score for _, score in report.validation)


def test_every_combination_of_k_and_coefficient_is_tried():
    case, ks = tensor_case(1, n=4), (-0.5, 0.0, 0.5)
    wanted, fixed = merge(**case.arguments(), k=0.5, coefficient=0.7)
    options = {"k": "auto", "coefficient": "auto", "search": {"coefficient": (0.3, 0.7), "k": ks}}
    merged, report = merge(**case.arguments(), **options, validate=nearest_to(wanted))
    assert torch.equal(merged[TENSOR], wanted[TENSOR]) and report.layers == fixed.layers
    assert report.searched == ["k", "coefficient"]
    assert [row[:-1] for row in report.validation] == [(k, c) for k in ks for c in (0.3, 0.7)]
    again = MergeReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again == report
    old = {name: value for name, value in report.to_dict().items() if name != "searched"}
    assert MergeReport.from_dict(old).searched == ["k"]


def test_what_is_not_searched_stays_and_defaults_are_said():
    case = tensor_case(1)
    _, report = merge(**case.arguments(), coefficient="auto", k=2.0, validate=lambda state: 0.0)
    assert [c for c, _ in report.validation] == [0.3, 0.5, 0.7, 1.0, 1.5]
    assert report.method["k"] == 2 and report.method["coefficient"] == 0.3  # ties: the smaller
    settings = TaskArithmetic(coefficient="auto", validate=len).settings()
    assert settings["search"] == {"coefficient": [0.3, 0.5, 0.7, 1.0, 1.5]} and settings["coefficient"] == "auto"
    assert "search" not in TaskArithmetic().settings()


def test_the_bounds_know_froms_coefficient_and_fall_back_among_those_of_one_coefficient():
    opposed, zero = [{TENSOR: torch.tensor([x])} for x in (-1.0, 1.0)], {TENSOR: torch.zeros(1)}
    for c, allowed in ((1.5, 0.25), (-1.5, 0.25), (0.5, 2.0)):  # |c| (1 + k) < 2
        grid = {"k": (0, 0.25, 0.5, 1, 2)}
        answers = iter((0.0, 0.0, 0.0, 0.0, 1.0))
        _, report = merge(
            opposed, zero, k="auto", coefficient=c, search=grid, validate=lambda state, each=answers: next(each)
        )
        assert report.method["k"] == 2 and report.layers[0].k == allowed
    search, answers = {"k": (0, 1), "coefficient": (0.5, 1.0)}, iter((0.0, 0.0, 0.0, 1.0))
    options = {"k": "auto", "coefficient": "auto", "search": search, "validate": lambda state: next(answers)}
    _, report = merge(opposed, zero, **options)
    assert report.method["coefficient"] == 1 and report.layers[0].k == 0  # not k = 1 with the coefficient 1/2
    for c, alpha in ((1.0, 0.9), (3.0, 0.3), (-3.0, 0.3), (0.5, 1.0)):
        _, report = merge(opposed, zero, k=1, coefficient=c, server_lr="safe")
        assert report.layers[0].server_lr == pytest.approx(alpha) and report.layers[0].step == abs(c)


def test_what_candidates_share_is_computed_once(monkeypatch):
    counts = {"align": 0, "threshold": 0}
    align, threshold = knots.align, Entries.threshold

    def counted(*args):
        counts["align"] += 1
        return align(*args)

    def counted_threshold(*args):
        counts["threshold"] += 1
        return threshold(*args)

    monkeypatch.setattr(knots, "align", counted)
    monkeypatch.setattr(Entries, "threshold", counted_threshold)
    for method, expected in (("ties", 0), ("knots-ties", 1)):
        counts.update(align=0, threshold=0)
        case = adapter_case(2, n=3)
        merge(case.states, method=method, coefficient="auto", validate=lambda state: 0.0)
        assert counts == {"align": expected, "threshold": 3}


@pytest.mark.parametrize(
    ("method", "options", "named"),
    [
        ("ties", {"coefficient": "auto"}, "coefficient: expected validate=.*coefficient='auto', found None"),
        ("from", {"coefficient": "auto"}, "coefficient: expected validate="),
        ("ties", {"validate": len}, r"validate: expected with coefficient='auto' alone.*found coefficient=1\.0"),
        ("dare", {"search": {"coefficient": (1,)}}, "search: expected with coefficient='auto' alone"),
        ("from", {"validate": len}, r"expected with k='auto' or coefficient='auto' alone.*k=1\.0, coefficient=1\.0"),
        ("ties", {"coefficient": "auto", "validate": len, "search": {"k": (1,)}}, "search: expected coefficient"),
        (
            "from",
            {"k": "auto", "validate": len, "search": {"coefficient": (1,)}},
            r"search, 'coefficient': expected with coefficient='auto' alone, found coefficient=1\.0",
        ),
        (
            "ties",
            {"coefficient": "auto", "validate": len, "search": {"coefficient": (math.inf,)}},
            "coefficient: expected a finite number, found inf",
        ),
        ("knots-ta", {"coefficient": "best"}, "coefficient: expected a finite number, found 'best'"),
        ("from", {"coefficient": math.nan}, "coefficient: expected a finite number, found nan"),
        ("ties", {"coefficient": "auto", "validate": lambda state: math.nan}, "at least one coefficient, found none"),
    ],
)
def test_wrong_settings_are_named(method, options, named):
    with pytest.raises(ValueError, match=named) as caught:
        merge(tensor_case(0).states, method=method, **options)
    assert "\n" not in str(caught.value)


def test_froms_coefficient_multiplies_the_update():
    for case in CASES:
        merged, report = merge(**case.arguments(), coefficient=-0.7, rank=9 if TENSOR not in case.states[0] else None)
        expected = case.layer.target([-0.7 * w for w in case.layer.weights(1.0)])
        if TENSOR in merged:
            assert torch.allclose(merged[TENSOR], expected, rtol=1e-12, atol=1e-12)
        else:
            A, B = (next(value for key, value in merged.items() if f"lora_{part}" in key) for part in "AB")
            assert torch.allclose(B @ A, expected, rtol=1e-10, atol=1e-10)
        assert report.layers[0].weights == pytest.approx(case.layer.weights(1.0))
    assert FroM().coefficients(weights := torch.ones(2)) is weights
