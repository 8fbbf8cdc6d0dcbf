"""The study of merged bodies on GLUE: its rows, its models, its scores and its choice of a scale."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from fedfrom.tuning.halving import halved, scales
from simulations import models
from simulations.studies.frame import Frame
from simulations.studies.glue import bodies, data, plan, summary
from simulations.studies.glue.arena import Answers, Arena
from simulations.studies.glue.kept import packed, unpacked
from simulations.studies.glue.options import GlueOptions
from simulations.studies.glue.rows import ROWS
from simulations.studies.glue.scales import EQUAL_NORM, PROJECTION, around, data_free
from simulations.studies.running import run


@pytest.fixture
def options(tiny_model: str, tiny_glue: str, tmp_path: Path) -> GlueOptions:
    return GlueOptions(
        out=str(tmp_path / "glue"),
        cache=str(tmp_path / "cache"),
        glue_dir=tiny_glue,
        model=tiny_model,
        lora_r=2,
        precision="float32",
        lora_alpha=4.0,
        lr=0.02,
        batch_size=8,
        tuning_examples=20,
        first_examples=8,
        reported_examples=25,
        scales=4,
        seeds=2,
    )


def trained(options: GlueOptions, task: str = "sst2", seed: int = 0) -> data.TaskData:
    found = data.load(options)[task]
    bodies.ensure(options, seed, found)
    return found


def test_rows_to_tune_on_are_in_no_training(options: GlueOptions) -> None:
    found = data.load(options)["qnli"]
    assert [len(found.train), len(found.tuning), len(found.reported)] == [70, 20, 25]
    everything = data.load(replace(options, tuning_examples=90 - 1))["qnli"]
    key = [str(row) for row in everything.tuning.rows + everything.train.rows]
    assert sorted(str(row) for row in found.tuning.rows + found.train.rows) == sorted(key)
    assert data.load(options)["qnli"].tuning.rows == found.tuning.rows


def test_a_class_that_a_task_does_not_have_is_never_the_answer(options: GlueOptions) -> None:
    options = replace(options, suite="nli")
    found = data.load(options)["qnli"]
    assert found.head.num_labels == 3 and set(found.train.labels.tolist()) == {0, 2}
    bodies.ensure(options, 0, found)
    arena = Arena(options, 0, {"qnli": found})
    arena.load(bodies.body(options, 0, "qnli"), 1.0)
    answers = arena.reported()["qnli"]
    bias = answers.bias()
    assert bias is not None and bias[1] == pytest.approx(0, abs=1e-6) and 1 not in (answers.outputs + bias).argmax(1)
    assert np.isneginf(answers.outputs[:, 1]).all() and np.isfinite(answers.outputs[:, [0, 2]]).all()
    assert data.load(options)["snli"].head.num_labels == 3 and not data.load(options)["snli"].absent


def test_a_loaded_body_answers_as_the_adapter_in_peft_does(options: GlueOptions) -> None:
    found = trained(options)
    simulation = options.simulation("sst2", 0)
    model = models.adapt(models.base_model(simulation, found.head), simulation, options.lora_r)
    models.load_trained_state(model, bodies.shelf(options).get("sst2-s0"))
    inputs, _ = found.reported.batch(list(range(25)))
    with torch.no_grad():
        expected = models.logits(model.eval(), inputs).numpy()
    arena = Arena(options, 0, {"sst2": found})
    arena.load(bodies.body(options, 0, "sst2"), options.lora_alpha / options.lora_r)
    found_outputs = arena.reported()["sst2"].outputs
    np.testing.assert_allclose(found_outputs, expected, atol=1e-5)
    assert np.abs(found_outputs - _pretrained(arena, options)).max() > 1e-2  # the body does something
    # and again after another body was loaded
    arena.load(bodies.body(options, 0, "sst2"), options.lora_alpha / options.lora_r)
    np.testing.assert_array_equal(arena.reported()["sst2"].outputs, found_outputs)


def _pretrained(arena: Arena, options: GlueOptions) -> Any:
    arena.load(bodies.body(options, 0, "sst2"), 0.0)
    return arena.reported()["sst2"].outputs


def test_a_bias_fitted_anew_has_the_lowest_cross_entropy() -> None:
    generator = np.random.default_rng(0)
    logits = (generator.normal(size=(60, 3)) + [2.0, 0.0, -1.0]).astype(np.float32)
    answers = Answers("mnli", logits, generator.integers(0, 3, 60))

    def loss(bias: Any) -> float:
        shifted = logits.astype(np.float64) + bias
        own = shifted[np.arange(60), answers.labels]
        return float((np.log(np.exp(shifted).sum(1)) - own).mean() + 0.5e-3 * (bias**2).sum())

    bias = answers.bias()
    assert bias is not None
    np.testing.assert_allclose(bias, minimize(loss, np.zeros(3), tol=1e-12).x, atol=1e-4)
    assert answers.score(bias) > answers.score()
    assert Answers("stsb", logits[:, :1], generator.normal(size=60)).bias() is None


def test_successive_halving_tries_all_on_few_rows_and_the_better_half_on_all() -> None:
    few, every = {1.0: 0.1, 2.0: 0.5, 3.0: 0.4, 4.0: 0.0}, {2.0: 0.2, 3.0: 0.3}
    best, tried = halved([1.0, 2.0, 3.0, 4.0], few.__getitem__, every.__getitem__)
    assert best == 3.0
    assert [(trial["scale"], trial["rows"]) for trial in tried] == [
        *((scale, "first") for scale in few),
        *((scale, "all") for scale in (2.0, 3.0)),
    ]
    assert halved([1.0, 2.0], lambda scale: 0.5, lambda scale: 0.5)[0] == 1.0
    assert around([1.0, 2.0, 3.0], 2.0) == [1.0, 2.0, 3.0] and around([1.0, 2.0, 3.0], 3.0) == [2.0, 3.0]
    assert scales(9)[0] == 0.25 and scales(9)[4] == 1.0 and scales(9)[-1] == 4.0 and len(set(scales(9))) == 9


def test_the_average_of_bodies_is_the_mean_of_their_products(options: GlueOptions) -> None:
    for task in options.tasks:
        trained(options, task)
    merged = plan._merge(options, ROWS[0], 0, options.lora_r * len(options.tasks), data.load(options))
    states = [bodies.body(options, 0, task) for task in options.tasks]
    for key in (key for key in merged if "lora_B" in key):
        other = key.replace("lora_B", "lora_A")
        expected = 2.0 * sum(state[key].double() @ state[other].double() for state in states) / len(options.tasks)
        assert (merged[key].double() @ merged[other].double() - expected).norm() <= 1e-5 * expected.norm()


def test_norms_in_proportion_to_their_power_keep_their_sum(options: GlueOptions) -> None:
    states = []
    for task in ("sst2", "stsb", "cola"):
        trained(options, task)
        states.append(bodies.body(options, 0, task))
    key = next(key for key in states[0] if "lora_B" in key)

    def products(k: float) -> list[torch.Tensor]:
        found = bodies.with_norms(states, k)
        return [state[key].double() @ state[key.replace("lora_B", "lora_A")].double() for state in found]

    before = [float(product.norm()) for product in products(1.0)]
    assert all(
        torch.equal(one[key], other[key]) for one, other in zip(bodies.with_norms(states, 1.0), states, strict=True)
    )
    for k in (0.0, 2.0):
        after = [float(product.norm()) for product in products(k)]
        ratio = [new / old**k for new, old in zip(after, before, strict=True)]
        assert ratio == pytest.approx([ratio[0]] * 3, rel=1e-5) and sum(after) == pytest.approx(sum(before), rel=1e-5)
        for one, other in zip(products(k), products(1.0), strict=True):
            assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 1 - 1e-6


def test_scales_without_rows_do_what_they_say() -> None:
    generator = torch.Generator().manual_seed(0)

    def adapter() -> dict[str, torch.Tensor]:
        shapes = {"lora_A": (2, 9), "lora_B": (7, 2)}
        return {f"{m}.{part}.weight": torch.randn(of, generator=generator) for m in "ab" for part, of in shapes.items()}

    def dense(state: dict[str, torch.Tensor]) -> torch.Tensor:
        pairs = [state[f"{m}.lora_B.weight"].double() @ state[f"{m}.lora_A.weight"].double() for m in "ab"]
        return torch.cat(pairs).flatten()

    states, body = [adapter() for _ in range(3)], adapter()
    for key in body:  # a body that is near the first
        body[key] = body[key] + 3 * states[0][key]
    found = data_free(body, states, 2.0)
    thetas, merged = [2.0 * dense(state) for state in states], dense(body)
    mean = sum(float(theta.norm()) for theta in thetas) / 3
    assert found[EQUAL_NORM] * float(merged.norm()) == pytest.approx(mean)
    shares = [float(merged @ theta / theta.square().sum()) for theta in thetas]
    assert found[PROJECTION] * sum(shares) / 3 == pytest.approx(0.5)


def test_answers_are_kept_as_text() -> None:
    assert unpacked(packed(np.array([1, 0, 2])), regression=False).tolist() == [1, 0, 2]
    scores = np.array([0.1, 4.2, 5.0], np.float32)
    np.testing.assert_allclose(unpacked(packed(scores), regression=True), scores, rtol=1e-3)


@pytest.mark.slow
def test_the_whole_study_runs_and_resumes(options: GlueOptions, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(plan, "GATE", 1e-6)  # tiny models learn little
    monkeypatch.setattr(summary, "GATE", 1e-6)
    study = plan.study(options)
    frame = Frame(tmp_path / "work", study)
    run(frame, say=lambda text: None)
    rows = frame.rows()
    merged = rows[rows["part"] == plan.MERGE]
    assert not frame.missing() and set(merged["method"]) == {row.name for row in ROWS}
    assert set(merged["setting"]) >= {plan.PUBLISHED, plan.TUNED} and set(merged["rank"]) == {"full", "2"}
    assert merged[merged["setting"] == plan.TUNED]["scale"].isin(scales(4)).all()
    summary.write(frame, tmp_path / "tables")
    assert (tmp_path / "tables" / "methods.md").read_text().count("| average |") == 7
    monkeypatch.setattr(plan, "_own", None)
    monkeypatch.setattr(plan, "_merged", None)
    run(Frame(tmp_path / "work", study), say=lambda text: None)
