"""Whatever is wrong with the input: one line on stderr with what to do, exit code 2, and nothing written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests import folders
from tests.conftest import ROOT
from tests.folders import PREFIX, adapters, done, load, refused, rewrite
from tests.hub import hub


def change(folder, **config):
    """Change fields of an adapter's config."""
    path = Path(folder) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def without_config(folder):
    (Path(folder) / "adapter_config.json").unlink()


def pickled(folder):
    (Path(folder) / "adapter_model.safetensors").rename(Path(folder) / "adapter_model.bin")


def cut_off(folder):
    path = Path(folder) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def other_modules(folder):
    rewrite(folder, {key.replace("layer.1.v", "layer.1.k"): t for key, t in load(folder).items()})


def in_half(folder):
    rewrite(folder, {key: t.half() for key, t in load(folder).items()})


def dora(folder):
    state = load(folder)
    state |= {f"{PREFIX}{module}.lora_magnitude_vector": torch.ones(14) for module in folders.MODULES}
    rewrite(folder, state)
    change(folder, use_dora=True)


def not_lora(folder):
    rewrite(folder, {key.replace("lora_A", "hada_w1_a"): t for key, t in load(folder).items()})


FAULTS = {
    "no adapter_config.json": (without_config, ["adapter_config.json"]),
    "a pickle": (pickled, ["adapter_model.bin", "safe_serialization=True"]),
    "empty": (lambda folder: [path.unlink() for path in Path(folder).iterdir()], ["name another folder"]),
    "gone": (shutil.rmtree, ["no such folder"]),
    "cut off": (cut_off, ["damaged or cut off", "download it again"]),
    "another base model": (lambda f: change(f, base_model_name_or_path="owner/other"), ["owner/other", "--force-base"]),
    "another revision": (lambda f: change(f, revision="v2"), []),
    "another task": (lambda f: change(f, task_type="SEQ_CLS"), ["task_type", "SEQ_CLS"]),
    "DoRA with LoRA": (dora, ["DoRA", "LoRA"]),
    "other modules": (other_modules, ["missing", "same modules"]),
    "another dtype": (in_half, ["--dtype"]),
    "not LoRA": (not_lora, ["another kind of adapter"]),
    "a config of another kind": (lambda f: change(f, peft_type="IA3"), ["IA3"]),
    "a config that is no object": (lambda f: (Path(f) / "adapter_config.json").write_text("[]"), ["JSON object"]),
    "a config without r": (lambda f: change(f, r=None), ["number r"]),
    "a config that would be tried for ever": (lambda f: change(f, rank_pattern={"(a+)+b": 4}), ["for ever"]),
    "PiSSA": (lambda f: change(f, init_lora_weights="pissa"), ["--same-base"]),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("command", ["merge", "inspect"])
def test_a_faulty_input_is_named(tmp_path, capsys, name, command):
    fault, words = FAULTS[name]
    inputs = adapters(tmp_path)
    if name == "another revision":
        change(inputs[0], revision="v1")
    fault(inputs[1])
    before = sorted(tmp_path.rglob("*"))
    out = [str(tmp_path / "out")] if command == "merge" else []
    line = refused(capsys, command, *out, *inputs)
    assert "adapter-1" in line and all(word in line for word in words), line
    assert len(line) < 700 + 4 * len(str(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


def test_what_the_remedies_say_works(tmp_path, capsys):
    inputs = adapters(tmp_path)
    assert "share of the energy such as 0.99" in refused(capsys, "merge", str(tmp_path / "r"), *inputs, "--rank", "200")
    done(capsys, "merge", str(tmp_path / "r"), *inputs, "--rank", "0.99")
    change(inputs[1], base_model_name_or_path="owner/other", init_lora_weights="pissa")
    change(inputs[0], init_lora_weights="pissa")
    refused(capsys, "merge", str(tmp_path / "out"), *inputs)
    done(capsys, "merge", str(tmp_path / "out"), *inputs, "--force-base", "--same-base")
    for name in inputs:
        dora(name)
    assert "--dora" in refused(capsys, "merge", str(tmp_path / "dora"), *inputs, "--force-base", "--same-base")
    done(capsys, "merge", str(tmp_path / "dora"), *inputs, "--force-base", "--same-base", "--dora")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--k=-inf"], "--k: expected a number (inf included, -inf not)"),
        (["--k", "nan"], "--k: expected a number (inf included, -inf not)"),
        (["--k", "many"], "--k: expected a number"),
        (["--k", "auto"], "validate="),
        (["--option", "k=auto", "--method", "from"], "validate="),
        (["--rank", "0"], "rank: expected an int >= 1"),
        (["--rank", "1.5"], "rank: expected an int >= 1"),
        (["--rank", "200"], "'base_model.model.layer.0.q': expected at most 12"),
        (["--solver", "magic"], "svd, alternating"),
        (["--scope", "world"], "layer, model"),
        (["--method", "tyes"], "found 'tyes'"),
        (["--method", "ties", "--k", "2"], "found k"),
        (["--method", "greedy-soup"], "validate"),
        (["--method", "regmean"], "statistics"),
        (["--method", "fisher"], "statistics"),
        (["--option", "validate=score"], "--option validate: needs validation data"),
        (["--option", "search=0,1"], "--option search: needs validation data"),
        (["--option", "grid=0,1"], "found grid"),
        (["--option", "density"], "name=value"),
        (["--option", "density=1"], "found density"),
        (["--method", "ties", "--option", "density=2"], "0 < density <= 1"),
        (["--method", "ties", "--option", "density=most"], "expected a number"),
        (["--k", "1", "--option", "k=2"], "given twice"),
        (["--weights", "1,2"], "--weights: expected one number an input, 3, found 2"),
        (["--weights", "1,2,x"], "--weights: expected a number"),
        (["--weights", "1,-2,3"], "adapter-1: expected a finite number >= 0 as its weight, found -2"),
        (["--weights", "0,0,0"], "weights: expected at least one client's above 0"),
        (["--weights", ""], "--weights: expected a number"),
        (["--examples", "1,2"], "--examples: expected one number an input, 3, found 2"),
        (["--examples", "1,2,x"], "--examples: expected a number"),
        (["--examples", "1,2,-3"], "examples > 0"),
        (["--examples-power=-1"], "examples_power"),
        (["--server-lr", "fast"], "--server-lr: expected a number"),
        (["--server-lr", "inf"], "server_lr: expected a finite number >= 0"),
        (["--server-lr", "nan"], "server_lr: expected a finite number >= 0"),
        (["--server-lr=-0.5"], "server_lr: expected a finite number >= 0 or 'safe', found -0.5"),
        (["--server-lr", "safe", "--k", "inf"], "server_lr"),
        (["--clip", "0"], "clip: expected a positive number"),
        (["--dtype", "int8"], "--dtype: expected one of"),
        (["--device", "toaster"], "--device toaster"),
        (["--base", "/nowhere"], "/nowhere: no such folder"),
        (["--config", "/nowhere/merge.yaml"], "/nowhere/merge.yaml"),
        (["--sideways"], "--sideways"),
    ],
)
def test_a_bad_option_is_named(tmp_path, capsys, arguments, words):
    inputs = adapters(tmp_path)
    line = refused(capsys, "merge", str(tmp_path / "out"), *inputs, *arguments)
    assert words in line and sorted(tmp_path.iterdir()) == sorted(map(Path, inputs))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("k: -.inf\n", "--k: expected a number (inf included, -inf not)"),
        ("temperature: 1\n", "unknown option 'temperature'"),
        ("config: other.yaml\n", "unknown option 'config'"),
        ("- k\n", "expected option: value"),
        ("option: density\n", "expected name: value"),
        ("k: {a: 1}\n", "found a mapping"),
        ("k: [\n", "expected YAML"),
        ("a: !!python/object/apply:os.system ['true']\n", "expected YAML"),
        ("clip: little\n", "'little' is not a valid float"),
    ],
)
def test_a_bad_config_file_is_named(tmp_path, capsys, text, words):
    inputs = adapters(tmp_path, 2)
    (tmp_path / "merge.yaml").write_text(text)
    assert words in refused(capsys, "merge", str(tmp_path / "out"), *inputs, "--config", str(tmp_path / "merge.yaml"))


@pytest.mark.parametrize("out", ["/dev/null/out", "/proc/out", "a\0b", "file"])
def test_an_out_that_can_not_be_written(tmp_path, capsys, out):
    inputs = adapters(tmp_path, 2)
    (tmp_path / "file").write_text("")
    refused(capsys, "merge", str(tmp_path / "file") if out == "file" else out, *inputs)


def checkpoints(root, *states, **config):
    return [folders.write_checkpoint(root / f"m{i}", state, **config) for i, state in enumerate(states)]


def test_a_vocabulary_of_another_size(tmp_path, capsys):
    state, larger = folders.checkpoint_state(0), folders.checkpoint_state(1, words=21)
    names = checkpoints(tmp_path, state, larger)
    line = refused(capsys, "merge", str(tmp_path / "out"), *names, "--method", "average")
    assert "model.embed.weight" in line and "(21, 8)" in line and "resize_token_embeddings" in line
    line = refused(capsys, "merge", str(tmp_path / "out"), names[1], "--base", names[0])
    assert "model.embed.weight" in line and "resize_token_embeddings" in line


def test_checkpoints_that_do_not_go_together(tmp_path, capsys):
    out, state = str(tmp_path / "out"), folders.checkpoint_state(0)
    one = folders.write_checkpoint(tmp_path / "one", state)
    adapter = adapters(tmp_path, 1)[0]
    assert "merge like with like" in refused(capsys, "merge", out, one, adapter)
    assert "--base" in refused(capsys, "merge", out, adapter, "--base", adapter)
    other = folders.write_checkpoint(tmp_path / "other", state, model_type="another")
    assert "one architecture" in refused(capsys, "merge", out, one, other, "--method", "average")
    packed = folders.write_checkpoint(tmp_path / "packed", state, quantization_config={"bits": 4})
    assert "quantised" in refused(capsys, "merge", out, one, packed, "--method", "average")
    lacking = folders.write_checkpoint(tmp_path / "lacking", {k: t for k, t in state.items() if "head" not in k})
    assert "1 missing" in refused(capsys, "merge", out, one, lacking, "--method", "average")
    foreign = folders.write_checkpoint(tmp_path / "foreign", {"x": torch.ones(2)})
    assert "fine-tuned from" in refused(capsys, "merge", out, one, "--base", foreign)
    bare = folders.write_checkpoint(tmp_path / "bare", state)
    (Path(bare) / "config.json").unlink()
    assert "config.json" in refused(capsys, "merge", out, one, bare, "--method", "average")
    pickle = folders.write_checkpoint(tmp_path / "pickle", state)
    (Path(pickle) / "model.safetensors").rename(Path(pickle) / "pytorch_model.bin")
    assert "pytorch_model.bin, a pickle" in refused(capsys, "merge", out, one, pickle, "--method", "average")
    assert "give the folder" in refused(capsys, "merge", out, one, str(Path(one) / "model.safetensors"))
    assert not Path(out).exists()


def test_a_shard_that_is_missing_or_lacks_a_tensor(tmp_path, capsys):
    state = folders.checkpoint_state(0)
    names = [folders.write_checkpoint(tmp_path / f"m{i}", state, 3) for i in range(2)]
    shard = sorted(Path(names[1]).glob("*.safetensors"))[1]
    arguments = ["merge", str(tmp_path / "out"), *names, "--method", "average"]
    save_file({"x": torch.ones(1)}, shard)
    assert shard.name in refused(capsys, *arguments)
    shard.unlink()
    assert shard.name in refused(capsys, *arguments)


# --- The Hub ---------------------------------------------------------------------------------------------------------


def test_names_on_the_hub_are_fetched_without_pickles(tmp_path):
    """The real client, against a stand-in for the Hub's server."""
    room, config = tmp_path / "hub", folders.adapter_config()
    for name in ("owner/a", "owner/b"):
        folder = Path(folders.write_adapter(room / name, folders.adapter_state(len(name)), config))
        (folder / "tokenizer.json").write_text("{}")
        (folder / "training_args.bin").write_bytes(b"\x80\x04.")
        (folder / "evil.py").write_text("raise SystemExit")
        (folder / "checkpoint-1").mkdir()
        (folder / "checkpoint-1" / "adapter_config.json").write_text("{}")
    with hub(room) as (address, asked):
        settings = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        settings |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        ended = process("merge", str(tmp_path / "out"), "owner/a", "owner/b@main", settings=settings)
        assert ended.returncode == 0 and ended.stderr == "", ended.stderr
        fetched = {request.split("/", 4)[-1] for request in asked if request.startswith("GET owner")}
        assert fetched == {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"}
        ended = process("inspect", "owner/a", "owner/nothing", settings=settings)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
    assert "owner/nothing: no such folder, and the Hub gave none" in ended.stderr and "404" in ended.stderr
    assert "| owner/b@main |" in (tmp_path / "out" / "README.md").read_text()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"}


@pytest.mark.parametrize("name", ["owner/a", "./owner/a", "/owner/a", "a/b/c", "..", "owner/a@", "-", "", "a b"])
def test_what_is_neither_a_folder_nor_on_the_hub(tmp_path, capsys, monkeypatch, name):
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "deeper")
    refused(capsys, "inspect", name)


# --- The process -----------------------------------------------------------------------------------------------------


def process(*arguments, program=("-m", "fedfrom"), settings=None):
    run = [sys.executable, *program, *arguments]
    environment = {**os.environ, **(settings or {})}
    return subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_the_entry_point(tmp_path):
    inputs = adapters(tmp_path, 2)
    ended = process("merge", str(tmp_path / "out"), *inputs)
    assert ended.returncode == 0 and ended.stderr == "" and "2 inputs, 4 layers" in ended.stdout
    ended = process("merge", str(tmp_path / "out"), *inputs)
    assert ended.returncode == 2 and ended.stdout == "" and ended.stderr.count("\n") == 1
    assert process("merj").returncode == 2 and process().returncode == 2


def test_without_its_dependencies_the_command_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; from fedfrom.__main__ import main; main()"
    ended = process(program=("-c", code))
    assert ended.returncode == 2 and ended.stderr == (
        "error: the command line is not installed: pip install 'fedfrom[cli]'\n"
    )


def test_the_script_is_declared_and_types_are_shipped():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"fedfrom": "fedfrom.__main__:main"}
    assert (ROOT / "fedfrom" / "py.typed").is_file()
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["fedfrom"]
