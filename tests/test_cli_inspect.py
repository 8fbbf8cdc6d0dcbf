"""`fedfrom inspect` and `fedfrom methods`: the numbers are the oracle's, the JSON and the picture can be used."""

import io
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fedfrom.files.inspection import inspect_folders
from fedfrom.files.tables import tables
from tests import folders
from tests.folders import PREFIX, adapters, checkpoint_state, config_of, done, load, refused
from tests.merging import oracle


def found_by(capsys, *arguments):
    return json.loads(done(capsys, "inspect", *arguments, "--json"))


def assert_is_the_oracles(found, deltas, k):
    """Norms, weights, cosines, effective ranks and interference of every layer, from dense float64 deltas."""
    assert {layer["name"] for layer in found["layers"]} == deltas.keys()
    lost = total = 0.0
    for layer in found["layers"]:
        sent = deltas[layer["name"]]
        zeros = torch.zeros_like(sent[0])
        dense = oracle.Layer(sent, [zeros] * len(sent), zeros)
        w = dense.weights(k)
        assert layer["norms"] == pytest.approx(dense.norms, rel=1e-5)
        assert layer["weights"] == pytest.approx(w, rel=1e-5, abs=1e-12)
        for i, a in enumerate(sent):
            for j, b in enumerate(sent):
                cosine = float((a * b).sum() / (a.norm() * b.norm()))
                assert layer["cosines"][i][j] == pytest.approx(cosine, abs=1e-5)
            S = torch.linalg.svdvals(a) if a.ndim > 1 else a.norm().reshape(1)
            # tensors that are no products: by power iteration
            assert layer["effective_ranks"][i] == pytest.approx(float(S.square().sum() / S[0] ** 2), rel=2e-3)
        spread = sum(w_i * float((dense.update(w) - a).square().sum()) for w_i, a in zip(w, sent, strict=True))
        assert layer["interference"] == pytest.approx(spread / dense.size(w), rel=1e-4)
        lost, total = lost + spread, total + dense.size(w)
    assert found["interference"] == pytest.approx(lost / total, rel=1e-4)


@pytest.mark.parametrize("k", [0.0, 1.0, 3.0])
def test_adapters_of_unequal_ranks(tmp_path, capsys, k):
    configs = [
        folders.adapter_config(r, alpha, use_rslora=rs) for r, alpha, rs in ((2, 8, False), (5, 4, True), (8, 1, False))
    ]
    states = [folders.adapter_state(i, config["r"]) for i, config in enumerate(configs)]
    names = [folders.write_adapter(tmp_path / f"a{i}", states[i], configs[i]) for i in range(3)]
    found = found_by(capsys, *names, "--k", str(k))
    deltas = {}
    for module in folders.MODULES:
        name = PREFIX + module
        deltas[name] = [
            oracle.product(
                state[f"{name}.lora_B.weight"],
                state[f"{name}.lora_A.weight"],
                oracle.scaling(config["r"], config["lora_alpha"], config["use_rslora"]),
            )
            for state, config in zip(states, configs, strict=True)
        ]
    assert_is_the_oracles(found, deltas, k)
    assert found["inputs"] == names and all(layer["ranks"] == [2, 5, 8] for layer in found["layers"])


def test_checkpoints_against_their_base(tmp_path, capsys):
    states = [checkpoint_state(i) for i in range(4)]
    names = [folders.write_checkpoint(tmp_path / f"m{i}", state, 2) for i, state in enumerate(states)]
    assert "--base" in refused(capsys, "inspect", *names[1:])
    found = found_by(capsys, *names[1:], "--base", names[0])
    floats = [key for key, tensor in states[0].items() if tensor.is_floating_point()]
    assert_is_the_oracles(
        found, {key: [s[key].double() - states[0][key].double() for s in states[1:]] for key in floats}, 1.0
    )
    assert found["without_update"] == ["model.steps"]


def test_what_is_predicted_is_what_merge_reports(tmp_path, capsys):
    from fedfrom import merge

    inputs = adapters(tmp_path)
    found = found_by(capsys, *inputs, "--k", "2")
    _, report = merge([load(i) for i in inputs], configs=[config_of(i) for i in inputs], k=2.0)
    assert [layer["weights"] for layer in found["layers"]] == [layer.weights for layer in report.layers]
    assert found["interference"] == report.interference and found["cosines"] == report.cosines()


def test_the_table_shows_the_layers_that_disagree_most_and_all_when_asked(tmp_path, capsys):
    modules = tuple(f"layer.{i}.q" for i in range(14))
    config = folders.adapter_config()
    one, other = (folders.adapter_state(seed, modules=modules) for seed in (0, 1))
    for i, module in enumerate(modules):  # the later the layer, the more alike
        for part in ("A", "B"):
            key = f"{PREFIX}{module}.lora_{part}.weight"
            other[key] = (1 - i / 13) * other[key] + i / 13 * one[key]
    names = [folders.write_adapter(tmp_path / f"a{i}", state, config) for i, state in enumerate((one, other))]
    text = done(capsys, "inspect", *names)
    assert f"without '{PREFIX}layer.' and '.q'." in text and all(f" {Path(name).name} " in text for name in names)
    shown = labels(text, "layer")
    assert len(shown) == 10 and "0" in shown and "13" not in shown
    every = labels(done(capsys, "inspect", *names, "--all"), "layer")
    assert every == [str(i) for i in range(14)], "layer 9 before layer 10"


def labels(text, title):
    """The second column of the table that has this title over it."""
    rows = [
        [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        for line in text.splitlines()
        if line.startswith(("│", "┃"))
    ]
    start = next(i for i, row in enumerate(rows) if row[1] == title)
    return [row[1] for row in itertools.takewhile(lambda row: row[0], rows[start + 1 :])]


LLAMA = tuple(f"model.layers.{i}.{part}" for i in (0, 9, 31) for part in ("self_attn.q_proj", "mlp.down_proj"))


@pytest.mark.parametrize("width", [60, 80, 100, 400])
def test_no_number_is_cut_and_no_line_is_longer_than_the_terminal(tmp_path, width):
    config = folders.adapter_config()
    names = [
        folders.write_adapter(tmp_path / f"{'site-' * 12}{i}", folders.adapter_state(i, modules=LLAMA), config)
        for i in range(3)
    ]
    found = inspect_folders(names)
    console = Console(file=io.StringIO(), width=width)
    for table in tables(found, True, width):
        console.print(table)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for layer in found.layers:
        assert f" {layer.interference:.2f} " in text
        assert width == 60 or f" {' '.join(f'{weight:.2f}' for weight in layer.weights)} " in text
    hidden = {60: True, 80: True, 100: True, 400: False}[width]
    assert ("--wide shows all columns" in text) == hidden and ("effective rank: the" in " ".join(text.split()))


def test_one_input_and_one_that_trained_nothing(tmp_path, capsys):
    inputs = adapters(tmp_path, 1)
    assert "1.00" in done(capsys, "inspect", *inputs)
    state = {key: 0 * value if "lora_B" in key else value for key, value in folders.adapter_state(0).items()}
    idle = folders.write_adapter(tmp_path / "idle", state, config_of(inputs[0]))
    found = found_by(capsys, *inputs, idle)
    assert all(layer["weights"] == [1.0, 0.0] and layer["effective_ranks"][1] == 0 for layer in found["layers"])


def test_names_are_shown_as_they_are(tmp_path, capsys):
    """Square brackets are markup to rich, dollars mathematics to matplotlib."""
    inputs = [
        folders.write_adapter(tmp_path / name, folders.adapter_state(i), folders.adapter_config())
        for i, name in enumerate(("[red]a", "b$x_$", "[/]"))
    ]
    text = done(capsys, "inspect", *inputs, "--plot", str(tmp_path / "p.png"))
    assert all(name in text for name in ("[red]a", "b$x_$", "[/]"))


@pytest.mark.parametrize("n", [1, 3, 12])
def test_the_plot_is_a_picture(tmp_path, capsys, n):
    from matplotlib import image

    inputs, path = adapters(tmp_path, n), tmp_path / "plot.png"
    path.write_text("an earlier one")
    done(capsys, "inspect", *inputs, "--plot", str(path))
    pixels = image.imread(path)
    assert min(pixels.shape[:2]) > 500 and pixels.std() > 0.01
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("place", ["plot.txt", "nowhere/plot.png", "."])
def test_a_plot_that_has_no_place_is_refused(tmp_path, capsys, place):
    refused(capsys, "inspect", *adapters(tmp_path, 2), "--plot", str(tmp_path / place))


@pytest.mark.parametrize("width", [60, 80, 300])
def test_methods_says_what_all_have_once_and_of_each_what_differs(capsys, monkeypatch, width):
    from fedfrom import methods
    from fedfrom.merging.methods.registry import method_class, method_options

    monkeypatch.setenv("COLUMNS", str(width))
    text = done(capsys, "methods")
    assert max(map(len, text.splitlines())) <= min(width, 100)
    first, *blocks = text.split("\n\n")
    common = dict(word.split("=") for word in first.split() if "=" in word)
    assert common["solver"] == "svd" and common["rank"] == "None" and "k" not in common
    assert [block.splitlines()[0] for block in blocks] == methods()
    for name, block in zip(methods(), blocks, strict=True):
        words = " ".join(block.split())
        own = dict(
            word.split("=") for word in words.partition(" without ")[0].split() if re.fullmatch(r"\w+=\S+", word)
        )
        lacking = set(words.partition(" without ")[2].replace(",", "").split()) & common.keys()
        known = {**common, **own}
        expected = method_options(name) - {"validate", "search", "inner_options"}
        assert known.keys() - lacking == expected, name
        kind = method_class(name)
        assert {option: str(getattr(kind, option)) for option in expected} == {o: known[o] for o in expected}
    alone = {name for name, block in zip(methods(), blocks, strict=True) if "from Python alone" in block}
    assert alone == {"fisher", "greedy-soup", "lorm", "regmean"}


def test_version(capsys):
    import fedfrom

    assert done(capsys, "--version") == f"fedfrom {fedfrom.__version__}\n"
