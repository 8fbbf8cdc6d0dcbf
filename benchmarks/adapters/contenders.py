"""The contenders that merge adapters: fedfrom's solvers, and other methods, written plainly or called."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedfrom import merge

A, B = "layer.lora_A.weight", "layer.lora_B.weight"
SVD, ALTERNATING = "FedFroM svd", "FedFroM alternating"
DENSE, LEAN, GIVEN = "dense Algorithm 1", "dense Algorithm 1, lean", "dense Algorithm 1, T given"
FLEXLORA, KNOTS, PEFT = "FlexLoRA-style", "KnOTS-TIES (fedfrom's)", "PEFT svd"
ITERATIONS = 20

State = dict[str, Tensor]


def sample(shape: tuple[int, int], rank: int, clients: int, seed: int = 0) -> list[State]:
    """Return n clients' adapters of one (d_out, d_in) layer: float32 standard normal factors, with a flat spectrum."""
    g = torch.Generator().manual_seed(seed)
    d_out, d_in = shape
    return [{A: torch.randn(rank, d_in, generator=g), B: torch.randn(d_out, rank, generator=g)} for _ in range(clients)]


def target(states: list[State], keep: bool = True) -> Tensor:
    """Return T = sum_i w_i B_i A_i, w_i proportional to ||B_i A_i||_F: dense, float32.

    With `keep` the n products stay in memory until the weights are known, as weights of any kind need them. Without it
    each product is added at once, which only k = 1 allows: no dense merge needs less memory.
    """
    if keep:
        products = [state[B] @ state[A] for state in states]
        w = torch.stack([product.norm() for product in products])
        return sum(float(w_i) * product for w_i, product in zip(w / w.sum(), products, strict=True))  # type: ignore[return-value]
    T, total = torch.zeros(len(states[0][B]), states[0][A].shape[1]), 0.0
    for state in states:
        product = state[B] @ state[A]
        norm = float(product.norm())
        T.add_(product, alpha=norm)
        total += norm
    return T.div_(total)


def algorithm_1(T: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (B, A) of 20 iterations of Eq. 7, B = T A^T (A A^T)^-1, and Eq. 8, A = (B^T B)^-1 B^T T.

    The objective is computed in each iteration, for the paper's early stopping.
    """
    A_t = torch.randn(rank, T.shape[1], generator=torch.Generator().manual_seed(0))
    best, result = float("inf"), (A_t.T, A_t)
    for _ in range(ITERATIONS):
        B_t = torch.linalg.solve(A_t @ A_t.T, A_t @ T.T).T
        A_t = torch.linalg.solve(B_t.T @ B_t, B_t.T @ T)
        objective = float((B_t @ A_t - T).norm())
        if objective >= best:
            break
        best, result = objective, (B_t, A_t)
    return result


def flexlora(states: list[State]) -> tuple[Tensor, Tensor]:
    """Return (B, A) from the SVD of the mean of the dense products, truncated to the rank."""
    mean, rank = sum(state[B] @ state[A] for state in states) / len(states), len(states[0][A])
    U, S, Vh = torch.linalg.svd(mean, full_matrices=False)
    return U[:, :rank] * S[:rank], Vh[:rank]


def with_peft(states: list[State]) -> Callable[[], object]:
    """Return a function that merges one linear layer's adapters by PEFT's add_weighted_adapter(..., "svd").

    On the device of the states.
    """
    from peft import LoraConfig, get_peft_model

    (d_out, rank), d_in = states[0][B].shape, states[0][A].shape[1]
    base = nn.ModuleDict({"layer": nn.Linear(d_in, d_out, bias=False)})
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config, adapter_name="0")
        names = [str(i) for i in range(len(states))]
        for name in names[1:]:
            model.add_adapter(name, config)
    model.to(states[0][A].device)
    layer = model.base_model.model["layer"]
    with torch.no_grad():
        for name, state in zip(names, states, strict=True):
            layer.lora_A[name].weight.copy_(state[A])
            layer.lora_B[name].weight.copy_(state[B])
    weights = [1 / len(states)] * len(states)

    def run() -> object:
        if "merged" in layer.lora_A:
            model.delete_adapter("merged")
        model.add_weighted_adapter(names, weights, "merged", combination_type="svd")
        return layer.lora_B["merged"].weight.detach(), layer.lora_A["merged"].weight.detach()

    return run


def contender(name: str, states: list[State]) -> Callable[[], object]:
    """Return a function that merges these states by the contender of this name."""
    rank = len(states[0][A])
    if name == GIVEN:
        T = target(states)
        return lambda: algorithm_1(T, rank)
    if name == PEFT:
        return with_peft(states)
    runs: dict[str, Callable[[], object]] = {
        SVD: lambda: merge(states),
        ALTERNATING: lambda: merge(states, solver="alternating"),
        DENSE: lambda: algorithm_1(target(states), rank),
        LEAN: lambda: algorithm_1(target(states, keep=False), rank),
        FLEXLORA: lambda: flexlora(states),
        KNOTS: lambda: merge(states, method="knots-ties"),
    }
    return runs[name]


class Optimum:
    """fedfrom's exact solution for these states in float64, the reference of all results."""

    def __init__(self, states: list[State]) -> None:
        exact, report = merge([{key: value.double() for key, value in state.items()} for state in states])
        self.T = target(states, keep=False).double()
        self.residual = self._residual(exact[B], exact[A])
        layer = report.layers[0]
        self.size = sum(w * norm**2 for w, norm in zip(layer.weights, layer.norms, strict=True))

    def _residual(self, left: Tensor, right: Tensor) -> float:
        return float((left.double() @ right.double() - self.T).square().sum())

    def excess(self, result: Any) -> float:
        """Return ||BA - T||^2 less the optimum's, relative to sum_i w_i ||theta_i||^2."""
        left, right = (result[0][B], result[0][A]) if isinstance(result[0], dict) else result
        return (self._residual(left, right) - self.residual) / self.size
