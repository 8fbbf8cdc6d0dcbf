"""Three adapters of one model, each trained on a task of its own, merged into one that does all three.

A small network with random weights stands in for a pretrained model, so that this runs in seconds; with a real one only
`pretrained` and `train` change. Run it with `python examples/task_adapters.py [FOLDER]`: FOLDER then holds the adapters
and the merged ones, and `fedfrom inspect FOLDER/task-[0-9]` shows how the adapters compare.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedfrom import merge

TASKS, WIDTH, RANKS = 3, 48, (4, 8, 8)


def pretrained() -> nn.Module:
    """Return the model that all adapters start from: the same weights every time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2))


def batch(task: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return inputs and labels: each task looks at a third of the inputs, at directions of its own."""
    draw = torch.Generator().manual_seed(seed)
    third = WIDTH // TASKS
    x = torch.zeros(size, WIDTH)
    x[:, third * task : third * (task + 1)] = torch.randn(size, third, generator=draw)
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(task))
    return x, (x @ direction > 0).long()


def train(task: int, rank: int) -> PeftModel:
    """Return the model with an adapter trained on one task."""
    model = get_peft_model(pretrained(), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0", "2"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for step in range(150):
        x, y = batch(task, 32, seed=step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def accuracies(model: nn.Module) -> list[float]:
    """Return the share of right answers on each task, on inputs that no adapter saw."""
    model.eval()
    with torch.no_grad():
        tests = [batch(task, 2000, seed=10_000) for task in range(TASKS)]
        return [float((model(x).argmax(dim=1) == y).float().mean()) for x, y in tests]


def main(folder: Path) -> dict[str, list[float]]:
    """Train, save, merge, load again and test; return the accuracies by model."""
    found = {"pretrained": accuracies(pretrained())}
    names = [folder / f"task-{task}" for task in range(TASKS)]
    for task, name in enumerate(names):
        model = train(task, RANKS[task])
        model.save_pretrained(str(name))
        found[name.name] = accuracies(model)

    states = [load_file(name / "adapter_model.safetensors") for name in names]
    configs = [json.loads((name / "adapter_config.json").read_text()) for name in names]
    for method, options in {"average": {}, "from": {"k": 1.0}, "task-arithmetic": {}}.items():
        # each layer gets the rank that keeps 99.9 % of its energy
        merged, report = merge(states, method=method, configs=configs, rank=0.999, **options)
        out = folder / method
        out.mkdir(parents=True)
        save_file(merged, out / "adapter_model.safetensors", metadata={"format": "pt"})
        (out / "adapter_config.json").write_text(json.dumps(report.config))
        found[method] = accuracies(PeftModel.from_pretrained(pretrained(), str(out)))
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        for name, scores in main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary)).items():
            print(f"{name:>16}", *(f"{score:.2f}" for score in scores), f" mean {sum(scores) / TASKS:.2f}")
