"""A report in a few lines: what it says, and that it fits a terminal."""

import re

import pytest
import torch

from fedfrom import MergeReport, merge
from fedfrom.merging.summary import client_rows
from tests.merging.samples import generator, normal


def merged(n: int, names: list[str] | None = None, sizes: dict[int, float] | None = None, **options) -> MergeReport:
    draw = generator(0)
    states = []
    for i in range(n):
        scale = (sizes or {}).get(i, 1.0)
        states.append(
            {
                f"base_model.model.layers.{layer}.q_proj.lora_{part}.weight": normal(4, 24, g=draw)
                if part == "A"
                else scale * normal(24, 4, g=draw)
                for layer in range(3)
                for part in "AB"
            }
        )
    return merge(states, names=names or [f"site {i}" for i in range(n)], **options)[1]


def test_a_report_is_short_and_its_summary_says_who_weighs_what() -> None:
    report = merged(3, sizes={1: 9.0}, k=1.0, rank=2)
    assert repr(report) == "<MergeReport: FroM, 3 clients, 3 layers; summary() says more>"
    lines = report.summary().splitlines()
    rows = client_rows(report)
    assert lines[0] == "FroM (k = 1, coefficient = 1): 3 inputs, 3 layers"
    assert [line.split()[0] for line in lines[2:5]] == [f"{row.mean:.3f}" for row in rows]
    assert lines[3].endswith(f"({rows[1].least:.3f} to {rows[1].most:.3f})  site 1")
    pairs = [value for i, row in enumerate(report.cosines()) for value in row[:i]]
    assert f"cosines between updates: {min(pairs):.2f} to {max(pairs):.2f}" in lines
    assert f"interference {report.interference:.2f} (squared distance to the updates over their energy)" in lines
    most = max(layer.energy_dropped for layer in report.layers)
    assert f"rank 2: the cut drops up to {most:.1%} of a layer's energy" in lines
    assert lines[-1] == f"note: one input has {rows[1].mean:.0%} of the weight" and rows[1].mean > 0.7
    assert not any(line.startswith("note") for line in merged(3).summary().splitlines())


@pytest.mark.parametrize("folder", ["", "/srv/models/", "runs/"])
def test_no_line_is_longer_than_a_terminal_and_no_number_is_cut(folder: str) -> None:
    names = [f"{folder}{'x' * 90}-{i}" for i in range(14)]
    lines = merged(14, names).summary().splitlines()
    assert max(map(len, lines)) <= 80 and "  and 2 more" in lines
    for i in range(12):
        assert re.fullmatch(rf"  0\.\d{{3}} \(0\.\d{{3}} to 0\.\d{{3}}\)  …?x+-{i}", lines[2 + i])
    assert "/" not in "".join(lines)


def test_full_models_have_no_rank() -> None:
    states = [{"w": torch.full((3, 3), float(i))} for i in (1, 2)]
    text = merge(states, {"w": torch.zeros(3, 3)}, method="average")[1].summary()
    assert "rank" not in text and "cosines between updates: 1.00 to 1.00" in text
