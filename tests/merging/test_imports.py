"""What is loaded when."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return {name.split(".")[0] for name in found.split()}


def test_the_package_loads_nothing_heavy():
    assert not loaded_after("import fedfrom; dir(fedfrom)") & {"torch", "flwr", "numpy", "peft", "transformers"}


def test_merging_needs_torch_alone():
    loaded = loaded_after(
        "import torch\nfrom fedfrom import FroM, merge\nimport fedfrom.merging\n"
        "merge([{'w': torch.ones(2)}, {'w': torch.zeros(2)}], {'w': torch.zeros(2)})"
    )
    assert "torch" in loaded and not loaded & {"flwr", "peft", "transformers", "safetensors", "scipy", "ray"}
