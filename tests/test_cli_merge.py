"""`fedfrom merge`: what it writes is what `merge` returns, loads in PEFT and transformers, and appears whole or not."""

import copy
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fedfrom import merge
from fedfrom.files import merge as driver
from tests import folders
from tests.conftest import ROOT
from tests.folders import PREFIX, adapters, checkpoint_state, config_of, done, load, refused, same_bits
from tests.merging import oracle
from tests.peaks import printed_last, reads_peaks

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, about models that it did not save itself


def command(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command as a process of its own."""
    program = ["-m", "fedfrom"] if code is None else ["-c", code]
    return subprocess.run([sys.executable, *program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


# --- The same as merge -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ([], {}),
        (["--k", "2", "--rank", "3"], {"k": 2.0, "rank": 3}),
        (["--k", "inf", "--rank", "0.6"], {"k": float("inf"), "rank": 0.6}),
        (["--solver", "alternating", "--scope", "model"], {"solver": "alternating", "scope": "model"}),
        (["--examples", "5,1,3"], {"examples": [5, 1, 3], "examples_power": 1.0}),
        (["--examples", "5,1,3", "--examples-power", "0.5"], {"examples": [5, 1, 3], "examples_power": 0.5}),
        (["--weights", "5,1,0.5"], {"weights": [5, 1, 0.5]}),
        (
            ["--weights", "2,1,0", "--examples", "1,2,3"],
            {"weights": [2, 1, 0], "examples": [1, 2, 3], "examples_power": 1.0},
        ),
        (["--weights", "2,1,3", "--method", "ties"], {"weights": [2, 1, 3], "method": "ties"}),
        (["--server-lr", "0.5", "--clip", "1"], {"server_lr": 0.5, "clip": 1.0}),
        (["--server-lr", "safe"], {"server_lr": "safe"}),
        (["--method", "average"], {"method": "average"}),
        (
            ["--method", "ties", "--option", "density=0.5", "--option", "majority=frequency"],
            {"method": "ties", "density": 0.5, "majority": "frequency"},
        ),
        (["--method", "factor-average"], {"method": "factor-average"}),
        (["--method", "dare", "--option", "seed=7"], {"method": "dare", "seed": 7}),
    ],
)
def test_adapters_are_merged_bit_for_bit_as_merge_does(tmp_path, capsys, options, arguments):
    inputs = adapters(tmp_path)
    done(capsys, "merge", str(tmp_path / "out"), *inputs, *options)
    expected, report = merge([load(i) for i in inputs], configs=[config_of(i) for i in inputs], **arguments)
    assert same_bits(load(tmp_path / "out"), expected)
    assert config_of(tmp_path / "out") == report.config


def test_it_ends_with_who_weighs_what_in_lines_of_80_columns(tmp_path, capsys):
    inputs = adapters(tmp_path)
    said = done(capsys, "merge", str(tmp_path / "out"), *inputs, "--k", "1", "--rank", "2").splitlines()
    _, report = merge([load(i) for i in inputs], configs=[config_of(i) for i in inputs], names=inputs, k=1.0, rank=2)
    assert said[-len(report.summary().splitlines()) :] == report.summary().splitlines()
    assert [line.split()[-1] for line in said if re.match(r"  0\.\d{3} \(", line)] == [Path(i).name for i in inputs]
    assert max(map(len, said[1:])) <= 80


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"scope": "model"}, {"method": "ties"}])
@pytest.mark.parametrize("by_blocks", [False, True])
def test_checkpoints_are_merged_bit_for_bit_as_merge_does(
    tmp_path, capsys, monkeypatch, shards, dtype, options, by_blocks
):
    if by_blocks:  # as if they were large; one is, of more than two blocks
        monkeypatch.setattr("fedfrom.files.tensors._LARGE", 0)
    states = [checkpoint_state(i, words=34_000 if by_blocks else 20, dtype=dtype) for i in range(4)]
    names = [folders.write_checkpoint(tmp_path / f"m{i}", state, shards) for i, state in enumerate(states)]
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    done(capsys, "merge", str(tmp_path / "out"), *names[1:], "--base", names[0], *words)
    expected, _ = merge(states[1:], states[0], **options)
    assert same_bits(load(tmp_path / "out"), expected)
    files = {path.name for path in (tmp_path / "out").glob("*.safetensors*")}
    assert files == {path.name for path in (tmp_path / "m1").glob("*.safetensors*")}, "in the first input's files"
    for path in (tmp_path / "out").glob("*.safetensors"):  # in safetensors' own eyes, with the keys that it had
        with safe_open(path, "pt") as ours, safe_open(tmp_path / "m1" / path.name, "pt") as theirs:
            assert ours.keys() == theirs.keys() and ours.metadata() == {"format": "pt"}


def test_the_average_needs_no_base_and_all_else_does(tmp_path, capsys):
    states = [checkpoint_state(i) for i in range(3)]
    names = [folders.write_checkpoint(tmp_path / f"m{i}", state) for i, state in enumerate(states)]
    out = str(tmp_path / "out")
    assert "--base" in refused(capsys, "merge", out, *names)
    assert "averaged" in done(capsys, "merge", out, *names, "--method", "average")
    assert same_bits(load(out), merge(states, method="average")[0])
    done(capsys, "merge", out, *names, "--method", "average", "--weights", "2,1,0", "--force")
    assert same_bits(load(out), merge(states, method="average", weights=[2, 1, 0])[0])


def test_modules_that_adapters_saved_are_relative_to_the_base(tmp_path, capsys):
    base = {"head.weight": folders.normal(3, 12, seed=5), "other.weight": folders.normal(2, 2, seed=6)}
    pretrained = folders.write_checkpoint(tmp_path / "base", base)
    states = [
        folders.adapter_state(i) | {PREFIX + "head.weight": base["head.weight"] + folders.normal(3, 12, seed=50 + i)}
        for i in range(2)
    ]
    config = folders.adapter_config()
    names = [folders.write_adapter(tmp_path / f"a{i}", state, config) for i, state in enumerate(states)]
    done(capsys, "merge", str(tmp_path / "out"), *names, "--base", pretrained, "--k", "2")
    reference = {PREFIX + "head.weight": base["head.weight"]}
    assert same_bits(load(tmp_path / "out"), merge(states, reference, configs=[config] * 2, k=2.0)[0])
    # without one they are averaged, and the command says so
    assert "1 of them without a base" in done(capsys, "merge", str(tmp_path / "plain"), *names)
    plain = adapters(tmp_path / "plain-ones", 2)
    assert "not needed" in refused(capsys, "merge", str(tmp_path / "no"), *plain, "--base", pretrained)


@pytest.mark.parametrize("bare", ["inputs", "base"])
def test_a_base_whose_names_have_another_prefix(tmp_path, capsys, bare):
    """Models with a head put a prefix before the names of their body: model.embed.weight there is embed.weight here."""
    states = [checkpoint_state(i) for i in range(3)]
    expected, _ = merge(states[1:], states[0])

    def without(state):
        return {key.removeprefix("model."): tensor for key, tensor in state.items()}

    used = [without(state) if (i == 0) == (bare == "base") else state for i, state in enumerate(states)]
    names = [folders.write_checkpoint(tmp_path / f"m{i}", state) for i, state in enumerate(used)]
    assert "averaged" not in done(capsys, "merge", str(tmp_path / "out"), *names[1:], "--base", names[0])
    assert same_bits(load(tmp_path / "out"), expected if bare == "base" else without(expected))


def test_the_order_of_inputs_changes_no_bit(tmp_path, capsys):
    inputs = adapters(tmp_path)
    done(capsys, "merge", str(tmp_path / "one"), *inputs)
    done(capsys, "merge", str(tmp_path / "other"), *reversed(inputs))
    assert same_bits(load(tmp_path / "one"), load(tmp_path / "other"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_dtype_is_that_of_the_result(tmp_path, capsys, dtype):
    """Inputs of several dtypes are merged in the widest, and the result is rounded once."""
    kinds = [torch.float32, torch.bfloat16, torch.float32]
    states = [checkpoint_state(i, dtype=kind) for i, kind in enumerate(kinds)]
    names = [
        folders.write_checkpoint(tmp_path / f"m{i}", state, torch_dtype="float32") for i, state in enumerate(states)
    ]
    arguments = ["merge", str(tmp_path / "out"), *names[1:], "--base", names[0]]
    assert "--dtype" in refused(capsys, *arguments)
    done(capsys, *arguments, "--dtype", dtype)
    target = getattr(torch, dtype)
    wide = torch.promote_types(torch.float32, target)
    read = [{key: t.to(wide) if t.is_floating_point() else t for key, t in state.items()} for state in states]
    expected, _ = merge(read[1:], read[0])
    expected = {key: t.to(target) if t.is_floating_point() else t for key, t in expected.items()}
    assert same_bits(load(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype


def test_a_result_beyond_the_dtype_is_refused(tmp_path, capsys):
    config = folders.adapter_config()
    state = {key: 1e6 * tensor for key, tensor in folders.adapter_state(0).items()}
    names = [folders.write_adapter(tmp_path / f"a{i}", state, config) for i in range(2)]
    assert "--dtype" in refused(capsys, "merge", str(tmp_path / "out"), *names, "--dtype", "float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a0", "a1"]


# --- What loads it ---------------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q = torch.nn.Linear(24, 20)
        self.deep = torch.nn.ModuleDict({"q": torch.nn.Linear(20, 18), "v": torch.nn.Linear(18, 17)})

    def forward(self, x):
        return self.deep["v"](self.deep["q"](self.q(x)))


def test_peft_loads_the_merge_of_ranks_alphas_rslora_and_patterns(tmp_path, capsys):
    """The reloaded adapter's DeltaW, by PEFT's own arithmetic, is the oracle's, for each rank asked for."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    base = Net()
    configs = [
        {"r": 4, "lora_alpha": 16},
        {"r": 8, "lora_alpha": 3, "use_rslora": True},
        {"r": 16, "lora_alpha": 7, "rank_pattern": {"deep.q": 5}, "alpha_pattern": {"v": 11}},
    ]
    names, deltas = [], []
    for i, config in enumerate(configs):
        model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q", "v"], **config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape))
        model.save_pretrained(str(tmp_path / f"a{i}"))
        names.append(str(tmp_path / f"a{i}"))
        deltas.append(delta_weights(model))
    for option, rank in {"5": 5, "0.7": None, "": None}.items():
        out = tmp_path / f"out-{option}"
        done(capsys, "merge", str(out), *names, "--k", "2", *(["--rank", option] if option else []))
        found = delta_weights(PeftModel.from_pretrained(copy.deepcopy(base), str(out)))
        config = config_of(out)
        assert found.keys() == deltas[0].keys() and len(found) == 3
        for name in found:
            sent = [each[name] for each in deltas]
            zeros = torch.zeros_like(sent[0])
            layer = oracle.Layer(sent, [zeros] * 3, zeros)
            T = layer.target(layer.weights(2.0))
            if option == "0.7":
                own = config["rank_pattern"].get(name, config["r"])
            else:
                own = rank or {"deep.q": 8}.get(name, 16)
            assert oracle.relative_error(found[name], oracle.truncated(T, own)) <= 1e-6, (option, name)


def delta_weights(model):
    """Module -> PEFT's own DeltaW."""
    return {
        name.removeprefix(PREFIX): module.get_delta_weight("default").detach().double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def test_transformers_load_a_merged_checkpoint(tmp_path, capsys):
    """Sharded, with a tokenizer and a base: the model that AutoModel gives is the merge."""
    from transformers import AutoModel, BertConfig, BertModel

    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, vocab_size=30)
    names, states = [], []
    for i in range(3):
        torch.manual_seed(i)
        model = BertModel(config)
        model.save_pretrained(str(tmp_path / f"m{i}"), max_shard_size="12KB")
        (tmp_path / f"m{i}" / "vocab.txt").write_text("[PAD]\n")
        names.append(str(tmp_path / f"m{i}"))
        states.append(model.state_dict())
    assert (tmp_path / "m1" / "model.safetensors.index.json").is_file()
    done(capsys, "merge", str(tmp_path / "out"), *names[1:], "--base", names[0])
    found = AutoModel.from_pretrained(str(tmp_path / "out")).state_dict()
    expected, _ = merge(states[1:], states[0])
    assert same_bits(found, expected)
    assert (tmp_path / "out" / "vocab.txt").read_text() == "[PAD]\n"


def test_what_is_carried_over(tmp_path, capsys):
    inputs = adapters(tmp_path, 2)
    carried = {"tokenizer.json": "{}", "special_tokens_map.json": "{}", "spiece.model": "x", "LICENSE": "free"}
    left = {"training_args.bin": "x", "optimizer.pt": "x", "trainer_state.json": "{}", ".hidden.json": "{}"}
    for name, text in {**carried, **left, "README.md": "an input's"}.items():
        (Path(inputs[0]) / name).write_text(text)
    (Path(inputs[1]) / "tokenizer_config.json").write_text("{}")
    done(capsys, "merge", str(tmp_path / "out"), *inputs)
    own = {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == own | carried.keys()
    assert all((tmp_path / "out" / name).read_text() == text for name, text in carried.items())


# --- The model card --------------------------------------------------------------------------------------------------


def test_the_card_says_how_to_do_it_again(tmp_path, capsys, monkeypatch):
    import yaml

    monkeypatch.chdir(tmp_path)
    adapters(tmp_path, 2)
    config = tmp_path / "merge.yaml"
    config.write_text("k: 2\nexamples: [30, 10]\nweights: [1, 2.5]\nmethod: dare-from\noption: {density: 0.5}\n")
    inputs = ["adapter-0", "adapter-1"]
    done(capsys, "merge", "out", *inputs, "--config", "merge.yaml", "--k", "0.5")
    text = Path("out/README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front == {"library_name": "peft", "base_model": "owner/base", "tags": ["fedfrom", "merge", "lora"]}
    again = shlex.split(re.search("```sh\n(.*)\n```", text)[1])
    assert again[:2] == ["fedfrom", "merge"] and again[2] == "out" and "--config" not in again
    done(capsys, "merge", "again", *again[3:])
    assert same_bits(load("out"), load("again"))
    states, configs = [load(i) for i in inputs], [config_of(i) for i in inputs]
    arguments = {"k": 0.5, "examples": [30, 10], "examples_power": 1.0, "weights": [1, 2.5], "density": 0.5}
    expected, report = merge(states, method="dare-from", configs=configs, **arguments)
    assert same_bits(load("out"), expected)
    for i, name in enumerate(inputs):
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} "))
        mean = sum(layer.weights[i] for layer in report.layers) / len(report.layers)
        cells = [cell.strip() for cell in row.split("|")]
        assert cells[2:4] == [["30", "1"], ["10", "2.5"]][i] and float(cells[5]) == pytest.approx(mean, abs=1e-4)
    (settings,) = [line for line in text.splitlines() if line.startswith("- method: ")]
    assert "examples\\_power = 1" in settings and "weights" not in settings


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--rank", "4"], "--rank 4 has no effect: full models have no rank"),
        (["--rank", "0.9", "--solver", "svd"], "--rank 0.9 and --solver svd have no effect: full models have no rank"),
        (["--option", "iterations=7"], "--option iterations=7 has no effect: full models have no rank"),
        (["--method", "ties", "--rank", "4", "--option", "density=0.5"], "--rank 4 has no effect"),
        ([], None),
        (["--k", "2", "--scope", "model"], None),
    ],
)
def test_a_rank_of_full_models_is_said_to_have_no_effect_and_not_in_the_card(tmp_path, capsys, options, sentence):
    names = [folders.write_checkpoint(tmp_path / f"m{i}", checkpoint_state(i)) for i in range(3)]
    said = done(capsys, "merge", str(tmp_path / "out"), *names[1:], "--base", names[0], *options)
    assert "no effect" not in said if sentence is None else sentence in said and said.count("no effect") == 1
    (settings,) = [line for line in (tmp_path / "out" / "README.md").read_text().splitlines() if "- method: " in line]
    assert not any(f"{name} = " in settings for name in ("rank", "solver", "iterations", "tolerance"))
    assert "server\\_lr = 1" in settings


def test_ctm_has_a_rank_on_full_models_too(tmp_path, capsys):
    names = [folders.write_checkpoint(tmp_path / f"m{i}", checkpoint_state(i)) for i in range(3)]
    options = ["--base", names[0], "--method", "ctm", "--rank", "2", "--option", "inner=average"]
    assert "no effect" not in done(capsys, "merge", str(tmp_path / "out"), *names[1:], *options)
    assert "rank = 2" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("saved", [False, True])
def test_a_rank_of_adapters_stays_in_the_card(tmp_path, capsys, saved):
    """Also where they saved modules, which have none."""
    more = {PREFIX + "head.weight": folders.normal(3, 12, seed=5)} if saved else {}
    config = folders.adapter_config()
    names = [folders.write_adapter(tmp_path / f"a{i}", folders.adapter_state(i) | more, config) for i in range(2)]
    options = ["--rank", "3", "--solver", "alternating"]
    assert "no effect" not in done(capsys, "merge", str(tmp_path / "out"), *names, *options)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "rank = 3, solver = alternating, iterations = 10000" in text and "- rank: 3; the cut drops " in text


def test_a_hostile_name_stays_in_its_field_of_the_card(tmp_path, capsys):
    import yaml

    name = "x\n---\ntags: [evil]\n| a | b |\n```\n<script>"
    inputs = adapters(tmp_path, 2, base_model_name_or_path=name)
    done(capsys, "merge", str(tmp_path / "out"), *inputs)
    text = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1]) == {"library_name": "peft", "tags": ["fedfrom", "merge", "lora"]}
    assert "<script>" not in text and sum(line.startswith("|") for line in text.splitlines()) == 4


# --- Whole or not at all ---------------------------------------------------------------------------------------------


def test_force_replaces_an_earlier_result_and_nothing_else(tmp_path, capsys):
    inputs, out = adapters(tmp_path), tmp_path / "out"
    done(capsys, "merge", str(out), *inputs[:2])
    before = load(out)
    assert "--force" in refused(capsys, "merge", str(out), *inputs)
    assert same_bits(load(out), before)
    # what fails leaves the earlier result
    assert "rank" in refused(capsys, "merge", str(out), *inputs, "--force", "--rank", "400")
    assert same_bits(load(out), before)
    done(capsys, "merge", str(out), *inputs, "--force")
    assert not same_bits(load(out), before)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    assert "other files" in refused(capsys, "merge", str(mine), *inputs, "--force")
    (mine / "config.json").write_text("{}")
    assert "other files" in refused(capsys, "merge", str(mine), *inputs, "--force")
    (mine / "model.safetensors").write_bytes(b"")
    (mine / "chapters").mkdir()
    assert "other files" in refused(capsys, "merge", str(mine), *inputs, "--force")
    assert (mine / "thesis.txt").is_file()
    # OUT forgotten: the first input is taken for it, which nobody merged
    assert "other files" in refused(capsys, "merge", *inputs, "--force")
    assert load(Path(inputs[0]))
    (out / "notes.txt").write_text("a note of mine")
    assert "notes.txt" in refused(capsys, "merge", str(out), *inputs, "--force")
    (out / "notes.txt").unlink()
    done(capsys, "merge", str(out), *inputs[1:], "--force")
    assert not list(tmp_path.glob(".*")), "nothing hidden is left"


@pytest.mark.parametrize("place", ["adapter-0", "adapter-0/out", ".", "link", "adapter-0/../adapter-1"])
def test_out_is_apart_from_the_inputs(tmp_path, capsys, place):
    inputs = adapters(tmp_path)
    (tmp_path / "link").symlink_to(inputs[0])
    before = sorted(tmp_path.rglob("*"))
    refused(capsys, "merge", str(tmp_path / place), *inputs, "--force")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failure_while_merging_leaves_nothing(tmp_path, capsys):
    inputs = adapters(tmp_path)
    state = load(inputs[2])
    state[f"{PREFIX}layer.1.v.lora_B.weight"][0, 0] = float("nan")
    folders.write_adapter(tmp_path / "bad", state, config_of(inputs[2]))
    line = refused(capsys, "merge", str(tmp_path / "out"), *inputs[:2], str(tmp_path / "bad"))
    assert "bad" in line and "NaN" in line
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["adapter", "checkpoint"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, kind):
    """A limit on the size of files stands in for a full disk: both refuse the bytes."""
    if kind == "adapter":
        arguments = adapters(tmp_path)
    else:
        names = [folders.write_checkpoint(tmp_path / f"m{i}", checkpoint_state(i, words=400), 2) for i in range(3)]
        arguments = [*names[1:], "--base", names[0]]
    limit = (1024, 1024)
    code = (
        f"import resource, sys, torch; resource.setrlimit(resource.RLIMIT_FSIZE, {limit})\n"
        "from fedfrom import cli; sys.exit(cli.run(sys.argv[1:]))"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1024
    before = sorted(tmp_path.iterdir())
    ended = command("merge", str(tmp_path / "out"), *arguments, code=code)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
    assert "can't be written" in ended.stderr and ended.stderr.startswith("error: ")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_command_leaves_nothing(tmp_path, number):
    inputs = adapters(tmp_path)
    before = sorted(tmp_path.iterdir())
    # stops itself after the first layer, when the folder is half full
    code = (
        "import os, signal, sys; from fedfrom.files import merge\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which tests in the background do not have
        "def stop(done, total):\n"
        f" if done: os.kill(os.getpid(), {int(number)})\n"
        "original = merge.merge_folders\n"
        "merge.merge_folders = lambda *a, **k: original(*a, **{**k, 'progress': stop})\n"
        "from fedfrom import cli; cli.main()"
    )
    ended = command("merge", str(tmp_path / "out"), *inputs, code=code)
    assert ended.returncode == 128 + number and "Traceback" not in ended.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_the_folder_can_be_read_by_others(tmp_path, capsys):
    inputs = adapters(tmp_path)
    done(capsys, "merge", str(tmp_path / "out"), *inputs)
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~umask for path in (tmp_path / "out").iterdir())


# --- What it costs ---------------------------------------------------------------------------------------------------


def test_help_loads_no_torch_and_a_merge_no_peft():
    code = (
        "import sys; from fedfrom import cli\n"
        "for arguments in (['--help'], ['merge', '--help'], ['inspect', '--help'], ['--version']):\n"
        "    assert cli.run(arguments) == 0\n"
        "heavy = ('torch', 'numpy', 'safetensors', 'flwr', 'yaml', 'matplotlib')\n"
        "print(*(name for name in heavy if name in sys.modules))"
    )
    ended = command(code=code)
    assert ended.returncode == 0 and ended.stdout.splitlines()[-1] == "", ended.stderr


def test_merge_of_adapters_loads_neither_peft_nor_transformers_nor_flwr(tmp_path):
    inputs = adapters(tmp_path)
    code = (
        "import sys; from fedfrom import cli\nassert cli.run(sys.argv[1:]) == 0\n"
        "heavy = ('peft', 'transformers', 'flwr', 'huggingface_hub', 'matplotlib', 'scipy', 'yaml', 'torch._dynamo')\n"
        "print(*(name for name in heavy if name in sys.modules))"
    )
    ended = command("merge", str(tmp_path / "out"), *inputs, code=code)
    assert ended.returncode == 0 and ended.stdout.splitlines()[-1] == "", ended.stderr


MEASURE = """
import sys
import torch
from fedfrom import cli
import fedfrom.files.merge
torch.set_num_threads(1)
before = peak()
assert cli.run(sys.argv[1:]) == 0
print(peak() - before)
"""


def extra_memory(out: Path, *arguments: str) -> float:
    """Return the MiB that a merge takes beyond the interpreter with torch."""
    return printed_last(MEASURE, "merge", str(out), *arguments)


@reads_peaks
def test_a_checkpoint_is_never_in_memory_as_a_whole(tmp_path):
    """2 x 192 MiB and a base of bf16 in tensors of 16 MiB: the base's and the merged one, and blocks of the others."""
    names = []
    for i in range(3):
        state = {
            f"layer.{j}.weight": folders.normal(2048, 4096, seed=100 * i + j, dtype=torch.bfloat16) for j in range(12)
        }
        names.append(folders.write_checkpoint(tmp_path / f"m{i}", state, 3))
    # measured 51 MiB; all tensors of a layer once would be 32 more, the models mapped or loaded some 500
    assert extra_memory(tmp_path / "out", *names[1:], "--base", names[0]) <= 65


@reads_peaks
@pytest.mark.slow
@pytest.mark.parametrize("with_base", [True, False])
def test_a_tensor_of_300_mb_is_in_memory_no_more_than_twice(tmp_path, with_base):
    """As the base's and as the merged one; the inputs' come a block at a time. The bound is 2 x 305 MiB + 286 MiB."""
    names = []
    for i in range(3):
        state = {"embed.weight": torch.empty(160_000, 1000, dtype=torch.bfloat16)}
        state["embed.weight"].normal_(generator=torch.Generator().manual_seed(i))
        for j in (1, 2):
            state[f"layer.{j}.weight"] = folders.normal(1024, 1024, seed=10 * i + j, dtype=torch.bfloat16)
        names.append(folders.write_checkpoint(tmp_path / f"m{i}", state, 3))
    largest = 160_000 * 1000 * 2 / 2**20
    base = ["--base", names[0]] if with_base else ["--method", "average"]
    # measured 19 and 14 MiB more than that; a further input's would be 305
    assert extra_memory(tmp_path / "out", *names[1:], *base) <= (1 + with_base) * largest + 80


def test_progress_counts_every_byte(tmp_path):
    inputs = adapters(tmp_path)
    seen = []
    from fedfrom.merging.methods.registry import make_method

    driver.merge_folders(
        str(tmp_path / "out"), inputs, make_method("from"), progress=lambda done, total: seen.append((done, total))
    )
    total = sum(t.numel() * t.element_size() for i in inputs for t in load(i).values())
    assert seen[0] == (0, total) and seen[-1] == (total, total) and len(seen) == 5
    assert seen == sorted(seen)
