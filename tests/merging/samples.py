"""Seeded samples of what clients send: one adapter layer, or one plain tensor, of known products."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.merging import oracle

MODULE = "base_model.model.encoder.layer.0.query"
A_KEY, B_KEY = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"
TENSOR = "base_model.model.classifier.weight"

State = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """The arguments of one merge, and the dense matrices they stand for."""

    states: list[State]
    layer: oracle.Layer
    reference: State | None = None
    received: list[State] | None = None
    configs: list[dict[str, Any]] | None = None
    reference_config: dict[str, Any] | None = None
    examples: list[int] | None = None
    weights: list[float] | None = None
    statistics: list[State] | None = None
    server_lr: float = 1.0
    rank: int | None = None
    dtype: torch.dtype = torch.float64
    label: str = ""

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:  # hypothesis: the tensors would fill pages
        printer.text(f"case({self.label})")

    def arguments(self) -> dict[str, Any]:
        """Keywords of `merge` but for the method's."""
        names = ("states", "reference", "received", "configs", "reference_config", "examples", "server_lr")
        names += ("statistics", "weights")
        return {name: getattr(self, name) for name in names}

    def permuted(self, order: list[int]) -> Case:
        """The same clients in another order."""

        def pick(values: list | None) -> list | None:
            return None if values is None else [values[i] for i in order]

        return replace(
            self,
            states=pick(self.states),
            received=pick(self.received),
            configs=pick(self.configs),
            examples=pick(self.examples),
            weights=pick(self.weights),
            statistics=pick(self.statistics),
            layer=oracle.Layer(pick(self.layer.sent), pick(self.layer.received), self.layer.W),
        )

    @property
    def out_rank(self) -> int:
        """The rank that the merged product may have."""
        own = (self.reference or max(self.states, key=lambda state: len(state[A_KEY])))[A_KEY].shape[0]
        return own if self.rank is None else self.rank


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, g: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=g).to(dtype)


def factors(
    d_out: int, d_in: int, r: int, g: torch.Generator, spectrum: str = "gaussian", size: float = 1.0
) -> tuple[Tensor, Tensor]:
    """B (d_out, r) and A (r, d_in), float64, of the named spectrum: gaussian, flat, slow (1/sqrt(j)), fast (2^-j)."""
    B, A = normal(d_out, r, g=g), normal(r, d_in, g=g)
    if spectrum != "gaussian":
        j = torch.arange(1, r + 1, dtype=torch.float64)
        values = {"flat": torch.ones_like(j), "slow": j**-0.5, "fast": 2.0**-j}[spectrum]
        # above the matrix's own rank the columns repeat
        B = torch.linalg.qr(B).Q.repeat(1, -(-r // min(r, d_out)))[:, :r] * values
        A = torch.linalg.qr(A.T).Q.T.repeat(-(-r // min(r, d_in)), 1)[:r]
    return B * size, A


def adapter(A: Tensor, B: Tensor, dtype: torch.dtype) -> State:
    return {A_KEY: A.to(dtype).clone(), B_KEY: B.to(dtype).clone()}


def dense(state: State, s: float = 1.0) -> Tensor:
    return oracle.product(state[B_KEY], state[A_KEY], s)


def merged_product(merged: State, report: Any) -> Tensor:
    """The product of a merged adapter at the scaling its config gives, 1 without a config."""
    config = report.config
    return dense(merged, 1.0 if config is None else oracle.scaling(config["r"], config["lora_alpha"]))


def adapter_case(
    seed: int,
    d_out: int = 12,
    d_in: int = 9,
    n: int = 3,
    r: int = 3,
    dtype: torch.dtype = torch.float64,
    start: str = "fresh",
    spectrum: str = "gaussian",
    moved: float = 0.3,
    out: int | None = None,
    server_lr: float = 1.0,
    examples: bool = False,
    idle: int = 0,
) -> Case:
    """n clients of one adapter.

    start: "fresh", no reference, equal ranks; "trained", each client perturbs the reference's factors by `moved`;
    "cut", the same with ranks 1 to r, each sent the leading part of the reference; "configs", no reference, ranks and
    alphas of their own. The first `idle` clients send what they were sent.
    """
    g = generator(seed)
    sizes = torch.exp(normal(n, g=g)).tolist()  # clients' updates differ by some factors of e
    states, received, configs, reference, reference_config = [], None, None, None, None
    if start in ("fresh", "configs"):
        W, cut = torch.zeros(d_out, d_in, dtype=torch.float64), [torch.zeros(d_out, d_in, dtype=torch.float64)] * n
        scalings = [1.0] * n
        ranks = [r] * n
        if start == "configs":
            ranks = [1 + int(torch.randint(r, (), generator=g)) for _ in range(n)]
            alphas = [int(torch.randint(1, 33, (), generator=g)) for _ in range(n)]
            rs = [bool(torch.randint(2, (), generator=g)) for _ in range(n)]
            configs = [
                {"r": r_i, "lora_alpha": a, "use_rslora": b} for r_i, a, b in zip(ranks, alphas, rs, strict=True)
            ]
            scalings = [oracle.scaling(*each) for each in zip(ranks, alphas, rs, strict=True)]
        for i in range(n):
            B, A = factors(d_out, d_in, ranks[i], g, spectrum, sizes[i])
            states.append(adapter(A, B * 0 if i < idle else B, dtype))
        sent = [dense(state, s) for state, s in zip(states, scalings, strict=True)]
    else:
        s, ranks = 1.0, [r] * n
        B_0, A_0 = factors(d_out, d_in, r, g, spectrum)
        reference = adapter(A_0, B_0, dtype)
        if start == "cut":
            ranks = [1 + int(torch.randint(r, (), generator=g)) for _ in range(n)]
            alpha = int(torch.randint(1, 33, (), generator=g))
            s = alpha / r
            reference_config = {"r": r, "lora_alpha": alpha}
            # a client of smaller rank keeps the global scaling
            configs = [{"r": r_i, "lora_alpha": s * r_i} for r_i in ranks]
            received = [{A_KEY: reference[A_KEY][:r_i], B_KEY: reference[B_KEY][:, :r_i]} for r_i in ranks]
        W = dense(reference, s)
        was = [reference] * n if received is None else received
        for i in range(n):
            step = 0.0 if i < idle else moved * sizes[i]
            A = was[i][A_KEY].double() + step * normal(ranks[i], d_in, g=g)
            B = was[i][B_KEY].double() + step * normal(d_out, ranks[i], g=g)
            states.append(adapter(A, B, dtype))
        sent, cut = [dense(state, s) for state in states], [dense(state, s) for state in was]
    counts = [1 + int(torch.randint(1000, (), generator=g)) for _ in range(n)] if examples else None
    label = f"{seed=}, {d_out=}, {d_in=}, {n=}, {r=}, {dtype=}, {start=}, {spectrum=}, {moved=}, {out=}, {server_lr=}"
    return Case(
        states=states,
        layer=oracle.Layer(sent, cut, W),
        reference=reference,
        received=received,
        configs=configs,
        reference_config=reference_config,
        examples=counts,
        server_lr=server_lr,
        rank=out,
        dtype=dtype,
        label=f"{label}, {examples=}, {idle=}",
    )


def tensor_case(
    seed: int,
    shape: tuple[int, ...] = (7, 5),
    n: int = 3,
    dtype: torch.dtype = torch.float64,
    size: float = 1.0,
    moved: float = 0.3,
    with_reference: bool = True,
    server_lr: float = 1.0,
    examples: bool = False,
    idle: int = 0,
) -> Case:
    """n clients of one plain tensor, W of that size; the first `idle` clients send what they were sent."""
    g = generator(seed)
    sizes = torch.exp(normal(n, g=g)).tolist()
    W = (size * normal(*shape, g=g)).to(dtype)
    steps = [0.0 if i < idle else size * moved * sizes[i] for i in range(n)]
    states = [{TENSOR: (W.double() + step * normal(*shape, g=g)).to(dtype)} for step in steps]
    base = W if with_reference else torch.zeros_like(W)
    return Case(
        states=states,
        layer=oracle.Layer([state[TENSOR] for state in states], [base] * n, base),
        reference={TENSOR: W} if with_reference else None,
        examples=[1 + int(torch.randint(1000, (), generator=g)) for _ in range(n)] if examples else None,
        server_lr=server_lr,
        dtype=dtype,
        label=f"{seed=}, {shape=}, {n=}, {dtype=}, {size=}, {moved=}, {with_reference=}, {server_lr=}, {examples=}",
    )


def with_grams(case: Case, seed: int = 0) -> Case:
    """The case with a Gram matrix of twice as many inputs as it has columns for each client."""
    name = TENSOR.removesuffix(".weight") if TENSOR in case.states[0] else MODULE
    d = case.layer.W.shape[-1] if case.layer.W.ndim == 2 else 1
    name = name if case.layer.W.ndim == 2 else "another layer"
    statistics = []
    for i in range(len(case.states)):
        inputs = (1 + i) * normal(2 * d, d, g=generator(100 * seed + i))
        statistics.append({name: inputs.T @ inputs / len(inputs)})
    return replace(case, statistics=statistics)


def fishers(case: Case, seed: int = 0) -> list[State]:
    """A Fisher diagonal for each client."""
    return [
        {key: normal(*value.shape, g=generator(seed + i)).square() for key, value in state.items()}
        for i, state in enumerate(case.states)
    ]


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
POWERS = (0.0, 0.5, 1.0, 2.0, 8.0, float("inf"))


@st.composite
def adapter_cases(draw: st.DrawFn, **fixed: Any) -> Case:
    """Draw an adapter case; `fixed` are arguments of `adapter_case` that are not drawn."""
    d_out, d_in = draw(st.integers(2, 24)), draw(st.integers(2, 24))
    # up to the matrix's own rank and beyond: a head of two classes with r = 8
    drawn = {
        "d_out": d_out,
        "d_in": d_in,
        "n": draw(st.integers(1, 6)),
        "r": draw(st.integers(1, min(d_out, d_in) + 2)),
        "start": draw(st.sampled_from(["fresh", "trained", "cut", "configs"])),
        "spectrum": draw(st.sampled_from(["gaussian", "flat", "slow", "fast"])),
        "moved": draw(st.sampled_from([1.0, 0.1, 1e-3])),
        "out": draw(st.none() | st.integers(1, min(d_out, d_in))),
        "server_lr": draw(st.sampled_from([1.0, 0.5])),
        "examples": draw(st.booleans()),
    }
    return adapter_case(draw(st.integers(0, 10**6)), **{**drawn, **fixed})


@st.composite
def tensor_cases(draw: st.DrawFn, **fixed: Any) -> Case:
    """Draw a plain tensor's case; `fixed` are arguments of `tensor_case` that are not drawn."""
    drawn = {
        "shape": tuple(draw(st.lists(st.integers(1, 9), max_size=3))),
        "n": draw(st.integers(1, 6)),
        "moved": draw(st.sampled_from([1.0, 0.1, 1e-2])),
        "server_lr": draw(st.sampled_from([1.0, 0.5])),
        "examples": draw(st.booleans()),
    }
    return tensor_case(draw(st.integers(0, 10**6)), **{**drawn, **fixed})


def singular_values(spectrum: str, m: int, r: int) -> Tensor:
    """Return (m,) float64, descending, of which the first r are asked for: easy spectra and hard ones."""
    j = torch.arange(1.0, m + 1, dtype=torch.float64)
    return {
        "1/j": 1 / j,
        "0.9^j": 0.9**j,
        "0.999^j": 0.999**j,
        "steps": 2.0 ** -torch.div(j, 6, rounding_mode="floor"),
        "cliff": torch.where(j <= r, 1 + 1e-2 * j, torch.ones_like(j)).sort(descending=True).values,
        "equal": torch.ones_like(j),
        "rank 3": (j <= 3).to(torch.float64),
    }[spectrum]
