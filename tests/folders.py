"""Adapters and checkpoints as folders, for the tests of the command line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedfrom import cli

PREFIX = "base_model.model."
MODULES = ("layer.0.q", "layer.0.v", "layer.1.q", "layer.1.v")


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal numbers, the same every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def adapter_state(seed: int, r: int = 4, d: int = 12, modules: tuple[str, ...] = MODULES) -> dict[str, Tensor]:
    """Return an adapter's state, each seed's about as large as its number."""
    state = {}
    for place, module in enumerate(modules):
        start = 1000 * seed + 2 * place
        state[f"{PREFIX}{module}.lora_A.weight"] = normal(r, d, seed=start)
        state[f"{PREFIX}{module}.lora_B.weight"] = (1 + seed) * normal(d + 2, r, seed=start + 1)
    return state


def adapter_config(r: int = 4, lora_alpha: float = 8, **more: Any) -> dict[str, Any]:
    """Return what adapter_config.json says."""
    common = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "owner/base"}
    return {**common, "r": r, "lora_alpha": lora_alpha, "target_modules": ["q", "v"], **more}


def write_adapter(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    """Write an adapter as PEFT does; return the folder's name."""
    folder.mkdir(parents=True)
    save_file(dict(state), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def rewrite(folder: str | Path, state: Mapping[str, Tensor]) -> None:
    """Replace the tensors of an adapter's folder."""
    whole = {key: value.contiguous() for key, value in state.items()}
    save_file(whole, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})


def adapters(root: Path, n: int = 3, **config: Any) -> list[str]:
    """Write n adapters that can be merged; return their folders."""
    made = adapter_config(**config)
    return [write_adapter(root / f"adapter-{i}", adapter_state(i, made["r"]), made) for i in range(n)]


def checkpoint_state(seed: int, words: int = 20, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return a small model's state, near those of other seeds; seed 0 is the pretrained one."""
    base = {"model.embed.weight": normal(words, 8, seed=1), "model.head.bias": normal(3, seed=2)}
    base |= {f"model.layer.{i}.weight": normal(8, 8, seed=3 + i) for i in range(10)}
    moved = {key: value + 0.1 * seed * normal(*value.shape, seed=100 * seed + len(key)) for key, value in base.items()}
    return {key: value.to(dtype) for key, value in moved.items()} | {"model.steps": torch.tensor(seed)}


def write_checkpoint(folder: Path, state: Mapping[str, Tensor], shards: int = 1, **config: Any) -> str:
    """Write a checkpoint as transformers does; return the folder's name."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny", **config}))
    if shards == 1:
        save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
        return str(folder)
    file_of = {key: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, key in enumerate(state)}
    for file in sorted(set(file_of.values())):
        own = {key: state[key] for key in state if file_of[key] == file}
        save_file(own, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": file_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(folder)


def load(folder: str | Path) -> dict[str, Tensor]:
    """Return all tensors of a folder."""
    state: dict[str, Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        state |= load_file(path)
    return state


def config_of(folder: str | Path) -> dict[str, Any]:
    """Return an adapter's config."""
    return json.loads((Path(folder) / "adapter_config.json").read_text())


def same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two states are the same, dtypes and all."""
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


def refused(capsys: Any, *arguments: str) -> str:
    """Run a command that has to end in one line on stderr and exit code 2; return the line."""
    capsys.readouterr()  # what came before
    code = cli.run(arguments)
    out, err = capsys.readouterr()
    assert code == 2, (code, out, err)
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def done(capsys: Any, *arguments: str) -> str:
    """Run a command that has to succeed quietly; return what it printed."""
    capsys.readouterr()  # what came before
    code = cli.run(arguments)
    out, err = capsys.readouterr()
    assert code == 0 and err == "", err
    return out
