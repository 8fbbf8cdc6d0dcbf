"""One adapter layer: FroM's solvers against the paper's Algorithm 1 on dense matrices, in one run.

    python benchmarks/adapters.py [--d 4096] [--rank 16] [--clients 3] [--iterations 20] [--repeats 5]

The contenders take turns, so that a busy machine slows all of them. One thread. Prints medians, ratios, by how much
each objective is above the optimum, and the peak of extra memory (Linux), each contender's in a process of its own.
The dense Algorithm 1 (Eq. 7, Eq. 8) is given its dense target T = sum_i w_i T_i: forming it is not in its time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from fedfrom import merge  # noqa: E402

A, B = "layer.lora_A.weight", "layer.lora_B.weight"
DENSE = "dense Algorithm 1"


def sample(d: int, r: int, n: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """n clients' adapters, float32."""
    g = torch.Generator().manual_seed(seed)
    return [{A: torch.randn(r, d, generator=g), B: torch.randn(d, r, generator=g)} for _ in range(n)]


def target(states: list[dict[str, Tensor]]) -> Tensor:
    """T = sum_i w_i B_i A_i with w_i proportional to ||B_i A_i||_F, dense, float32."""
    products = [state[B] @ state[A] for state in states]
    w = torch.stack([product.norm() for product in products])
    w = w / w.sum()
    return sum(float(w_i) * product for w_i, product in zip(w, products, strict=True))


def algorithm_1(T: Tensor, r: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Eq. 7, B = T A^T (A A^T)^-1, and Eq. 8, A = (B^T B)^-1 B^T T, from a random A_0, and the objective each time."""
    A_t = torch.randn(r, T.shape[1], generator=torch.Generator().manual_seed(0))
    best, result = float("inf"), None
    for _ in range(iterations):
        B_t = torch.linalg.solve(A_t @ A_t.T, A_t @ T.T).T
        A_t = torch.linalg.solve(B_t.T @ B_t, B_t.T @ T)
        objective = float((B_t @ A_t - T).norm())  # its early stopping looks at it
        if objective >= best:
            break
        best, result = objective, (B_t, A_t)
    assert result is not None
    return result


def contenders(states: list[dict[str, Tensor]], T: Tensor | None, iterations: int) -> dict[str, Callable[[], object]]:
    r = states[0][A].shape[0]
    return {
        "FroM svd": lambda: merge(states),
        "FroM alternating": lambda: merge(states, solver="alternating"),
        f"FroM alternating, {iterations} it.": lambda: merge(
            states, solver="alternating", iterations=iterations, tolerance=0.0
        ),
        DENSE: lambda: algorithm_1(target(states) if T is None else T, r, iterations),
    }


def peak() -> int:
    """Peak resident memory of this process so far, KiB; Linux."""
    # getrusage would count what the parent had before exec
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def extra_memory(name: str, options: argparse.Namespace) -> int:
    """Peak memory of one contender above the inputs', KiB, in this process; call once a process."""
    contenders(sample(128, options.rank, options.clients), None, 2)[name.replace(str(options.iterations), "2")]()
    states = sample(options.d, options.rank, options.clients)
    before = peak()
    contenders(states, None, options.iterations)[name]()
    return peak() - before


def excess(found: Tensor, states: list[dict[str, Tensor]], T: Tensor) -> float:
    """||found - T||^2 above the best of its rank, relative to sum_i w_i ||theta_i||^2 (all norms nearly equal here)."""
    exact, _ = merge([{key: value.double() for key, value in state.items()} for state in states])
    residual, best = ((M - T.double()).square().sum() for M in (found.double(), exact[B] @ exact[A]))
    size = sum((state[B] @ state[A]).double().square().sum() for state in states) / len(states)
    return float((residual - best) / size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        print(extra_memory(options.memory_of, options))
        return

    states = sample(options.d, options.rank, options.clients)
    T = target(states)
    runs = contenders(states, T, options.iterations)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    gaps: dict[str, float] = {}
    for repeat in range(options.repeats + 1):  # the first warms up
        for name, run in runs.items():
            start = time.perf_counter()
            result = run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
            else:
                first = result[0]  # type: ignore[index]
                product = first[B] @ first[A] if isinstance(first, dict) else result[0] @ result[1]  # type: ignore[index]
                gaps[name] = excess(product, states, T)
    medians = {name: statistics.median(values) for name, values in seconds.items()}

    print(f"d = {options.d}, r = {options.rank}, {options.clients} clients, {options.iterations} dense iterations,")
    print(f"float32 in, one thread, {options.repeats} interleaved repeats, torch {torch.__version__}\n")
    print(f"{'':28}{'median s':>10}{'times faster':>14}{'excess':>10}{'extra MiB':>11}")
    own = [sys.executable, __file__]
    for field in ("d", "rank", "clients", "iterations"):
        own += [f"--{field}", str(getattr(options, field))]
    for name, median in medians.items():
        memory = subprocess.run([*own, "--memory-of", name], check=True, capture_output=True, text=True).stdout
        ratio = medians[DENSE] / median
        print(f"{name:28}{median:>10.4f}{ratio:>14.1f}{gaps[name]:>10.1e}{int(memory) / 1024:>11.1f}")


if __name__ == "__main__":
    main()
