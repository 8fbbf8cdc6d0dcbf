"""mergekit's linear, for an interpreter with mergekit: `python -m benchmarks.full.linear MODEL CLIENTS [peak]`.

The module needs torch and mergekit alone: no environment satisfies both mergekit's pins and Flower's. It makes the
states that the other contenders merge. For each line on its input it merges them once, and answers with a line of JSON:
the seconds, and the sum of all entries of the result, by which it is compared with the others' results. With "peak" it
merges once, and answers with the peak's bytes beyond the states.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version

import torch
from mergekit.merge_methods import merge_state_dicts

from benchmarks.full.models import States, examples
from benchmarks.peaks import forget_peak, since


def run(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the mean weighted by examples, FedAvg's."""
    weights = [float(examples(i)) for i in range(len(states))]
    with torch.no_grad():
        merged: dict[str, torch.Tensor] = merge_state_dicts(states, "linear", parameters={"weight": weights})
    return merged


def main(model: str, clients: int, peak: bool) -> None:
    """Answer on the standard output."""
    if peak:
        small = States("22M")
        run([small.of(i) for i in range(2)])  # a first run, which imports libraries
    if not peak:  # the parent process makes the same states meanwhile
        print(json.dumps(f"mergekit {version('mergekit')}, torch {torch.__version__}"), flush=True)
    made = States(model)
    states = [made.of(i) for i in range(clients)]
    if peak:
        before = forget_peak()
        run(states)
        print(json.dumps(since(before)))
        return
    for _ in sys.stdin:
        start = time.perf_counter()
        merged = run(states)
        seconds = time.perf_counter() - start
        total = sum(float(tensor.sum(dtype=torch.float64)) for tensor in merged.values())
        del merged
        print(json.dumps([seconds, total]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:] == ["peak"])
