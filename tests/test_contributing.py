"""CONTRIBUTING's methods, one of each kind: a file and a registry entry are all that a method takes."""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedfrom import FedMerge
from fedfrom.merging.methods import registry
from tests.conftest import ROOT
from tests.merging import oracle, properties
from tests.merging.samples import adapter_case, tensor_case, with_grams

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S)
D_IN = 6


def damped(deltas: list[Tensor], grams: list[Tensor]) -> Tensor:
    norms = torch.stack([torch.linalg.matrix_norm(delta) for delta in deltas])
    weights = torch.softmax(-norms / norms.max(), 0)
    return sum(w * delta for w, delta in zip(weights, deltas, strict=True))  # type: ignore[return-value]


def median(deltas: list[Tensor], grams: list[Tensor]) -> Tensor:
    return torch.stack(deltas).quantile(0.5, dim=0)


def spectral_power(deltas: list[Tensor], grams: list[Tensor]) -> Tensor:
    mean = torch.stack(deltas).mean(dim=0)
    U, S, Vh = torch.linalg.svd(mean, full_matrices=False)
    powered = U @ torch.diag(S**0.5) @ Vh
    return powered * torch.linalg.matrix_norm(mean) / torch.linalg.matrix_norm(powered)


def ridge(deltas: list[Tensor], grams: list[Tensor]) -> Tensor:
    metrics = [G + 0.1 * G.trace() / len(G) * torch.eye(len(G), dtype=G.dtype) for G in grams]
    weighted: Any = sum(delta @ R for delta, R in zip(deltas, metrics, strict=True))
    return torch.linalg.solve(sum(metrics), weighted, left=False)  # type: ignore[call-overload, no-any-return]


KINDS: dict[str, Callable[[list[Tensor], list[Tensor]], Tensor]] = {
    "Damped": damped,
    "Median": median,
    "SpectralPower": spectral_power,
    "Ridge": ridge,
}


@pytest.fixture(params=KINDS)
def added(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a method that is a file of CONTRIBUTING's and an entry in the registry."""
    name = request.param
    (text,) = [block for block in BLOCKS if f"class {name}(" in block]
    (tmp_path / f"added_{name.lower()}.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(f"added_{name.lower()}")
    monkeypatch.setitem(registry._METHODS, name, getattr(module, name))
    return name


@pytest.mark.parametrize("kind", ["tensor", "adapter"])
def test_a_file_and_an_entry_make_a_method(added: str, kind: str) -> None:
    """theta* is the dense formula's; the order of clients changes no bit; the strategy takes the name."""
    case = with_grams(
        tensor_case(3, shape=(9, D_IN), n=4) if kind == "tensor" else adapter_case(3, d_out=9, d_in=D_IN, n=4)
    )
    grams = [next(iter(own.values())) for own in case.statistics or []]
    change = properties.result(case, method=added, rank=D_IN) - case.layer.W
    assert oracle.relative_error(change, KINDS[added](case.layer.deltas, grams)) <= 1e-10
    properties.assert_order_of_clients_changes_nothing(case, [2, 0, 3, 1], method=added, rank=D_IN)
    assert FedMerge(added).method.settings()["name"] == added
