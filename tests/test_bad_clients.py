"""One bad client, or one bad reply, ends no run, silences no other client and moves no more than its share."""

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Error, Message, MetricRecord, RecordDict
from google.protobuf.message import DecodeError
from torch import Tensor

from fedfrom import FedFroM, FedMerge, client, merge, outcome, to_record
from fedfrom.merging.linalg import samples
from fedfrom.wire.adapter_configs import ADAPTER_KEY, config_to_record
from fedfrom.wire.contents import STATISTICS_KEY
from fedfrom.wire.records import DELTA, delta_array
from tests.hostile import values as hostile
from tests.inprocess import InProcessGrid
from tests.models import arrays_of, faulty, mixed_state, noisy, record_of, same_bits

QUERY, HEAD = "base_model.model.query", "base_model.model.head.weight"
UNIT = {"r": 4, "lora_alpha": 4}


def start(app: Any, nodes: int, strategy: Any, rounds: int = 2) -> tuple[Any, InProcessGrid]:
    grid = InProcessGrid(app, nodes)
    return strategy.start(grid, record_of(mixed_state()), num_rounds=rounds), grid


def test_a_rank_beyond_the_layer_is_rejected_before_it_takes_memory() -> None:
    def wide(content: RecordDict) -> None:
        arrays = arrays_of(content["arrays"])
        (name_A,) = (key for key in arrays if key.endswith("lora_A.weight"))
        (name_B,) = (key for key in arrays if key.endswith("lora_B.weight"))
        arrays[name_A] = np.ones((5000, arrays[name_A].shape[1]), np.float32)
        arrays[name_B] = np.ones((arrays[name_B].shape[0], 5000), np.float32)
        content["arrays"] = record_of(arrays)
        module = name_A.removesuffix(".lora_A.weight")
        content[ADAPTER_KEY] = config_to_record({"r": 5000, "lora_alpha": 5000, "use_rslora": False}, [module])

    strategy = FedFroM(lora_config=UNIT)
    _, grid = start(faulty({1: wide}), 3, strategy)
    for report in strategy.reports.values():
        assert report.valid == 2 and report.reasons == {"shapes": 1}
        assert "expected a rank up to" in next(iter(report.rejected.values()))
    assert not grid.errors


@pytest.mark.parametrize("error", [torch.linalg.LinAlgError("did not converge"), RuntimeError("x"), MemoryError()])
def test_a_merge_that_fails_skips_the_round(error: Exception, monkeypatch: pytest.MonkeyPatch, flower_log: Any) -> None:
    strategy, merge = FedFroM(), outcome.merge_clients
    calls: list[int] = []

    def once(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise error
        return merge(*arguments)

    monkeypatch.setattr(outcome, "merge_clients", once)
    result, _ = start(noisy, 3, strategy)
    assert strategy.reports[1].merge is None and strategy.reports[1].nodes == [] and strategy.reports[1].valid == 3
    assert strategy.reports[2].merge is not None and not same_bits(result.arrays, record_of(mixed_state()))
    assert any("the merge failed" in record.getMessage() for record in flower_log.records)


def test_a_reply_that_can_not_be_decoded_is_missing_and_the_others_are_merged(flower_log: Any) -> None:
    class Undecodable(InProcessGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            replies = list(super().pull_messages(message_ids))
            if any(self.partition_of[reply.metadata.src_node_id] == 1 for reply in replies):
                raise DecodeError("Error parsing message")
            return replies

    strategy = FedFroM()
    strategy.start(Undecodable(noisy, 3), record_of(mixed_state()), num_rounds=2, timeout=5)
    for report in strategy.reports.values():
        assert report.valid == 2 and len(report.missing) == 1
    assert any("can't be read: DecodeError" in record.getMessage() for record in flower_log.records)


def test_an_errors_reason_is_one_line_of_bearable_length(flower_log: Any) -> None:
    def app(message: Message, context: Any) -> Message:
        if int(context.node_config["partition-id"]) == 0:
            return Message(Error(code=0, reason="\x1b[2J" + "out of\nmemory " * 100_000), reply_to=message)
        return noisy(message, context)

    strategy = FedFroM()
    start(app, 3, strategy, rounds=1)
    (reason,) = strategy.reports[1].failed.values()
    assert len(reason) < 1000 and reason.isprintable() and "out of memory" in reason
    assert all(len(record.getMessage()) < 5000 for record in flower_log.records)


def test_a_large_delta_does_not_leave_a_narrower_models_range() -> None:
    def loud(content: RecordDict) -> None:
        head = torch.full(arrays_of(content["arrays"])[HEAD].shape, 1e30)
        content["arrays"][HEAD] = delta_array(head)

    half = {key: value.astype(np.float16) if value.dtype.kind == "f" else value for key, value in mixed_state().items()}
    strategy = FedMerge("average")
    strategy.start(InProcessGrid(faulty({1: loud}), 3), record_of(half), num_rounds=1)
    assert strategy.reports[1].valid == 2 and strategy.reports[1].reasons == {"too-large": 1}
    assert strategy.reports[1].merge is not None


def test_samples_are_as_wide_as_the_widest_value() -> None:
    values = [torch.ones(8, dtype=torch.bfloat16), torch.full((8,), 1e60, dtype=torch.float64)]
    rows = samples.sampled_deltas(values, [None, None])
    assert rows.isfinite().all() and float(rows[0] @ rows[1]) == pytest.approx(8e60)


def test_a_narrow_model_that_trained_nothing_sends_no_delta() -> None:
    sent = {"weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), "bias": torch.full((3,), 0.1)}
    model = torch.nn.Linear(4, 3).to(torch.bfloat16)
    heard: list[RecordDict] = []

    def app(message: Message, context: Any) -> Message:
        client.load(model, message)
        reply = client.reply(model, message, {"num-examples": 1}, as_delta=True)
        heard.append(reply.content)
        return reply

    FedFroM(fraction_evaluate=0.0).start(InProcessGrid(app, 2), to_record(sent), num_rounds=1)
    assert len(heard) == 2
    for content in heard:
        for array in content["arrays"].values():
            assert array.stype.startswith(DELTA) and not any(array.data[-2 * np.prod(array.shape) :])


@pytest.mark.parametrize("method", ["regmean", "lorm"])
def test_a_gram_matrix_that_is_none_is_rejected(method: str) -> None:
    def app(message: Message, context: Any) -> Message:
        reply = noisy(message, context)
        if message.metadata.message_type == "train":
            grams = hostile.grams(int(context.node_config["partition-id"]))
            if int(context.node_config["partition-id"]) == 1:
                grams = {name: np.triu(np.full_like(value, 1e30), 1) for name, value in grams.items()}
            reply.content[STATISTICS_KEY] = record_of(grams)
        return reply

    strategy = FedMerge(method)
    state = hostile.mixed_state()
    grid = InProcessGrid(app, 3)
    strategy.start(grid, record_of(state), num_rounds=1)
    assert strategy.reports[1].reasons == {"statistics": 1}, (strategy.reports[1].rejected, grid.errors)
    assert "Gram matrix" in next(iter(strategy.reports[1].rejected.values()))


def test_one_client_with_other_metrics_takes_nobody_elses_away() -> None:
    def other(content: RecordDict) -> None:
        content["metrics"] = MetricRecord({"num-examples": 10, "foo": 1.0})

    result, _ = start(faulty({0: other}, "evaluate"), 5, FedFroM(), rounds=1)
    assert set(result.evaluate_metrics_clientapp[1]) == {"loss"}


@pytest.mark.parametrize(("d", "rank", "clients"), [(384, 16, 24), (384, 8, 40)])
def test_factors_of_any_scale_whose_product_is_honest_cost_nobody_the_round(d: int, rank: int, clients: int) -> None:
    """Where many clients' sum is taken by products in float32, scales of 1e36 and 1e-36 are beyond its range."""
    g = torch.Generator().manual_seed(0)
    a, b = "m.q.lora_A.weight", "m.q.lora_B.weight"
    sent = {a: torch.randn(rank, d, generator=g) / d**0.5, b: torch.zeros(d, rank)}

    def reply(i: int, stretched: bool) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(i)
        A, B = sent[a] + 1e-2 * torch.randn(rank, d, generator=g), 1e-2 * torch.randn(d, rank, generator=g)
        for column, scale in ((0, 1e10), (1, 1e-36)) if stretched else ():
            B[:, column] *= scale
            A[column] /= scale
        return {a: A, b: B}

    def product(stretched: int) -> Tensor:
        states = [reply(i, i < stretched) for i in range(clients)]
        merged, _ = merge(states, sent, as_reference=True, clip=1.0)
        return merged[b].double() @ merged[a].double()

    honest = product(0)
    torch.testing.assert_close(product(1), honest, rtol=0, atol=1e-5 * float(honest.abs().max()))
