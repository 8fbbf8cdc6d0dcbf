"""The paper's Section 5.2: what is searched, on which half, and that nothing else leaks in."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fedfrom.errors import BadInput
from fedfrom.merging.methods.registry import make_method, methods
from simulations import training as plain_training
from simulations.batches import Tokens, training_batches
from simulations.studies.paper import data, findings, grids, summary, training
from simulations.studies.paper.arena import Arena, new_model, trained_state
from simulations.studies.paper.merging import Clients
from simulations.studies.paper.options import CANDIDATES, KINDS, TASKS, PaperOptions
from simulations.studies.paper.search import search
from simulations.studies.shelf import Shelf


@pytest.fixture(scope="module")
def options(tiny_model: str, tiny_glue: str) -> PaperOptions:
    return PaperOptions(
        model=tiny_model,
        glue_dir=tiny_glue,
        pooling="mean",
        seeds=1,
        base_steps=4,
        steps=(5, 4, 3),
        batch_size=8,
        max_length=16,
        lora_r=4,
        lora_alpha=8.0,
        lora_lr=0.02,
        full_lr=0.01,
        candidates=2,
        statistics_batches=1,
        precision="float32",
    ).checked()


@pytest.fixture(scope="module")
def shelf(options: PaperOptions, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """The base model and every task's state of both kinds, trained once."""
    found = Shelf(tmp_path_factory.mktemp("states"))
    training.train_base(options, 0, found)
    for kind in KINDS:
        for task in TASKS:
            training.train_task(options, kind, 0, task, found)
    return found


def parts(options: PaperOptions, kind: str, shelf: Shelf) -> tuple[Clients, Arena]:
    arena = Arena(options, kind, 0, shelf.get("base-s0"))
    return Clients.read(training.names(kind, 0, TASKS), arena.start, arena.config, 0, shelf), arena


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_has_one_row(kind: str) -> None:
    named = [name for row in grids.rows(kind) for name in (row.name, *row.also)]
    assert sorted(named) == sorted([*methods(), grids.SCALED])


@pytest.mark.parametrize("kind", KINDS)
def test_all_grids_are_of_one_size_and_every_setting_is_an_option(kind: str) -> None:
    for row in grids.rows(kind):
        assert len(row.grid) == CANDIDATES == len({tuple(sorted(setting.items())) for setting in row.grid})
        for setting in row.grid:
            own: dict[str, Any] = {name: value for name, value in setting.items() if name != "server_lr"}
            make_method("average" if row.method == "greedy-soup" else row.method, **own)


@pytest.mark.parametrize("count", [30, 71, 277, 5463])
def test_halves_share_no_example(count: int) -> None:
    first, second = data.halves(count, 400, 400)
    assert not set(first) & set(second)
    assert len(first) == min(400, count // 2) and len(second) == min(400, count - count // 2)
    assert set(first) | set(second) <= set(range(count))
    assert data.halves(count, 10, 400)[1] == second  # how many choose does not change who reports


def test_entailment_is_class_0_everywhere(options: PaperOptions) -> None:
    tokenizer = data.models.tokenizer(options.simulation("full", 0))
    for name, found in data.load(options).items():
        # the tiny tasks entail where the first sentence is good and the second bad
        for tokens in (found.train, found.validation, found.reported):
            for row, label in zip(tokens.rows, tokens.labels.tolist(), strict=True):
                words = tokenizer.convert_ids_to_tokens(row["input_ids"])
                positive = sum(word in ("good", "great", "fine") for word in words[: words.index("[SEP]")]) >= 2
                if name != "mnli":  # contradictions of the tiny MNLI look like its entailments
                    assert label == int(not positive), (name, words)
                assert label in (0, 1)
    labels = data.load(options)["mnli"].train.labels
    assert labels.sum() == 60  # neutral and contradiction of 90 rows


def test_pooled_data_are_what_the_tasks_see(options: PaperOptions) -> None:
    chosen, expected = [], []
    for task in TASKS:
        simulation, seed = options.simulation("lora", 0, options.task_steps(task)), data.order_seed(0, task)
        tokens = data.load(options)[task].train
        chosen.append((tokens, simulation, seed))
        for batch in training_batches(tokens, simulation, seed):
            expected += [(tuple(tokens.rows[row]["input_ids"]), int(tokens.labels[row])) for row in batch]
    pooled = data.pooled(chosen)
    found = [(tuple(row["input_ids"]), int(label)) for row, label in zip(pooled.rows, pooled.labels, strict=True)]
    assert sorted(found) == sorted(expected)
    assert len(pooled) == 8 * sum(options.steps)


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_is_shared_and_never_trained(options: PaperOptions, shelf: Shelf, kind: str) -> None:
    base = shelf.get("base-s0")
    assert any("classifier" in key for key in base)
    state = shelf.get(training.names(kind, 0, TASKS)[0])
    assert not any("classifier" in key or "word_embeddings" in key for key in state)
    model = new_model(options, kind, 0, base)
    assert torch.equal(dict(model.named_parameters())[_name(model, "classifier.weight")], base["classifier.weight"])
    before = trained_state(model, kind)
    moved = [key for key in state if not torch.equal(state[key], before[key])]
    assert moved, "training changed nothing"


def _name(model: torch.nn.Module, end: str) -> str:
    (name,) = (name for name, _ in model.named_parameters() if name.endswith(end))
    return name


def test_a_pair_is_read_as_two_sentences(options: PaperOptions, shelf: Shelf) -> None:
    model: Any = new_model(options, "base", 0, shelf.get("base-s0")).eval()
    tokenizer = data.models.tokenizer(options.simulation("base", 0))
    seen: list[torch.Tensor] = []
    model.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))

    def read(*pairs: tuple[str, str]) -> list[torch.Tensor]:
        first, second = zip(*pairs, strict=True)
        with torch.no_grad():
            model(**tokenizer(list(first), list(second), return_tensors="pt", padding=True))
        return list(seen.pop().chunk(4, dim=-1))

    u, v, difference, product = read(("good film", "the plot was dull"), ("a bad film", "fine"))
    torch.testing.assert_close(difference, (u - v).abs())
    torch.testing.assert_close(product, u * v)
    torch.testing.assert_close(u.square().sum(-1), torch.full((2,), 16.0))
    # neither the other sentence nor padding is heard
    torch.testing.assert_close(read(("good film", "is a"))[0], u[:1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(read(("the", "the plot was dull"))[1], v[:1], rtol=1e-4, atol=1e-5)
    assert (u[0] - u[1]).abs().max() > 0.01
    together = new_model(replace(options, apart=False), "base", 0, None)
    assert isinstance(together, data.models.MeanPoolingClassifier)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_a_head_of_its_own(options: PaperOptions, kind: str) -> None:
    together = replace(options, pooling="head")
    model = new_model(together, kind, 0, None)
    found = trained_state(model, kind)
    assert found and not any("classifier" in key or "word_embeddings" in key for key in found)
    arena = Arena(together, kind, 0, {})
    assert arena.score(found, ["rte"], data.REPORTED, None)["rte"]["total"] == 15
    assert any("classifier" in key for key in trained_state(new_model(together, "base", 0, None), "base"))


def test_a_tokenizer_that_marks_no_second_sentence_is_refused(
    options: PaperOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = data.models.tokenizer(options.simulation("full", 0))

    def unmarked(*args: Any, **kwargs: Any) -> Any:
        return {name: rows for name, rows in real(*args, **kwargs).items() if name != "token_type_ids"}

    unmarked.pad_token_id = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(data.models, "tokenizer", lambda simulation: unmarked)
    data.load.cache_clear()
    with pytest.raises(BadInput, match="--no-apart"):
        data.load(options)
    data.load(replace(options, apart=False))
    data.load.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_of_one_state_scores_as_that_state(options: PaperOptions, shelf: Shelf, kind: str) -> None:
    clients, arena = parts(options, kind, shelf)
    own = arena.score(clients.states[0], TASKS, data.REPORTED, None)
    state, report = clients.some([0]).merge("average", {})
    merged = arena.score(state, TASKS, data.REPORTED, report.config)
    base = arena.score(None, TASKS, data.REPORTED, None)
    for task in TASKS:
        assert merged[task]["loss"] == pytest.approx(own[task]["loss"], rel=1e-4)
        assert abs(base[task]["loss"] - own[task]["loss"]) > 1e-3, "the state changed nothing"


def merged_by(clients: Clients, method: str, setting: dict) -> dict | None:
    """The merged state; None where ACTMat refuses these updates, between which it interpolates."""
    try:
        return clients.merge(method, setting)[0]
    except ValueError as error:
        assert method == "actmat" and "interpolates" in str(error)
        return None


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_of_a_grid_gives_another_merge(options: PaperOptions, shelf: Shelf, kind: str) -> None:
    clients, _ = parts(options, kind, shelf)
    for row in grids.rows(kind):
        method = "average" if row.method == "greedy-soup" else row.method
        merged = [found for setting in row.grid if (found := merged_by(clients, method, setting)) is not None]
        assert len(merged) == len(row.grid) or row.method == "actmat"
        for i, one in enumerate(merged):
            assert all(torch.isfinite(tensor).all() for tensor in one.values())
            for other in merged[:i]:
                assert any(not torch.allclose(one[key], other[key], atol=1e-6) for key in one), (row.name, i)


def test_a_greedy_soup_is_scored_as_the_adapter_that_it_is(options: PaperOptions, shelf: Shelf) -> None:
    clients, arena = parts(options, "lora", shelf)
    seen: list[float] = []

    def validate(state: Mapping[str, torch.Tensor]) -> float:
        from simulations.studies.paper.search import _product

        seen.append(arena.score(state, ["qnli"], data.VALIDATION, _product(clients))["qnli"]["loss"])
        return 0.0

    clients.soup(validate)
    alone = [arena.score(state, ["qnli"], data.VALIDATION, None)["qnli"]["loss"] for state in clients.states]
    assert seen[:3] == pytest.approx(alone, rel=1e-4)


class Spy:
    """An arena that notes which halves are scored, and may be told what the reported half says."""

    def __init__(self, arena: Arena, accuracies: list[int], reported: int = 0) -> None:
        self.arena, self.accuracies, self.reported, self.halves = arena, accuracies, reported, list[str]()

    def score(self, state: Any, tasks: Any, half: str, config: Any) -> dict[str, dict[str, float]]:
        self.halves.append(half)
        right = self.reported if half == data.REPORTED else self.accuracies[len(self.halves) - 1]
        return {task: {"correct": right, "total": 10, "loss": 1.0} for task in tasks}


@pytest.mark.parametrize("kind", KINDS)
def test_the_search_chooses_on_the_validation_half_alone(options: PaperOptions, shelf: Shelf, kind: str) -> None:
    clients, arena = parts(options, kind, shelf)
    (row,) = (row for row in grids.rows(kind) if row.name == "from")
    for reported in (0, 10):
        spy: Any = Spy(arena, [3, 9, 4, 9], reported)
        found = search(row, 4, clients, spy)
        assert spy.halves == [data.VALIDATION] * 4 + [data.REPORTED]
        assert found["chosen"] == row.grid[1]  # the first of the best
        assert len(found["candidates"]) == 4


def test_among_equals_the_lower_loss_is_chosen(options: PaperOptions, shelf: Shelf) -> None:
    clients, arena = parts(options, "lora", shelf)

    class Lossy(Spy):
        def score(self, state: Any, tasks: Any, half: str, config: Any) -> dict[str, dict[str, float]]:
            found = super().score(state, tasks, half, config)
            return {task: {**one, "loss": 1.0 / len(self.halves)} for task, one in found.items()}

    spy: Any = Lossy(arena, [5, 5, 5])
    row = grids.rows("lora")[0]
    assert search(row, 3, clients, spy)["chosen"] == row.grid[2]


def test_the_greedy_soup_chooses_on_the_validation_half_alone(options: PaperOptions, shelf: Shelf) -> None:
    clients, arena = parts(options, "lora", shelf)
    (row,) = (row for row in grids.rows("lora") if row.name == "greedy-soup")
    # alone 5, 6, 4; the second with the first 7, with the third too 2; then two settings of the server's rate
    spy: Any = Spy(arena, [5, 6, 4, 7, 2, 1, 3])
    found = search(row, 2, clients, spy)
    assert spy.halves == [data.VALIDATION] * 7 + [data.REPORTED]
    assert found["clients"] == training.names("lora", 0, ("qnli", "rte"))
    assert found["chosen"] == row.grid[1]


@pytest.mark.parametrize("kind", KINDS)
def test_interference_and_misalignment_are_those_of_the_updates(options: PaperOptions, shelf: Shelf, kind: str) -> None:
    clients, _ = parts(options, kind, shelf)
    _, report = clients.merge("from", {"k": 1.0})
    layers = [
        {"norms": layer.norms, "weights": layer.weights, "cosines": layer.cosines}
        for layer in report.layers
        if layer.is_update
    ]
    # interference by hand: what each client loses, by its weight
    for k in (0.0, 2.0):
        _, report = clients.merge("from", {"k": k})
        lost = energy = 0.0
        for layer in (layer for layer in report.layers if layer.is_update):
            w, norms = np.array(layer.weights), np.array(layer.norms)
            inner = np.array(layer.cosines) * np.outer(norms, norms)
            lost += float(w @ (w @ inner @ w - 2 * inner @ w + norms**2))
            energy += float(w @ norms**2)
        assert report.interference == pytest.approx(lost / energy, rel=1e-3)
        # and the cosines of the merge with each update, from the updates themselves
        whole = [_whole(clients, state) for state in (*clients.states, clients.merge("from", {"k": k})[0])]
        turned = [1 - float(torch.cosine_similarity(whole[-1], one, dim=0)) for one in whole[:-1]]
        if kind == "full":  # a merged adapter is cut back to its rank
            assert findings.misalignment(layers, [0, 1, 2], k) == pytest.approx(np.mean(turned), abs=1e-3)
    assert findings.misalignment(layers, [1], 1.0) == pytest.approx(0.0, abs=1e-6)
    equal = [{"norms": [2.0, 2.0], "cosines": [[1.0, 0.0], [0.0, 1.0]]}]
    assert findings.misalignment(equal, [0, 1], 1.0) == pytest.approx(1 - 0.5**0.5)


def _whole(clients: Clients, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([(state[key] - clients.start[key]).flatten() for key in state])


def test_correlation_by_whole_clusters() -> None:
    made = [
        findings.Point(
            seed, ("qnli", "rte"), k, 0.1 * seed + 0.01 * k, 0.5 - 0.1 * seed - 0.01 * k, 0.02 * seed + 0.001 * k
        )
        for seed in range(4)
        for k in (0.0, 1.0, 8.0)
    ]
    straight, reverse = findings.correlate(made, "interference"), findings.correlate(made, "misalignment")
    assert straight is not None and reverse is not None
    assert straight.rho == pytest.approx(1) and straight.settled and straight.count == 12
    assert reverse.rho == pytest.approx(-1) and reverse.settled
    uneven = [replace(point, lost=round(point.lost * 25) % 3) for point in made]
    other = findings.correlate(uneven, "interference")
    xs, ys = zip(*((point.interference, point.lost) for point in uneven), strict=True)
    assert other is not None and other.rho == pytest.approx(stats.spearmanr(xs, ys)[0])
    flat = [replace(point, lost=0.0) for point in made]
    assert findings.correlate(flat, "interference") is None
    # twelve points of one cluster are one observation: the interval of two opposed clusters holds 0
    mixed = [replace(p, lost=p.interference if p.seed < 2 else -p.interference) for p in made]
    one = findings.correlate(mixed, "interference")
    assert one is not None and not one.settled


def test_what_k_alone_explains_is_no_prediction() -> None:
    def one(rho: float, low: float, high: float) -> findings.Correlation:
        return findings.Correlation(rho, low, high, 12)

    settled, open_, reverse = one(0.5, 0.2, 0.8), one(0.5, -0.2, 0.8), one(-0.5, -0.8, -0.2)
    said = summary.predicts
    assert said({"all k": settled, "k = 0": settled, "k = 1": open_}).endswith(": it predicts")
    assert said({"all k": settled, "k = 0": open_, "k = 1": None}).endswith("it is not shown to predict")
    assert said({"all k": settled, "k = 0": reverse}).endswith("it is not shown to predict")
    assert said({"all k": open_, "k = 0": settled}).endswith(": it does not predict")
    assert said({"all k": reverse, "k = 0": reverse}).endswith(": it predicts the reverse")
    assert said({"all k": None, "k = 0": None}) == "undefined"


def test_checkpoints_are_of_one_training(options: PaperOptions, shelf: Shelf) -> None:
    names = training.checkpoint_names("lora", 0)
    states = [shelf.get(name) for name in names]
    for earlier, later in zip(states, states[1:], strict=False):
        assert any(not torch.equal(earlier[key], later[key]) for key in earlier)
    # stopping on the way changes nothing: the first checkpoint is that of a shorter training
    simulation = options.simulation("lora", 0, 3)
    model = new_model(options, "lora", 0, shelf.get("base-s0"))
    tokens: Tokens = data.load(options)["qnli"].train
    plain_training.train(model, tokens, simulation, data.order_seed(0, "qnli"))
    short = trained_state(model, "lora")
    assert all(torch.equal(short[key], states[0][key]) for key in short)


def test_a_lost_state_is_named(options: PaperOptions, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="base-s0"):
        Shelf(tmp_path).get("base-s0")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"kinds": ("dora",)}, "--kinds"),
        ({"steps": (1, 2)}, "--steps"),
        ({"candidates": 7}, "--candidates"),
        ({"seeds": 0}, "--seeds"),
        ({"precision": "float16"}, "--precision"),
        ({"max_length": 1}, "--max-length"),
    ],
)
def test_bad_options_are_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(BadInput, match=named):
        replace(PaperOptions(), **wrong).checked()
