"""What is unknown is answered with the closest name that is known, once, wherever names are given."""

import pytest
import torch

from fedfrom import FedFroM, FedMerge, merge, methods
from fedfrom.closest import did_you_mean
from tests.folders import adapters, refused

STATES = [{"w": torch.ones(2)}]


@pytest.mark.parametrize(
    ("found", "expected", "meant"),
    [
        ("tiess", ["from", "ties", "dare-ties"], "'ties'"),
        ("TIES", ["from", "ties"], "'ties'"),
        ("task_arithmetic", ["task-arithmetic"], "'task-arithmetic'"),
        ("--rnak", ["--rank", "--k", "--dora"], "'--rank'"),
        (["densty", "k", "majorty"], ["density", "majority"], "'density', 'majority'"),
        (["densty", "desnity"], ["density"], "'density'"),
        ("bf16", ["float16", "bfloat16"], "'bfloat16'"),
        ("temperature", ["k", "rank", "tolerance"], None),
        ("", ["k"], None),
        ([], ["k"], None),
    ],
)
def test_the_closest_name(found, expected, meant):
    assert did_you_mean(found, expected, {"bf16": "bfloat16"}) == ("" if meant is None else f": did you mean {meant}?")


def test_names_that_are_known_are_closest_to_themselves():
    assert all(did_you_mean(name, methods()) == f": did you mean {name!r}?" for name in methods())


@pytest.mark.parametrize(
    ("call", "options", "meant"),
    [
        (merge, {"states": STATES, "method": "tiess"}, "'ties'"),
        (merge, {"states": STATES, "method": "ties", "densty": 0.5}, "'density'"),
        (merge, {"states": STATES, "metod": "ties"}, "'method'"),
        (merge, {"states": STATES, "weigths": [1]}, "'weights'"),
        (merge, {"states": STATES, "method": "fedavg"}, None),
        (merge, {"states": STATES, "temperature": 1}, None),
        (FedMerge, {"method": "regmeans"}, "'regmean'"),
        (FedMerge, {"metod": "ties"}, "'method'"),
        (FedMerge, {"method": "ties", "densty": 0.5}, "'density'"),
        (FedFroM, {"min_train_node": 2}, "'min_train_nodes'"),
        (FedFroM, {"chekpoint": "run"}, "'checkpoint'"),
        (FedFroM, {"metod": "ties"}, None),  # it has none
        (FedFroM, {"weights": [1, 2]}, None),  # clients differ from round to round
        (FedMerge, {"weights": [1, 2]}, None),
    ],
)
def test_merge_and_the_strategies_suggest_once(call, options, meant):
    with pytest.raises(ValueError) as caught:
        call(**options)
    text = str(caught.value)
    assert "expected" in text and "found" in text and text.count("did you mean") == (meant is not None), text
    assert meant is None or text.endswith(f": did you mean {meant}?")


@pytest.mark.parametrize(
    ("call", "options", "said"),
    [
        (FedFroM, {"lora": {"r": 4}}, ": did you mean 'lora_config'?"),
        (merge, {"states": STATES, "lora": [{"r": 4}]}, ": did you mean 'configs'?"),
        (FedFroM, {"num_rounds": 3}, "found num_rounds; num_rounds belongs to start(...)"),
        (FedMerge, {"evaluate_fn": print}, "found evaluate_fn; evaluate_fn belongs to start(...)"),
        (
            FedFroM,
            {"num_rounds": 3, "timeout": 9, "rnak": 4},
            "; num_rounds, timeout belong to start(...): did you mean 'rank'?",
        ),
        (FedFroM, {"grid": (0, 1)}, "; the k to try are search={'k': ...}"),
        (merge, {"states": STATES, "grid": (0, 1)}, "; the k to try are search={'k': ...}"),
        (FedMerge, {"method": "ties", "grid": (0, 1)}, "; grid belongs to start(...)"),
    ],
)
def test_what_is_named_otherwise_or_belongs_elsewhere_is_said(call, options, said):
    with pytest.raises(ValueError) as caught:
        call(**options)
    assert str(caught.value).endswith(said), caught.value


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["--rnak", "4"], "'--rank'"),
        (["--server-rl", "1"], "'--server-lr'"),
        (["--hlep"], "'--help'"),
        (["--method", "tiess"], "'ties'"),
        (["--method", "ties", "--option", "densty=0.5"], "'density'"),
        (["--dtype", "bf16"], "'bfloat16'"),
        (["--dtype", "FP16"], "'float16'"),
        (["--dtype", "half"], "'float16'"),
        (["--dtype", "fp32"], "'float32'"),
        (["--dtype", "float"], "'float32'"),
        (["--dtype", "torch.bfloat16"], "'bfloat16'"),
        (["--dtype", "int8"], None),
        (["--sideways"], None),
        (["--config", "merge.yaml"], "'server-lr'"),
    ],
)
def test_the_command_suggests_once(tmp_path, capsys, monkeypatch, arguments, meant):
    monkeypatch.chdir(tmp_path)
    inputs = adapters(tmp_path, 2)
    (tmp_path / "merge.yaml").write_text("sever_lr: 1\n")
    line = refused(capsys, "merge", "out", *inputs, *arguments)
    assert line.lower().count("did you mean") == (meant is not None) and "possible options" not in line.lower(), line
    assert meant is None or f": did you mean {meant}?" in line


def test_an_unknown_command_is_answered_once_and_with_all_that_there_are(capsys):
    line = refused(capsys, "merj")
    assert "inspect, merge, methods, report" in line and line.lower().count("did you mean") == 1 and "'merge'" in line
    assert "did you mean" not in refused(capsys, "xyz").lower()
