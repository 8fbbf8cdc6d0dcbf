"""What nodes of a smaller rank are sent: the leading ranks that they use, from the second time on, and no less."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict

from fedfrom import FedFroM, FedMerge, client
from fedfrom.merging.peft import layers as L
from fedfrom.wire import ranks
from fedfrom.wire.ranks import NodeRanks
from fedfrom.wire.records import to_state
from tests.inprocess import InProcessGrid
from tests.models import adapted, adapter, arrays_of, crossed, far_apart, noisy, products, record_of, same_bits
from tests.test_client import QUERY, Federation, federations, message, scaling_of

A, B = f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"


def widths(record: ArrayRecord) -> dict[str, int]:
    """The rank of each module in a record."""
    state = to_state(record)
    return L.ranks({k: v for k, v in L.find_layers(state, "state").items() if v.is_adapter}, state)


def num_bytes(record: ArrayRecord) -> int:
    return sum(len(array.data) for array in record.values())


def whole(self: NodeRanks, arrays: ArrayRecord, node_ids: Any) -> dict[int, ArrayRecord]:
    return dict.fromkeys(node_ids, arrays)


@federations
def test_a_node_is_sent_its_ranks_once_it_has_replied(name: str) -> None:
    """Train and evaluate messages: the leading ones of the global factors to the bit, and all else as it is."""
    federation, held = Federation(name), list[ArrayRecord]()
    strategy = FedFroM(lora_config=federation.server.peft_config["default"])
    strategy.start(federation.grid, adapter(federation.server), 3, evaluate_fn=lambda _, arrays: held.append(arrays))
    own = [widths(adapter(model)) for model in federation.models]
    everything = widths(held[0])
    for message_type in ("train", "evaluate"):
        for server_round, contents in enumerate(crossed(federation.grid, "down", message_type)):
            arrays = held[server_round + (message_type == "evaluate")]  # evaluated after the merge
            for i, content in contents.items():
                first = message_type == "train" and server_round == 0
                expected = {k: r if first else min(r, own[i][k]) for k, r in everything.items()}
                assert widths(content["arrays"]) == expected
                leading = L.cut_to_ranks(to_state(arrays), L.find_layers(arrays, "state"), expected)
                cut = {key: tensor.numpy() for key, tensor in leading.items()}
                assert list(content["arrays"]) == list(arrays)
                assert same_bits(content["arrays"], record_of(cut))
    report, smaller = strategy.reports[2], [i for i, found in enumerate(own) if found != everything]
    assert report.bytes_down == sum(num_bytes(c["arrays"]) for c in crossed(federation.grid, "down")[1].values())
    assert (report.bytes_down < strategy.reports[1].bytes_down) == any(
        own[i][k] < r for i in smaller for k, r in everything.items()
    )
    assert report.bytes_up == strategy.reports[1].bytes_up


@federations
def test_clients_train_from_the_same_bits_whoever_cuts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Federation(name), Federation(name)
    arrays, strategy = one.run(rounds=3)
    monkeypatch.setattr(NodeRanks, "cut", whole)
    expected, uncut = other.run(rounds=3)
    for server_round in range(3):
        for i, found in one.loaded[server_round].items():
            for module, effect in found.items():
                assert effect.tobytes() == other.loaded[server_round][i][module].tobytes()
        replies = [crossed(each.grid, "up")[server_round] for each in (one, other)]
        assert all(same_bits(replies[0][i]["arrays"], replies[1][i]["arrays"]) for i in replies[1])
        assert same_bits(record_of(arrays[server_round + 1]), record_of(expected[server_round + 1]))
        assert strategy.reports[server_round + 1].merge.layers == uncut.reports[server_round + 1].merge.layers


@pytest.mark.parametrize("r", [2, 4, 8, 11])
def test_loading_what_is_cut_is_loading_the_whole(r: int) -> None:
    """Into a model that was trained before too, whose own rows beyond stay."""
    config = {"r": 8, "lora_alpha": 16}
    state = arrays_of(adapter(adapted(**config, seed=1)))
    state[B] = np.random.default_rng(0).normal(size=state[B].shape).astype(np.float32)
    cut = {**state, A: state[A][:r], B: state[B][:, :r]}
    models = [adapted(r=r, lora_alpha=3, seed=5) for _ in range(2)]
    for model, sent in zip(models, (state, cut), strict=True):
        client.load(model, message(sent, config))
    assert same_bits(adapter(models[0]), adapter(models[1]))


def with_ranks(of: Callable[[int, int], int | None]) -> Callable[[Message, Context], Message]:
    """Return clients that train nothing, at the rank that `of` says for a partition and a round; None fails."""

    def app(msg: Message, context: Context) -> Message:
        server_round = int(msg.content["config"]["server-round"])
        rank = of(int(context.node_config["partition-id"]), server_round)
        if rank is None:
            raise RuntimeError("out of memory")
        model = adapted(r=rank, lora_alpha=2 * rank)
        client.load(model, msg)
        if msg.metadata.message_type == "evaluate":
            return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=msg)
        return client.reply(model, msg, {"num-examples": 1})

    return app


def sent_ranks(grid: InProcessGrid, message_type: str = "train") -> list[dict[int, int]]:
    """The rank of `query` that each partition was sent, by round."""
    return [
        {i: widths(content["arrays"])[QUERY] for i, content in contents.items()}
        for contents in crossed(grid, "down", message_type)
    ]


def started(app: Any, rounds: int, grid: InProcessGrid | None = None, **options: Any) -> tuple[InProcessGrid, FedFroM]:
    server = adapted(r=8, lora_alpha=16)
    state = arrays_of(adapter(server))
    state[B] = np.random.default_rng(0).normal(size=state[B].shape).astype(np.float32)
    grid = InProcessGrid(app, 3, record=True) if grid is None else grid
    strategy = FedFroM(lora_config=server.peft_config["default"], **options)
    scaling, before = scaling_of(server), products(state, scaling_of(server))

    def unchanged(server_round: int, arrays: ArrayRecord) -> None:
        assert far_apart(products(arrays_of(arrays), scaling), before) < 1e-6

    strategy.start(grid, record_of(state), num_rounds=rounds, evaluate_fn=unchanged)
    return grid, strategy


def test_a_node_may_change_its_rank() -> None:
    """It starts from what it was sent: where it trains nothing, nothing changes, though it has a larger rank now."""
    plan = {0: [2, 8, 4, 4], 1: [8, 1, 12, 3], 2: [3, 3, 3, 3]}
    grid, strategy = started(with_ranks(lambda i, server_round: plan[i][server_round - 1]), 4)
    assert not grid.errors and not any(report.rejected for report in strategy.reports.values())
    assert sent_ranks(grid) == [{0: 8, 1: 8, 2: 8}, {0: 2, 1: 8, 2: 3}, {0: 8, 1: 1, 2: 3}, {0: 4, 1: 8, 2: 3}]


def test_a_node_that_could_not_reply_is_sent_everything_again() -> None:
    """An error, a rejection or silence: what it said before may be the reason."""
    grid = InProcessGrid(with_ranks(lambda i, server_round: None if (i, server_round) == (1, 2) else 4), 3, record=True)
    inner = grid.workers.client

    def app(msg: Message, context: Context) -> Message:
        reply = inner(msg, context)
        if (int(context.node_config["partition-id"]), int(msg.content["config"]["server-round"])) == (0, 2):
            reply.content["metrics"]["num-examples"] = 0
        return reply

    grid.workers.client = app
    started(None, 4, grid, fraction_evaluate=0.0)
    assert sent_ranks(grid) == [
        {0: 8, 1: 8, 2: 8},
        {0: 4, 1: 4, 2: 4},
        {0: 8, 1: 8, 2: 4},
        {0: 4, 1: 4, 2: 4},
    ]


@pytest.mark.parametrize("strategy", [FedFroM, lambda **options: FedMerge("factor-average", **options)])
def test_clients_without_fedfroms_client_see_no_difference(strategy: Any) -> None:
    grid = InProcessGrid(noisy, 3, record=True)
    start = adapter(adapted(r=4, lora_alpha=4))
    result = strategy(lora_config={"r": 4, "lora_alpha": 4}).start(grid, start, num_rounds=3)
    for message_type in ("train", "evaluate"):
        for contents in crossed(grid, "down", message_type):
            assert all(same_bits(content["arrays"], contents[0]["arrays"]) for content in contents.values())
    assert same_bits(crossed(grid, "down", "evaluate")[2][1]["arrays"], result.arrays)


def test_replies_on_disk_and_selection_go_by_what_was_sent() -> None:
    plan = {0: [2, 8, 4], 1: [8, 1, 12], 2: [3, 3, 3]}
    app = with_ranks(lambda i, server_round: plan[i % 3][server_round - 1])
    for options in ({"memory_budget": 0}, {"select": "multikrum", "attackers": 1}, {"scope": "model"}):
        grid, strategy = started(app, 3, InProcessGrid(app, 5, record=True), **options)
        assert sent_ranks(grid)[2] == {0: 8, 1: 1, 2: 3, 3: 8, 4: 1}
        assert strategy.reports[3].merge is not None and not grid.errors


def test_a_resumed_run_sends_what_the_whole_one_would(tmp_path: Path) -> None:
    app = with_ranks(lambda i, server_round: (2, 8, 3)[i])
    _, expected = started(app, 4, fraction_evaluate=0.0)
    started(app, 2, checkpoint=tmp_path, fraction_evaluate=0.0)
    grid, resumed = started(app, 4, checkpoint=tmp_path, fraction_evaluate=0.0)
    assert sent_ranks(grid) == [{0: 2, 1: 8, 2: 3}] * 2
    down = [[strategy.reports[i].bytes_down for i in range(1, 5)] for strategy in (expected, resumed)]
    assert down[0] == down[1] and down[0][1] < down[0][0]


def test_a_second_start_knows_nothing_of_the_first() -> None:
    app = with_ranks(lambda i, server_round: 2)
    server = adapted(r=8, lora_alpha=16)
    strategy = FedFroM(lora_config=server.peft_config["default"])
    for _ in range(2):
        grid = InProcessGrid(app, 3, record=True)
        strategy.start(grid, adapter(server), num_rounds=2)
        assert sent_ranks(grid) == [{0: 8, 1: 8, 2: 8}, {0: 2, 1: 2, 2: 2}]


# --- What is remembered ----------------------------------------------------------------------------------------------


def test_what_is_remembered_is_bounded_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As JSON too; those heard from last stay."""
    monkeypatch.setattr(ranks, "MOST_NODES", 2)
    strategies = []
    grid, strategy = started(with_ranks(lambda i, server_round: (2, 8, 3)[i]), 2)
    strategies.append(strategy)
    node = {partition: node_id for node_id, partition in grid.partition_of.items()}
    known = strategy._ranks.known()
    assert known == {node[0]: {QUERY: 2}, node[2]: {QUERY: 3}}  # who has the global rank takes no room
    monkeypatch.setattr(ranks, "MOST_NODES", 1)
    _, strategy = started(with_ranks(lambda i, server_round: (2, 8, 2)[i]), 2)
    assert len(strategy._ranks.known()) == 1
    other = NodeRanks()
    other.restore(json.loads(json.dumps(strategies[0]._ranks.state())))
    assert list(other.known().items()) == list(known.items())


def test_a_lie_about_ranks_costs_its_teller_alone() -> None:
    """Names of no module, ranks beyond any layer, a config that its arrays are not of."""

    def app(msg: Message, context: Context) -> Message:
        reply = with_ranks(lambda i, server_round: 4)(msg, context)
        if context.node_config["partition-id"] == 0 and msg.metadata.message_type == "train":
            server_round = int(msg.content["config"]["server-round"])
            lie = {1: {"nobody": 1}, 2: {"nobody": 1, "query": 10**30}, 3: {"query": 1}}[server_round]
            reply.content["fedfrom.adapter"]["rank_pattern"] = json.dumps(lie)
        return reply

    grid, strategy = started(app, 3)
    assert [set(report.rejected) for report in strategy.reports.values()] == [
        {node for node, partition in grid.partition_of.items() if partition == 0} if number else set()
        for number in range(3)
    ]
    assert sent_ranks(grid) == [{0: 8, 1: 8, 2: 8}, {0: 4, 1: 4, 2: 4}, {0: 8, 1: 4, 2: 4}]
    assert sent_ranks(grid, "evaluate")[2] == {0: 8, 1: 4, 2: 4}


def test_nodes_of_many_patterns_share_what_is_cut_alike() -> None:
    modules = [f"m.{i}.q" for i in range(4)]
    state = {
        f"{name}.lora_{part}.weight": np.ones((8, 32) if part == "A" else (32, 8), np.float32)
        for name in modules
        for part in "AB"
    }
    nodes = NodeRanks()
    patterns = [{name: 1 + (i >> j & 1) for j, name in enumerate(modules)} for i in range(16)]
    nodes.restore({"ranks": patterns, "nodes": [[i, i] for i in range(16)]})
    found = nodes.cut(record_of(state), range(16))
    data = {id(array.data): len(array.data) for record in found.values() for array in record.values()}
    assert all(widths(found[i]) == patterns[i] for i in range(16))
    assert len(data) == 2 * 2 * len(modules)  # A and B at ranks 1 and 2, not of 16 patterns
