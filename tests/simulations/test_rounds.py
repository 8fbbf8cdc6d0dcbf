"""Whole runs of the two apps over an in-process Grid, and the folder that comes of them."""

import io
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from flwr.app import Context, RecordDict
from rich.console import Console

from fedfrom.errors import BadInput
from fedfrom.merging.peft import layers as L
from simulations import client_app, evaluate, models, results, server_app, traffic, training
from simulations.experiment import Experiment
from simulations.history import History, Round, client_weights
from simulations.narration import Narrator
from simulations.options import Options
from tests.conftest import ROOT
from tests.folders import config_of, done, same_bits
from tests.inprocess import InProcessGrid
from tests.merging.oracle import relative_error


class Ran:
    """A finished run: what was asked, what came out, what was said, what was written."""

    def __init__(self, values: dict[str, Any], grid_seed: int = 0) -> None:
        client_app._workers.clear()
        self.console = io.StringIO()
        narrator = Narrator(Console(file=self.console, width=200))
        with results.Folder(values["out"]) as folder:
            self.experiment = Experiment.prepare(Options.from_mapping(values))
            grid = InProcessGrid(client_app.app, self.experiment.options.clients, seed=grid_seed)
            narrator.settings(self.experiment)
            narrator.partition(self.experiment)
            self.histories = list(server_app.compare(grid, self.experiment, narrator))
            folder.publish(self.experiment, self.histories)
        narrator.table(self.experiment, self.histories)
        self.folder = folder.path
        self.said = self.console.getvalue()
        self.json = json.loads((self.folder / "results.json").read_text())


@pytest.fixture
def names() -> list[str]:
    return ["from", "fedavg", "average", "factor-average", "from:k=1:examples_power=0"]


@pytest.mark.pictures
def test_strategies_start_alike_and_all_is_written(tiny: dict, names: list[str]) -> None:
    ran = Ran({**tiny, "strategies": ",".join(names)})
    assert [history.label for history in ran.histories] == names
    assert len({history.curve[0] for history in ran.histories}) == 1
    for history in ran.histories:
        assert [entry.number for entry in history.rounds] == [0, 1, 2]
        for entry in history.rounds[1:]:
            assert set(entry.clients) == {0, 1, 2}
            assert entry.seconds >= entry.server_seconds > 0
            if history.label != "fedavg":
                assert sum(entry.weights.values()) == pytest.approx(1)
                assert set(entry.weights) == {0, 1, 2}
    assert {path.name for path in ran.folder.iterdir()} == {
        "results.json",
        "comparison.png",
        "updates.png",
        "partition.png",
        *map(results.folder_name, names),
    }
    assert not [path for path in ran.folder.parent.iterdir() if path.name.startswith(".")]
    written = ran.json["strategies"]["from"]
    assert written["final"] == ran.histories[0].final
    assert written["rounds"][2]["weights"].keys() == {"0", "1", "2"}
    assert written["reports"]["1"]["clients"].__len__() == 3
    assert [entry["examples"] for entry in ran.json["partition"]] == [30, 30, 30]
    for text in ("sst2", "round 2/2", "client 1", "examples/s", "final", "rounds to", "bytes up"):
        assert text in ran.said


def test_auto_chooses_on_examples_that_no_score_is_of(tiny: dict) -> None:
    ran = Ran({**tiny, "strategies": "from:k=auto,from", "validation_examples": 10, "eval_examples": 0})
    task = ran.experiment.tasks[0]
    texts = [list(zip(part["text"], part["label"], strict=True)) for part in (task.validation, task.held_out)]
    assert len(texts[0]) == 10 and len(texts[1]) == 20 == len(ran.experiment.held_out[0])
    metrics = ran.json["strategies"]["from:k=auto"]["rounds"][2]["train-metrics"]
    assert metrics["k"] in (0.0, 0.25, 0.5, 1.0, 2.0)
    report = ran.json["strategies"]["from:k=auto"]["reports"]["2"]["merge"]
    # a score is a share of the ten
    assert all(score * 10 == pytest.approx(round(score * 10)) for _, score in report["validation"])
    assert metrics["validation-score"] == max(score for _, score in report["validation"])
    assert "k" not in ran.json["strategies"]["from"]["rounds"][2]["train-metrics"]


def test_a_greedy_soup_over_rounds(tiny: dict) -> None:
    ran = Ran({**tiny, "strategies": "greedy-soup", "validation_examples": 10})
    for entry in ran.histories[0].rounds[1:]:
        assert entry.weights and set(entry.weights) <= {0, 1, 2} and sum(entry.weights.values()) == pytest.approx(1)


@pytest.mark.parametrize("count", [0, 30])
def test_auto_without_examples_to_choose_by_is_refused(tiny: dict, count: int) -> None:
    with pytest.raises(BadInput, match="--validation-examples"):
        Ran({**tiny, "strategies": "from:k=auto", "validation_examples": count})


def test_distance_from_the_mean_of_products(tiny: dict) -> None:
    ran = Ran({**tiny, "strategies": "average:examples_power=1:rank=4,factor-average:examples_power=1", "lora_r": 16})
    exact, factors = ([entry.distance_from_mean for entry in history.rounds[1:]] for history in ran.histories)
    # three clients from one adapter: the mean of their products has a rank of at most 4 times 16
    assert all(0 < value < 1 for value in exact) and all(value > 0.01 for value in factors)


def test_bytes_are_those_of_the_arrays(tiny: dict) -> None:
    ran = Ran({**tiny, "strategies": "from,fedavg"})
    each = sum(tensor.numel() * 4 for tensor in ran.experiment.initial.values())
    for history in ran.histories:
        for entry in history.rounds[1:]:
            # Each array carries NumPy's header of 128 bytes.
            assert entry.bytes_up == 3 * (each + 128 * len(ran.experiment.initial))
            assert entry.bytes_down == pytest.approx(entry.bytes_up, rel=1e-6)


def test_the_same_seed_gives_the_same_run_on_other_nodes(tiny: dict) -> None:
    first, again, other = (Ran({**tiny, "seed": seed}, grid_seed) for seed, grid_seed in ((0, 0), (0, 99), (1, 0)))
    for one, two in zip(first.histories, again.histories, strict=True):
        assert one.curve == two.curve
        assert [entry.weights for entry in one.rounds] == [entry.weights for entry in two.rounds]
        assert same_bits(one.state, two.state)
    assert not same_bits(first.histories[0].state, other.histories[0].state)


def test_rounds_that_are_not_scored_leave_the_others_as_they_are(tiny: dict) -> None:
    every, second = (Ran({**tiny, "rounds": 5, "eval_every": each, "out": f"{tiny['out']}-{each}"}) for each in (1, 2))
    for one, two in zip(every.histories, second.histories, strict=True):
        assert [entry.number for entry in two.scored] == [0, 2, 4, 5] and len(two.rounds) == 6
        assert [entry.scores for entry in two.scored] == [one.rounds[entry.number].scores for entry in two.scored]
        assert same_bits(one.state, two.state)
        reached = two.rounds_to(max(two.curve))
        assert reached in (0, 2, 4, 5) and one.rounds[reached].scores["score"] == max(two.curve)
    assert second.json["strategies"]["from"]["rounds"][1]["scores"] == {}
    assert "round 1/5  not scored" in second.said and "round 5/5  accuracy" in second.said


def test_peft_loads_the_final_adapter(tiny: dict) -> None:
    from peft import PeftModel

    ran = Ran({**tiny, "strategies": "from"})
    base = models.base_model(ran.experiment.options, models.Head(2, False))
    loaded = PeftModel.from_pretrained(base, str(ran.folder / "from"))
    state = models.trained_state(loaded)
    assert state.keys() == ran.histories[0].state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in ran.histories[0].state.items())


@pytest.mark.parametrize(
    "more", [{}, {"full": True, "lr": 1e-3}, {"rslora": True, "ranks": "2,4", "strategies": "from"}]
)
def test_a_loaded_model_scores_what_the_results_say(tiny: dict, more: dict) -> None:
    ran = Ran({**tiny, "strategies": "from,fedavg", **more})
    for history in ran.histories:
        loaded = results.load_model(ran.folder, history.label)
        scores = training.evaluate(loaded, ran.experiment.held_out[0], "sst2")
        assert scores == pytest.approx(history.rounds[-1].scores, rel=1e-6)
    with pytest.raises(BadInput, match="no results of strategy nothing"):
        results.load_model(ran.folder, "nothing")


@pytest.mark.parametrize("more", [{}, {"ranks": "2,4"}, {"full": True, "lr": 1e-3, "task": "sst2"}])
def test_what_clients_sent_last_is_saved_when_asked(tiny: dict, more: dict) -> None:
    ran = Ran({**tiny, **more, "strategies": "from", "save_clients": True})
    options, history = ran.experiment.options, ran.histories[0]
    assert sorted(history.client_states) == [0, 1, 2]
    folders = [results.client_folder(ran.folder, "from", client) for client in range(3)]
    assert sorted(folders[0].parent.iterdir()) == folders and folders[0].parent == ran.folder / "from-clients"
    for client, folder in enumerate(folders):
        state = models.trained_state(results.load_weights(options, 2, folder))
        assert same_bits(state, history.client_states[client])
        if not options.full:
            assert config_of(folder)["r"] == options.client_rank(client)
    assert not same_bits(history.client_states[0], history.client_states[1])
    assert not (Ran({**tiny, **more, "strategies": "from"}).folder / "from-clients").exists()


@pytest.mark.parametrize("more", [{}, {"full": True, "lr": 1e-3}])
def test_clients_merged_on_disk_score_what_the_report_says(tiny: dict, more: dict, tmp_path: Path, capsys) -> None:
    """The mean of what clients sent last is the same on disk and in the run, and so is its score."""
    label, out = "average:clip=none", tmp_path / "merged"
    ran = Ran({**tiny, **more, "strategies": label, "save_clients": True})
    clients = [str(results.client_folder(ran.folder, label, client)) for client in range(3)]
    done(capsys, "merge", str(out), *clients, "--method", "average")
    options, history = ran.experiment.options, ran.histories[0]
    found = models.trained_state(results.load_weights(options, 2, out))
    scaling = 1.0 if options.full else options.lora_alpha / options.lora_r  # the merged one carries it in B
    assert relative_error(weights_of(found, 1.0), weights_of(history.state, scaling)) <= 1e-6
    folder = ran.folder / results.folder_name(label)
    score = f"{history.final:.6f}"
    assert evaluated(capsys, ran.folder, out) == [f"{score}  {folder} (the report says {score})", f"{score}  {out}"]


def weights_of(state: dict[str, torch.Tensor], scaling: float) -> torch.Tensor:
    """All that a state adds to its base or replaces of it, as one row: products of factors, and plain tensors."""
    layers = L.find_layers(state, "state").values()
    parts = [
        L.read_adapter(layer, state, scaling, "state").dense() if layer.is_adapter else state[layer.keys["tensor"]]
        for layer in layers
    ]
    return torch.cat([part.double().reshape(-1) for part in parts])


def evaluated(capsys: pytest.CaptureFixture[str], *folders: Path) -> list[str]:
    capsys.readouterr()
    evaluate.run(results=folders[0], folders=folders[1:])
    return capsys.readouterr().out.splitlines()


def test_evaluate_refuses_what_is_no_weights_of_the_run(tiny: dict, tmp_path: Path, capsys) -> None:
    ran = Ran({**tiny, "strategies": "from"})
    bad = [tmp_path / "none"]
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        bad.append(tmp_path / file)
        bad[-1].mkdir()
        for path in (ran.folder / "from").iterdir():
            (bad[-1] / path.name).write_bytes(b"" if path.name == file else path.read_bytes())
    for arguments in [(tmp_path / "none", []), *((ran.folder, [folder]) for folder in bad)]:
        with pytest.raises(typer.Exit) as ended:
            evaluate.run(results=arguments[0], folders=arguments[1])
        # transformers' bars of what was loaded before may stand there too
        *before, line = capsys.readouterr().err.splitlines()
        assert ended.value.exit_code == 2 and str((arguments[1] or arguments)[0]) in line
        assert not any("rror" in other for other in before)


def test_flwr_run_takes_its_options_from_the_run_configuration(tiny: dict) -> None:
    config = {name.replace("_", "-"): value for name, value in tiny.items() if name != "clients"}
    client_app._workers.clear()
    grid = InProcessGrid(client_app.app, 4)
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config)
    server_app.app(grid, context)
    written = json.loads((Path(tiny["out"]) / "results.json").read_text())
    assert written["options"]["clients"] == 4
    assert set(written["strategies"]) == {"from", "fedavg"}


def test_the_run_configuration_in_pyproject_has_the_defaults() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"].get("config", {})
    assert Options.from_mapping(config) == Options()


@pytest.mark.parametrize("rslora", [False, True])
def test_unequal_ranks_run_end_to_end(tiny: dict, rslora: bool) -> None:
    ran = Ran({**tiny, "strategies": "from,average", "ranks": "2,4,8", "rslora": rslora})
    state = ran.histories[0].state
    assert {tensor.shape[0] for name, tensor in state.items() if "lora_A" in name} == {8}
    layers = ran.json["strategies"]["from"]["reports"]["1"]["merge"]["layers"]
    assert all(sorted(layer["ranks_in"]) == [2, 4, 8] for layer in layers if layer["kind"] == "adapter")
    assert [entry["rank"] for entry in ran.json["partition"]] == [2, 4, 8]


@pytest.mark.parametrize(
    "more",
    [
        {"task": "stsb"},
        {"task": "mnli", "partition": "dirichlet", "alpha": 5.0},
        {"task": "cola", "pooling": "head", "federated_evaluation": True},
        {"task": "qnli,rte,wnli", "partition": "tasks", "federated_evaluation": True},
        {"dora": True},
        {"solver": "alternating", "scope": "model", "k": "inf", "rank": 2, "server_lr": 0.5},
        {"steps": 0, "epochs": 1},
    ],
)
def test_every_kind_of_run_completes(tiny: dict, more: dict) -> None:
    ran = Ran({**tiny, **more, "strategies": "from,fedavg"})
    assert all(len(history.curve) == 3 for history in ran.histories)
    if more.get("federated_evaluation"):
        assert "score" in ran.histories[0].rounds[1].evaluate_metrics
        assert len(ran.histories[1].rounds[2].evaluate_metrics) >= 2
    if "," in more.get("task", ""):
        assert {f"{name}-accuracy" for name in ("qnli", "rte", "wnli")} < ran.histories[0].rounds[2].scores.keys()


def test_training_beats_the_majority(tiny: dict) -> None:
    ran = Ran({**tiny, "rounds": 4, "steps": 15})
    for history in ran.histories:
        assert history.final > ran.experiment.target


def test_one_failing_client_is_said_and_the_rest_goes_on(tiny: dict, monkeypatch) -> None:
    real = training.train

    def fails_once(model, tokens, options, seed):
        if seed == training.round_seed(options.seed, 1, 2):
            raise ArithmeticError("the training loss is nan")
        return real(model, tokens, options, seed)

    monkeypatch.setattr(training, "train", fails_once)
    ran = Ran({**tiny, "strategies": "from"})
    assert "a client failed" in ran.said and "loss is nan" in ran.said
    assert set(ran.histories[0].rounds[1].clients) == {0, 1}
    assert set(ran.histories[0].rounds[2].weights) == {0, 1, 2}


def test_nothing_is_left_behind_when_every_client_fails(tiny: dict, monkeypatch) -> None:
    def fails(*arguments):
        raise ArithmeticError("no")

    monkeypatch.setattr(training, "train", fails)
    with pytest.raises(RuntimeError, match="round 1: every client failed"):
        Ran({**tiny, "strategies": "from"})
    assert not list(Path(tiny["out"]).parent.iterdir())


def test_an_earlier_result_is_replaced_and_anything_else_refused(tiny: dict) -> None:
    first = Ran({**tiny, "strategies": "from,average"})
    second = Ran({**tiny, "strategies": "from"})
    assert first.folder == second.folder
    assert not (second.folder / "average").exists()
    (second.folder / "results.json").unlink()
    with pytest.raises(BadInput, match="holds something else"):
        Ran(tiny)
    assert (second.folder / "comparison.png").exists()


@pytest.mark.parametrize("below", ["file", "file/folder"])
def test_a_folder_that_cannot_be_is_refused_before_anything_starts(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="--out"), results.Folder(str(tmp_path / below)):
        pass


@pytest.mark.pictures
def test_many_clients_are_drawn_as_a_map(tiny: dict) -> None:
    ran = Ran({**tiny, "clients": 9, "strategies": "from", "rounds": 1})
    assert (ran.folder / "comparison.png").stat().st_size > 10_000


def test_unknown_strategies_and_settings_are_named(tiny: dict) -> None:
    for spec, named in (
        ("fedsgd", "unknown strategy 'fedsgd'; choose from fedavg"),
        ("from:k", "expected key=value"),
        ("from:rank=-1", "from:rank=-1"),
        ("from:colour=1", "colour"),
    ):
        with pytest.raises(BadInput, match=named):
            Experiment.prepare(Options.from_mapping({**tiny, "strategies": spec}))


def test_history_counts_rounds_and_bytes() -> None:
    rounds = [Round(number, {"score": score}, bytes_up=3) for number, score in enumerate((0.5, 0.7, 0.6))]
    history = History("x", rounds)
    assert (history.final, history.best) == (0.6, 0.7)
    assert (history.rounds_to(0.65), history.rounds_to(0.9), history.rounds_to(0.4)) == (1, None, 0)
    assert history.total("bytes_up") == 9


def test_overhead_is_what_the_busiest_process_and_the_evaluation_leave() -> None:
    clients = {i: {"process": process, "seconds": 1.0 + i} for i, process in enumerate((7.0, 7.0, 8.0))}
    rounds = [
        Round(0, {"score": 0.5}, evaluation_seconds=1.0),
        Round(1, {"score": 0.5}, evaluation_seconds=2.0, clients=clients),
    ]
    assert rounds[1].training_seconds == 3.0 and rounds[0].training_seconds == 0.0
    history = History("x", rounds, wall_seconds=8.0)
    assert history.overhead == pytest.approx(1 - (3 + 2 + 1) / 8) == history.to_dict(0.6)["overhead"]


def recorded() -> History:
    """Two rounds of three clients in two processes: 2 + 3 seconds and 1 second, then 4 seconds and 2 + 2."""
    trained = [{0: (7.0, 2.0), 1: (7.0, 3.0), 2: (8.0, 1.0)}, {0: (7.0, 4.0), 1: (8.0, 2.0), 2: (8.0, 2.0)}]
    rounds = [Round(0, {"score": 0.5}, evaluation_seconds=1.0)]
    for number, clients in enumerate(trained, 1):
        by_client = {client: {"process": process, "seconds": seconds} for client, (process, seconds) in clients.items()}
        rounds.append(Round(number, {"score": 0.5}, evaluation_seconds=1.0, server_seconds=0.25, clients=by_client))
    return History("from", rounds, wall_seconds=14.0)


def test_the_wall_time_is_split_into_parts_that_add_up_to_it() -> None:
    split = recorded().split
    training = (2 + 3 + 1 + 4 + 2 + 2) / 2
    assert split["processes"] == 2 and split["training"] == training
    assert split["idle"] == (5 - 6 / 2) + (4 - 8 / 2)
    assert (split["merging"], split["evaluation"]) == (0.5, 3.0)
    assert split["transport"] == 14.0 - (5 + 4) - 0.5 - 3.0
    parts = ("training", "idle", "transport", "merging", "evaluation")
    assert sum(split[part] for part in parts) == pytest.approx(recorded().wall_seconds)
    assert split["beyond-training"] == pytest.approx(14.0 / training - 1)
    assert recorded().to_dict(0.6)["split"] == split


def test_a_strategy_that_has_not_trained_has_a_split_too() -> None:
    split = History("from", [Round(0, {"score": 0.5}, evaluation_seconds=1.0)], wall_seconds=1.5).split
    assert (split["training"], split["transport"], split["beyond-training"]) == (0.0, 0.5, 0.0)


def test_the_split_is_said_with_what_came_before_and_after() -> None:
    narrator = Narrator(Console(file=io.StringIO(), width=200))
    narrator.seconds([recorded()], {"preparing": 10.0, "starting-clients": 20.0}, 50.0)
    said = narrator.console.file.getvalue()
    assert "50 in all; 10 to prepare, 20 until the clients were ready, 6 to stop them" in said
    row = next(line for line in said.splitlines() if "from" in line and "7.0" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == [
        *("from", "7.0", "2.0", "1.5", "0.5", "3.0", "14.0", "100%")
    ]


def test_a_finished_run_splits_its_own_time(tiny: dict) -> None:
    ran = Ran({**tiny, "strategies": "from"})
    written = ran.json["strategies"]["from"]
    assert written["split"] == ran.histories[0].split and written["split"]["processes"] == 1
    assert written["split"]["training"] == pytest.approx(written["training-seconds"]) and written["split"]["idle"] == 0
    assert ran.histories[0].started > 0 and ran.json["seconds-before"] == {}


def test_client_weights_are_means_over_the_layers_that_weigh() -> None:
    layers = [{"weights": [0.2, 0.8]}, {"weights": [0.4, 0.6]}, {"weights": []}]
    found = client_weights({"nodes": [70, 50], "merge": {"layers": layers}}, {50: 0, 70: 1})
    assert found == pytest.approx({0: 0.7, 1: 0.3})
    assert client_weights({"nodes": [], "merge": None}, {}) == {}


def test_array_bytes_leave_records_of_numbers_out(task_identity) -> None:
    import numpy as np
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

    record = ArrayRecord({"x": Array(np.zeros((2, 3), np.float32))})
    message = Message(RecordDict({"arrays": record, "metrics": MetricRecord({"n": 1})}), 1, "train")
    assert traffic.array_bytes(message) == len(record["x"].data)
