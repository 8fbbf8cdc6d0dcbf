"""What the tests of hostile input share: rounds with one client yet honest, merges refused or right."""

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import event

from fedfrom import FedMerge, merge
from fedfrom.wire.adapter_configs import ADAPTER_KEY
from fedfrom.wire.contents import STATISTICS_KEY
from tests.hostile.oracle import assert_is_the_merge, scaling_of
from tests.hostile.values import CONFIG, fishers, grams, mixed_state, moved
from tests.hostile.watch import soon
from tests.inprocess import InProcessGrid
from tests.models import Arrays, Scaling, record_of

STATES = {dtype: mixed_state(dtype=dtype) for dtype in (np.float16, np.float32, np.float64)}


STATISTICS = {"gram": grams(0), "fisher": fishers(STATES[np.float32], 0)}


def sent_and_replies(strategy: FedMerge, state: Arrays, honest: int = 2) -> tuple[list[Message], Message]:
    """Let a strategy send a state; return honest clients' replies, and one that is honest yet."""

    def client(message: Message, context: Any) -> Message:
        partition = int(context.node_config["partition-id"])
        content = RecordDict({"arrays": record_of(moved(state, partition))})
        content["metrics"] = MetricRecord({"num-examples": 10 * (partition + 1), "loss": 1.0 / (partition + 3)})
        if ADAPTER_KEY in message.content:
            content[ADAPTER_KEY] = message.content[ADAPTER_KEY]
        if strategy.method.needs == "gram":
            content[STATISTICS_KEY] = record_of(grams(partition))
        elif strategy.method.needs == "fisher":
            content[STATISTICS_KEY] = record_of(fishers(state, partition))
        return Message(content, reply_to=message)

    grid = InProcessGrid(client, honest + 1)
    *replies, last = grid.send_and_receive(strategy.configure_train(1, record_of(state), ConfigRecord(), grid))
    return replies, last


def assert_reason(reason: str) -> None:
    """One line of bearable length that says what was expected and what was found."""
    assert "expected" in reason and "found" in reason and reason.isprintable() and len(reason) < 1000, reason


SUBJECT = re.compile(
    r"(what )?(client \d|ann)|reference|configs|examples|received|rank|scope|method|server_lr|clip|as_reference|'\w"
)
"""What every error starts with: whose input, or which argument."""


def tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(np.asarray(value)) for key, value in arrays.items()}


def numpy_of(state: dict[str, torch.Tensor]) -> Arrays:
    """Return a state in the widest dtypes that numpy has: factors as matrices, under names without an adapter's."""
    found = {}
    for key, value in state.items():
        wide = value.detach().to(torch.float64 if value.is_floating_point() else torch.int64)
        is_factor = re.search(r"lora_[AB]\.(default\.)?weight$", key)
        found[key.replace(".default", "")] = (wide.flatten(1) if is_factor else wide).numpy()
    return found


def assert_refused_or_merged(arguments: dict[str, Any]) -> None:
    """Assert that a merge is right, or is refused by a ValueError of one line that says whose fault it is."""
    try:
        with soon(20):
            merged, report = merge(**arguments)
    except ValueError as error:
        message = str(error)
        assert type(error) is ValueError and message.isprintable(), repr(error)
        assert SUBJECT.match(message) and "expected" in message and "found" in message, message
        event("refused")
        return
    event("merged")
    json.dumps(report.to_dict())
    template = {**arguments["states"][0], **(arguments.get("reference") or {})}
    for key, value in merged.items():
        assert value.is_floating_point() is template[key].is_floating_point()
        assert not value.is_floating_point() or bool(value.isfinite().all())
    plain = {"server_lr", "clip", "as_reference", "received", "rank"}.isdisjoint(arguments)
    if plain and arguments["method"] in ("from", "average", "soup"):
        assert_is_right(arguments, merged, report)


def assert_is_right(arguments: dict[str, Any], merged: dict[str, torch.Tensor], report: Any) -> None:
    """Assert that what `merge` made of these arguments is what the oracle makes of them."""
    states, reference, configs = (arguments.get(name) for name in ("states", "reference", "configs"))
    if configs is not None and configs[0] is None:  # then no client has any
        configs = None
    if reference is not None and reference.keys() != states[0].keys():
        return  # layers without a reference among others: not the oracle's
    kinds = [torch.finfo(value.dtype) for value in merged.values() if value.is_floating_point()]
    precision = (
        (max(kind.eps for kind in kinds), max(kind.smallest_normal * kind.eps for kind in kinds)) if kinds else None
    )
    one: Scaling = lambda module: 1.0  # noqa: E731
    # without configs one scaling is assumed, whatever it is
    scalings = None if configs is None else [scaling_of(config) for config in configs]
    assert_is_the_merge(
        numpy_of(merged),
        None if reference is None else numpy_of(reference),
        [numpy_of(state) for state in states],
        arguments.get("examples") or [1] * len(states),
        k=1.0 if arguments["method"] == "from" else 0.0,
        scaling=one if configs is None else scaling_of(arguments.get("reference_config") or CONFIG),
        scalings=scalings,
        merged_scaling=one if configs is None else scaling_of(report.config),
        precision=precision,
    )


FILE_STATE = {key: value for key, value in tensors(STATES[np.float32]).items() if "words" not in key}


def refused(*words: str, **arguments: Any) -> str:
    with soon(20), pytest.raises(ValueError) as caught:
        merge(**arguments)
    assert type(caught.value) is ValueError
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)
