"""Tensors of a GPU are merged there, to the CPU's bits but for CUDA's rounding: on a pretended one, so without it."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedfrom import merge, methods
from fedfrom.merging.methods.registry import needed_statistics
from tests.pretended import DEVICE, Gpu, OnGpu, on_cpu

A, B = "l.lora_A.weight", "l.lora_B.weight"
State = dict[str, Tensor]
ADAPTERS = [name for name in methods() if needed_statistics(name) is None and name != "greedy-soup"]


def draw(shapes: dict[str, tuple[int, ...]], seed: int, near: State | None = None) -> State:
    """A state of standard normal tensors, or one near another."""
    g = torch.Generator().manual_seed(seed)
    found = {key: torch.randn(shape, generator=g) for key, shape in shapes.items()}
    return found if near is None else {key: near[key] + 0.1 * tensor for key, tensor in found.items()}


def up(value: Any) -> Any:
    """The same on the pretended GPU."""
    if isinstance(value, Tensor):
        return value.to(DEVICE)
    if isinstance(value, dict):
        return {key: up(each) for key, each in value.items()}
    return [up(each) for each in value] if isinstance(value, list) else value


def both(states: list[State], reference: State | None, tolerance: float = 0.0, **options: Any) -> int:
    """Merge on the CPU and on the pretended GPU, compare, and return how often the host waited for the GPU."""
    expected, _ = merge(states, reference, **options)
    with Gpu() as gpu:
        placed = {key: up(value) if key == "statistics" else value for key, value in options.items()}
        inputs = up(states), up(reference)
        gpu.waits.clear()
        found, _ = merge(*inputs, **placed)
        waits = sum(gpu.waits.values())
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert isinstance(tensor, OnGpu), f"{key} left the device"
        torch.testing.assert_close(on_cpu(tensor), expected[key], rtol=tolerance, atol=tolerance)
    return waits


def adapters(n: int, near: bool, shape: tuple[int, int] = (24, 18)) -> tuple[list[State], State | None]:
    shapes: dict[str, tuple[int, ...]] = {A: (4, shape[1]), B: (shape[0], 4), "l.lora_B.bias": shape[:1]}
    W = draw(shapes, 0) if near else None
    return [draw(shapes, i + 1, W) for i in range(n)], W


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("method", ADAPTERS)
def test_adapters(method: str, near: bool) -> None:
    # ACTMat refuses adapters drawn at random, between which it interpolates
    both(*adapters(3, near), method=method, **({"rho": 1.0} if method == "actmat" else {}))


@pytest.mark.parametrize("method", ["from", "task-arithmetic", "knots-ties"])
def test_adapters_of_many_clients_and_of_large_layers(method: str) -> None:
    both(*adapters(40, True), method=method)
    both(*adapters(3, True, (400, 300)), method=method)


@pytest.mark.parametrize(
    "options",
    [{"solver": "alternating"}, {"rank": 0.9}, {"clip": 1.0, "server_lr": "safe"}, {"as_reference": True}],
    ids=str,
)
def test_adapters_with_options(options: dict[str, Any]) -> None:
    both(*adapters(3, True), **options)


@pytest.mark.parametrize("method", ["regmean", "lorm"])
def test_adapters_with_gram_matrices(method: str) -> None:
    inputs = [draw({"x": (40, 18)}, seed)["x"] for seed in range(3)]
    both(*adapters(3, True), method=method, statistics=[{"l": x.T @ x / 40} for x in inputs])


@pytest.mark.parametrize("method", ["from", "average", "ties", "dare", "fisher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_models(method: str, dtype: torch.dtype) -> None:
    shapes: dict[str, tuple[int, ...]] = {"w": (700, 800), "b": (30,), "n.running_mean": (5,)}
    W = draw(shapes, 0)
    states = [draw(shapes, i + 1, W) for i in range(3)]
    own: dict[str, Any] = {}
    if method == "fisher":
        own = {"statistics": [{key: tensor.abs() for key, tensor in state.items()} for state in states]}
    cast = [{key: tensor.to(dtype) for key, tensor in state.items()} for state in (W, *states)]
    for state in cast:
        state["steps"] = torch.tensor(3)
    # norms of small tensors are summed by NumPy on the CPU alone
    both(cast[1:], cast[0], 1e-6 if dtype == torch.float32 else 0.0, method=method, **own)


def test_waits_do_not_grow_with_clients_who_start_from_nothing() -> None:
    few, many = ([{A: each[A], B: each[B]} for each in adapters(n, False)[0]] for n in (3, 9))
    assert both(few, None) == both(many, None)


def test_the_pretended_gpu_refuses_what_cuda_refuses() -> None:
    with Gpu() as gpu:
        there = torch.ones(3, device=DEVICE)
        assert there.device == DEVICE and isinstance(there + 1, OnGpu)
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3)
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        with pytest.raises(TypeError, match="numpy"):
            np.asarray(there)
        assert not isinstance(there.cpu(), OnGpu) and float((there * torch.tensor(2.0)).sum()) == 6
        assert sum(gpu.waits.values()) == 2
