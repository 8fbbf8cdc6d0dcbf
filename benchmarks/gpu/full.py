"""`merge` of full models in bfloat16 on the device beside the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.tables import Table, number, times
from benchmarks.gpu.timing import Device, Limits, count
from fedfrom import merge

METHODS = ("from", "average", "ties")
COLUMNS = ["method", "device s", "CPU s", "CPU / device", "peak MiB", "difference", "waits, matrix", "waits, norms"]
COLUMNS += ["scaled shapes"]
SPREAD, STEP = 2e-2, 1e-3  # standard deviations of the weights, and of what a client changes in them
State = dict[str, Tensor]


@dataclass(frozen=True)
class Model:
    """A Llama-like model: its sizes, and how many clients fine-tuned it.

    Attributes
    ----------
    width, feed_forward, key_value : int
        Of the blocks' matrices.
    blocks, vocabulary : int
        How many; the head is tied to the embedding.
    clients : int
        n.
    """

    width: int
    feed_forward: int
    key_value: int
    blocks: int
    vocabulary: int
    clients: int = 3

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors, by key."""
        d, f, kv = self.width, self.feed_forward, self.key_value
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, d)}
        for i in range(self.blocks):
            block = {
                **{"self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)},
                **{"self_attn.o_proj": (d, d), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d)},
                **{"mlp.down_proj": (d, f), "input_layernorm": (d,), "post_attention_layernorm": (d,)},
            }
            found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
        return found | {"model.norm.weight": (d,)}

    @property
    def parameters(self) -> int:
        """How many parameters it has."""
        return sum(math.prod(shape) for shape in self.shapes().values())


LLAMA = Model(2048, 8192, 512, 16, 128256)
QUICK = Model(256, 1024, 64, 2, 4000)


@dataclass(frozen=True)
class Round:
    """W, and what each client sends, on one device."""

    reference: State
    states: Sequence[State]

    @classmethod
    def draw(cls, model: Model, device: Device) -> Round:
        """Return bfloat16 weights and clients' weights, drawn on the device."""
        g, name = device.generator(0), device.name
        reference: State = {}
        states: list[State] = [{} for _ in range(model.clients)]
        for key, shape in model.shapes().items():
            W = torch.randn(shape, generator=g, device=name).mul_(SPREAD)
            reference[key] = W.to(torch.bfloat16)
            for i, state in enumerate(states):
                own = torch.randn(shape, generator=g, device=name)
                state[key] = own.mul_(STEP * (1 + i)).add_(W).to(torch.bfloat16)
        return cls(reference, states)

    def some(self, keys: Sequence[str], device: str | None = None) -> Round:
        """Return some of the tensors; copies where a device is given."""

        def chosen(state: State) -> State:
            return {key: state[key] if device is None else state[key].to(device) for key in keys}

        return Round(chosen(self.reference), [chosen(state) for state in self.states])

    def merged(self, method: str) -> State:
        """Return the merge of all clients' states."""
        return merge(self.states, self.reference, method=method)[0]


def kinds(model: Model) -> dict[tuple[int, ...], list[str]]:
    """Return the keys of each shape."""
    found: dict[tuple[int, ...], list[str]] = {}
    for key, shape in model.shapes().items():
        found.setdefault(shape, []).append(key)
    return found


def difference(found: Tensor, expected: Tensor, reference: Tensor) -> float:
    """Return ||T - T'|| / ||T' - W|| of a merged tensor, what it should be, and what clients started from."""
    T, expected, W = (tensor.cpu().to(torch.float64) for tensor in (found, expected, reference))
    size = float(torch.linalg.vector_norm(expected - W))
    return float(torch.linalg.vector_norm(T - expected)) / (size or 1.0)


def measure(model: Model, device: Device, limits: Limits, folder: Path | None, about: str) -> Table:
    """Write the table of all methods, row by row."""
    table = Table("full", COLUMNS, f"{about}\n\n{_text(model, device)}", folder)
    limits.begin()
    everything, alike = Round.draw(model, device), kinds(model)
    cpu = everything.some([keys[0] for keys in alike.values()], "cpu")
    matrix = everything.some(["model.layers.0.self_attn.q_proj.weight"])
    norms = everything.some([key for key, shape in model.shapes().items() if len(shape) == 1])
    for method in METHODS:
        if limits.left < 0:
            table.left_out(method)
            continue
        matrix.merged(method)  # warm-up
        seconds = device.median(partial(everything.merged, method), limits.repeats, limits.within)
        found, peak = device.peak(partial(everything.merged, method))
        counted = count(
            [(shape, len(keys), float(math.prod(shape))) for shape, keys in alike.items()],
            _on_cpu(cpu, alike, method),
            partial(Device("cpu").median, most=limits.repeats, within=limits.within),
            min(limits.longest, max(0.0, limits.left)),
        )
        off = [
            difference(found[key], tensor, cpu.reference[key])
            for result in counted.results.values()
            for key, tensor in result.items()
        ]
        found.clear()
        table.add(
            method,
            number(seconds),
            number(counted.seconds),
            times(counted.seconds, seconds),
            number(peak),
            number(max(off)),
            number(device.waits(partial(matrix.merged, method))),
            number(device.waits(partial(norms.merged, method))),
            counted.scaled,
        )
    return table


def _on_cpu(
    cpu: Round, alike: Mapping[tuple[int, ...], list[str]], method: str
) -> Callable[[tuple[int, ...]], Callable[[], State]]:
    return lambda shape: partial(cpu.some(alike[shape][:1]).merged, method)


def _text(model: Model, device: Device) -> str:
    lines = [
        f"A Llama-like model of {model.parameters / 1e6:,.0f} million parameters in bfloat16, {len(model.shapes())} "
        f"tensors, {model.clients} clients, with the model that they started from. {device.describe()}",
        "`device s`: the whole model, median. `CPU s`: one tensor of each shape is merged, and its median seconds are "
        "counted as often as the model has that shape; so each small tensor is counted as one call, though a merge "
        "takes many at once. `scaled shapes`: how many of the shapes were expected to take too long on the CPU and "
        "were not run; their seconds are those of the largest that was run, times the entries.",
        "`peak MiB`: device memory above the inputs', which includes the merged model. `difference`: ||T - T'|| / "
        "||T' - W||, the device's result against the CPU's, relative to the update, the largest of all tensors run on "
        "both; both are rounded to bfloat16, whose last place may differ. `waits`: host synchronisations of one merge "
        "that torch.cuda.set_sync_debug_mode reports (torch does not report all), of one attention matrix, and of all "
        "norms, a batch of small tensors.",
    ]
    return "\n\n".join(lines)
