"""Strategies that merge by what clients know of their data, in whole runs of the two apps."""

import io
from typing import Any

import pytest
import torch
from rich.console import Console

from fedfrom import client
from fedfrom.errors import BadInput
from simulations import client_app, client_statistics, models, partitions, server_app, tasks
from simulations.batches import Tokens, tokenise
from simulations.experiment import Experiment
from simulations.history import History
from simulations.narration import Narrator
from simulations.options import Options
from tests.inprocess import InProcessGrid

NEEDY = ("regmean", "lorm", "fisher")


def run(values: dict[str, Any]) -> dict[str, History]:
    """Run the two apps over an in-process grid and return what each strategy did."""
    client_app._workers.clear()
    experiment = Experiment.prepare(Options.from_mapping(values))
    grid = InProcessGrid(client_app.app, experiment.options.clients)
    narrator = Narrator(Console(file=io.StringIO()))
    return {history.label: history for history in server_app.compare(grid, experiment, narrator)}


@pytest.mark.parametrize("more", [{}, {"full": True, "lr": 1e-3}, {"task": "stsb"}])
def test_strategies_that_need_statistics_get_them(tiny: dict, more: dict) -> None:
    histories = run({**tiny, **more, "rounds": 1, "strategies": ",".join([*NEEDY, "average", "fedavg"])})
    for name in NEEDY:
        assert [len(report["nodes"]) for report in histories[name].reports.values()] == [3]
        assert not any(report["rejected"] for report in histories[name].reports.values())
        state, mean = histories[name].state, histories["average"].state
        assert not all(torch.allclose(state[key], mean[key], atol=1e-4) for key in state)
        # each round brings the statistics up, as many bytes for fisher as there are weights
        assert histories[name].total("bytes_up") > 1.2 * histories["average"].total("bytes_up")
    assert histories["average"].total("bytes_up") == histories["fedavg"].total("bytes_up")


def test_gram_matrices_go_with_adapters_of_any_rank(tiny: dict) -> None:
    histories = run({**tiny, "strategies": "regmean,lorm:off_diagonal=0.5", "ranks": "2,4,8"})
    for history in histories.values():
        assert [len(report["nodes"]) for report in history.reports.values()] == [3, 3]
        assert not any(report["rejected"] for report in history.reports.values())


def test_specs_say_what_they_need() -> None:
    found = {
        spec: client_statistics.needed(spec)
        for spec in ("regmean:off_diagonal=0.1", "lorm", "fisher", "from", "fedavg")
    }
    assert found == {
        "regmean:off_diagonal=0.1": "gram",
        "lorm": "gram",
        "fisher": "fisher",
        "from": None,
        "fedavg": None,
    }


@pytest.fixture
def client_of(tiny: dict) -> Any:
    """Return the model, the tokens and the options of one client."""

    def build(**more: Any) -> tuple[torch.nn.Module, Tokens, Options]:
        options = Options.from_mapping({**tiny, **more})
        share = partitions.split(options, tasks.load(options))[0]
        head = models.Head(share.task.num_labels, share.task.regression)
        tokens = tokenise(share.examples, models.tokenizer(options), options, head.regression)
        return models.build(options, head), tokens, options

    return build


def test_statistics_are_of_so_many_batches_of_the_clients_own_examples(client_of: Any) -> None:
    model, tokens, options = client_of(steps=1, statistics_batches=2)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(5)).tolist()
    chosen = [tokens.batch(order[:8]), tokens.batch(order[8:16])]  # more than the steps that were trained
    found = client_statistics.compute("gram", model, tokens, options, 5)
    expected = client.gram(model, [inputs for inputs, _ in chosen])
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_fisher_is_of_the_tasks_own_likelihood(client_of: Any, task: str) -> None:
    model, tokens, options = client_of(task=task, statistics_batches=99)
    found = client_statistics.compute("fisher", model, tokens, options, 5)
    model.eval()
    (name, bias) = next((n, p) for n, p in model.named_parameters() if n.endswith("default.bias"))
    squares = torch.zeros_like(bias)
    for row in range(len(tokens)):  # all of them, each once
        inputs, labels = tokens.batch([row])
        logits = models.logits(model, inputs).detach()
        # d/db of -log softmax, and of (output - label)^2 / 2
        slope = logits.softmax(-1) - torch.nn.functional.one_hot(labels, 2) if task == "sst2" else logits - labels
        squares += slope[0].square() / len(tokens)
    assert name.endswith("classifier.modules_to_save.default.bias")
    assert torch.allclose(found["base_model.model.classifier.bias"], squares, rtol=1e-4)


def test_greedy_soup_needs_examples_to_choose_by(tiny: dict) -> None:
    with pytest.raises(BadInput, match="greedy-soup.*--validation-examples"):
        Experiment.prepare(Options.from_mapping({**tiny, "strategies": "greedy-soup"}))
    with pytest.raises(BadInput, match="--statistics-batches: expected 1 or more"):
        Options(statistics_batches=0).validated()
