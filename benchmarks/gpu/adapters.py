"""`merge` of whole adapters on the device beside the CPU, by each method, and beside PEFT's svd."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.adapters.contenders import PEFT, A, B, State, with_peft
from benchmarks.adapters.shapes import MODELS, RANKS, Shape
from benchmarks.gpu.tables import Table, number, times
from benchmarks.gpu.timing import Counted, Device, Limits, count
from fedfrom import LowRank, merge, methods
from fedfrom.merging.linalg.lowrank import generator
from fedfrom.merging.methods.registry import needed_statistics

MODEL = "Llama-3-8B"
SAME_AS = {"soup": "average", "knots-ta": "task-arithmetic"}  # other names of the same method
VALIDATED = ("greedy-soup",)
OPTIONS: Mapping[str, Mapping[str, float]] = {"actmat": {"rho": 1.0}}  # near 0 it refuses factors drawn at random
LINEAR = ("from", "average", "factor-average", "task-arithmetic")
"""Those that never form a matrix of the module's size, nor rank entries: the whole adapter is merged as well."""
OWN = 0.5  # size of what each client's factors have of their own, where what all have in common is 1
COLUMNS = ["clients", "method", "device s", "CPU s", "CPU / device", "whole adapter, device s", "peak MiB"]
COLUMNS += ["difference", "waits, module", "waits, block", "scaled shapes"]


@dataclass(frozen=True)
class Adapters:
    """What is merged.

    Attributes
    ----------
    model : str
        What the tables call it.
    modules : Mapping[tuple[int, int], int]
        (d_out, d_in) -> number of modules.
    blocks : int
        Transformer blocks that the modules belong to.
    rank : int
        r.
    clients : Sequence[int]
        Numbers of clients, ascending.
    """

    model: str
    modules: Mapping[Shape, int]
    blocks: int
    rank: int
    clients: Sequence[int]


LLAMA = Adapters(MODEL, MODELS[MODEL], 32, RANKS[MODEL], (3, 8, 32))
QUICK = Adapters("a quarter of Llama-3-8B's width", {(1024, 1024): 2, (256, 1024): 2, (1024, 3584): 1}, 1, 16, (3, 8))


def measured_methods() -> list[str]:
    """Return the methods that adapters can use without statistics and without validation."""
    out = {*SAME_AS, *VALIDATED}
    return [name for name in methods() if name not in out and needed_statistics(name) is None]


def module(shape: Shape, rank: int, clients: int) -> list[State]:
    """Return n clients' adapters of one module, float32 on the CPU: one part in common, and a part of their own.

    The merge of independent factors has a flat spectrum, which no federated round has.
    """
    draw = generator(f"{shape}")
    d_out, d_in = shape
    common = torch.randn(rank, d_in, generator=draw), torch.randn(d_out, rank, generator=draw)
    return [
        {key: one + OWN * torch.randn(one.shape, generator=draw) for key, one in zip((A, B), common, strict=True)}
        for _ in range(clients)
    ]


def to(states: Sequence[State], device: Device) -> list[State]:
    """Return the states on a device."""
    return [{key: tensor.to(device.name) for key, tensor in state.items()} for state in states]


def whole(what: Adapters, modules: Mapping[Shape, int], clients: int, device: Device) -> list[State]:
    """Return n clients' adapters of many modules, float32, drawn on the device: every module in memory of its own."""
    draw = device.generator(0)
    states: list[State] = [{} for _ in range(clients)]
    for (d_out, d_in), times_ in modules.items():
        for place in range(times_):
            name = f"{place}.{d_out}.{d_in}."
            for key, shape in ((A, (what.rank, d_in)), (B, (d_out, what.rank))):
                common = torch.randn(shape, generator=draw, device=device.name)
                for state in states:
                    own = torch.randn(shape, generator=draw, device=device.name)
                    state[name + key] = own.mul_(OWN).add_(common)
    return states


def difference(found: State, expected: State) -> float:
    """Return ||BA - B'A'|| / ||B'A'||, of a merged module and what it should be; both may be anywhere."""
    other = LowRank(expected[B].cpu(), expected[A].cpu())
    own = LowRank(found[B].cpu(), found[A].cpu())
    return (own - other).norm() / other.norm()


def _merged(states: Sequence[State], method: str) -> dict[str, Tensor]:
    return merge(states, method=method, **OPTIONS.get(method, {}))[0]


def measure(what: Adapters, device: Device, limits: Limits, folder: Path | None, about: str) -> Table:
    """Write the table of all methods and numbers of clients, row by row."""
    table = Table("adapters", COLUMNS, f"{about}\n\n{_text(what, device)}", folder)
    limits.begin()
    for clients in what.clients:
        cpu = {shape: module(shape, what.rank, clients) for shape in what.modules}
        there = {shape: to(states, device) for shape, states in cpu.items()}
        if clients == what.clients[0]:
            _add_peft(what, there, device, limits, table)
        for method in measured_methods():
            if limits.left < 0:
                table.left_out(f"{method} of {clients} clients")
                continue
            _add(what, method, clients, cpu, there, device, limits, table)
    return table


def _add(
    what: Adapters,
    method: str,
    clients: int,
    cpu: Mapping[Shape, list[State]],
    there: Mapping[Shape, list[State]],
    device: Device,
    limits: Limits,
    table: Table,
) -> None:
    """Add the row of one method."""
    smallest, largest = min(what.modules, key=math.prod), max(what.modules, key=math.prod)
    _merged(there[smallest], method)  # warm-up: libraries are loaded at the first call

    def run_of(states: Mapping[Shape, list[State]]) -> Callable[[Shape], Callable[[], State]]:
        return lambda shape: partial(_merged, states[shape], method)

    kinds = [(shape, number_, float(math.prod(shape))) for shape, number_ in what.modules.items()]
    on_device = count(kinds, run_of(there), _timer(device, limits), min(limits.longest, max(0.0, limits.left)))
    on_cpu = count(kinds, run_of(cpu), _timer(Device("cpu"), limits), min(limits.longest, max(0.0, limits.left)))
    entire, peak = None, None
    if method in LINEAR and limits.left > on_device.seconds:
        entire = _whole_seconds(what, method, clients, device, limits)
    if largest in on_device.results:
        peak = device.peak(partial(_merged, there[largest], method))[1]
    waits_of_block = None
    if method in LINEAR:
        block = {shape: max(1, number_ // what.blocks) for shape, number_ in what.modules.items()}
        waits_of_block = device.waits(partial(_merged, whole(what, block, clients, device), method))
    differences = [difference(on_device.results[shape], on_cpu.results[shape]) for shape in _both(on_device, on_cpu)]
    table.add(
        clients,
        method,
        number(on_device.seconds),
        number(on_cpu.seconds),
        times(on_cpu.seconds, on_device.seconds),
        number(entire),
        number(peak),
        number(max(differences)),
        number(device.waits(partial(_merged, there[smallest], method))),
        number(waits_of_block),
        _scaled(on_device.scaled, on_cpu.scaled),
    )


def _both(one: Counted, other: Counted) -> list[Shape]:
    return [shape for shape in one.results if shape in other.results]


def _timer(device: Device, limits: Limits) -> Callable[[Callable[[], object]], float]:
    return partial(device.median, most=limits.repeats, within=limits.within)


def _whole_seconds(what: Adapters, method: str, clients: int, device: Device, limits: Limits) -> float:
    states = whole(what, what.modules, clients, device)
    seconds = device.median(partial(_merged, states, method), limits.repeats, limits.within)
    states.clear()
    device.release()
    return seconds


def _add_peft(what: Adapters, there: Mapping[Shape, list[State]], device: Device, limits: Limits, table: Table) -> None:
    """Add the row of PEFT's add_weighted_adapter(..., "svd"), on the device alone."""
    kinds = [(shape, number_, float(min(shape) ** 2 * max(shape))) for shape, number_ in what.modules.items()]
    found = count(kinds, lambda shape: with_peft(there[shape]), device.seconds, 4 * limits.longest)
    cells = [what.clients[0], PEFT, number(found.seconds), *[""] * 7, _scaled(found.scaled, None)]
    table.add(*cells)
    device.release()


def _scaled(device: int, cpu: int | None) -> str:
    return f"device {device}" if cpu is None else f"device {device}, CPU {cpu}"


def _text(what: Adapters, device: Device) -> str:
    needing = {name: needed_statistics(name) for name in methods() if needed_statistics(name)}
    needs = ", ".join(f"{name} ({kind})" for name, kind in needing.items())
    count_ = sum(what.modules.values())
    lines = [
        f"Adapters of {what.model}, all {count_} linear layers, r = {what.rank}, float32. {device.describe()} Factors "
        f"are a part that all clients have in common plus {OWN} times a part of their own, standard normal each.",
        "`device s` and `CPU s`: one module of each shape is merged, and its median seconds are counted as often as "
        "the model has that shape. `scaled shapes`: how many of the shapes were expected to take too long and were not "
        "run; their seconds are those of the largest shape that was run, times d_out d_in (of PEFT, times min(d)^2 "
        "max(d)). `whole adapter, device s`: all modules in one call, for the methods that form no matrix of a "
        "module's size.",
        "`peak MiB`: device memory above the inputs', of one module of the largest shape. `difference`: "
        "||BA - B'A'|| / ||B'A'||, the device's result against the CPU's, in Frobenius norm, the largest of all "
        "modules run on both. `waits`: host synchronisations of one merge that torch.cuda.set_sync_debug_mode reports "
        "(torch does not report all), of one module of the smallest shape, and of the modules of one transformer "
        "block.",
        f'`{PEFT}`: add_weighted_adapter(..., combination_type="svd"), each shape timed once on the device, for the '
        "smallest number of clients.",
        "`actmat` has rho = 1: nearer 0 it refuses factors that were drawn at random.",
        f"Left out: {needs}, which need statistics from the clients; {', '.join(VALIDATED)}, which needs validation; "
        f"{', '.join(f'{name}, which is {other}' for name, other in SAME_AS.items())}.",
    ]
    return "\n\n".join(lines)
