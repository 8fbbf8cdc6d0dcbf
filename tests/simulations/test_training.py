"""Local training: seeded, by steps or epochs, and able to learn."""

from collections import Counter

import pytest
import torch

from simulations import models, tasks, training
from simulations.batches import Tokens, tokenise, training_batches
from simulations.options import Options


def prepared(tiny: dict, **more) -> tuple[torch.nn.Module, Tokens, Options, tasks.Task]:
    options = Options.from_mapping({**tiny, **more})
    (task,) = tasks.load(options)
    head = models.Head(task.num_labels, task.regression)
    tokens = tokenise(task.train, models.tokenizer(options), options, task.regression)
    return models.build(options, head), tokens, options, task


def test_the_same_seed_gives_the_same_weights(tiny: dict) -> None:
    def trained(seed: int) -> dict[str, torch.Tensor]:
        model, tokens, options, _ = prepared(tiny, lora_dropout=0.1)
        training.train(model, tokens, options, seed)
        return models.trained_state(model)

    first = trained(1)
    torch.rand(5)  # whatever was drawn before
    again, other = trained(1), trained(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_training_draws_nothing_from_the_global_generator(tiny: dict) -> None:
    model, tokens, options, _ = prepared(tiny)
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    training.train(model, tokens, options, 1)
    assert torch.equal(torch.rand(1), expected)


KINDS: list[dict] = [{}, {"full": True, "lr": 5e-3}, {"pooling": "head"}, {"task": "stsb"}, {"dora": True}]


@pytest.mark.parametrize("more", KINDS)
def test_it_learns(tiny: dict, more: dict) -> None:
    model, tokens, options, task = prepared(tiny, steps=60, **more)
    before = training.evaluate(model, tokens, task.name)
    done = training.train(model, tokens, options, 1)
    after = training.evaluate(model, tokens, task.name)
    assert after["loss"] < before["loss"]
    assert done.steps == 60
    if task.name == "sst2" and options.pooling == "mean":
        assert after["score"] > task.baseline + 0.1


def test_a_loss_that_is_not_finite_is_an_error(tiny: dict) -> None:
    model, tokens, options, _ = prepared(tiny)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(ArithmeticError, match="lower --lr"):
        training.train(model, tokens, options, 1)


@pytest.mark.parametrize(("steps", "epochs", "batches"), [(7, 1, 7), (2, 5, 2), (0, 1, 4), (0, 3, 12)])
def test_batches_cover_the_data_pass_by_pass(steps: int, epochs: int, batches: int) -> None:
    options = Options(steps=steps, epochs=epochs, batch_size=3)
    rows = list(training_batches(of_lengths([3] * 10), options, seed=0))
    assert len(rows) == batches
    for start in range(0, batches - batches % 4, 4):
        assert sorted(row for batch in rows[start : start + 4] for row in batch) == list(range(10))
    if batches >= 8:
        assert rows[:4] != rows[4:8]


def of_lengths(lengths: list[int]) -> Tokens:
    rows = [{"input_ids": [1] * length} for length in lengths]
    return Tokens.of(rows, torch.zeros(len(rows), dtype=torch.int64), {"input_ids": 0})


def test_batches_of_like_length_cover_the_data_in_another_order_each_pass() -> None:
    lengths = torch.randint(2, 60, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    options = Options(steps=0, epochs=2, batch_size=8, group_by_length=True)
    batches = list(training_batches(of_lengths(lengths), options, seed=0))
    first, second = batches[:125], batches[125:]
    assert sorted(row for batch in first for row in batch) == list(range(1000)) == sorted(sum(second, []))
    assert first != second and first == list(training_batches(of_lengths(lengths), options, seed=0))[:125]
    spans = [max(of) - min(of) for of in ([lengths[row] for row in batch] for batch in batches)]
    assert sum(spans) / len(spans) < 3  # of 58 in a random batch
    longest = [max(lengths[row] for row in batch) for batch in first]
    assert longest != sorted(longest)


def test_bfloat16_is_near_float32_and_not_the_same(tiny: dict) -> None:
    model, tokens, _, _ = prepared(tiny)
    one, other = (torch.cat([out for _, out in training.outputs(model, tokens, 1, of)]) for of in ("auto", "bfloat16"))
    assert one.dtype == other.dtype == torch.float32
    assert 0 < float((one - other).abs().max()) < 0.02 * float(one.abs().max())


def test_seeds_of_rounds_and_clients_differ() -> None:
    seeds = Counter(training.round_seed(s, r, c) for s in range(3) for r in range(12) for c in range(12))
    assert max(seeds.values()) == 1


def test_no_bit_of_an_evaluation_depends_on_the_number_of_workers(tiny: dict) -> None:
    model, tokens, _, _ = prepared(tiny)
    found = [training.evaluate(model, tokens, "sst2", workers) for workers in (1, 2, 5)]
    assert found[0] == found[1] == found[2]


def test_evaluation_batches_hold_every_example_once(tiny: dict) -> None:
    _, tokens, _, _ = prepared(tiny, task="rte")
    assert sorted(row for batch in tokens.by_length() for row in batch) == list(range(len(tokens)))
    inputs, labels = tokens.batch([0, 1, 2])
    assert len({tensor.shape for tensor in inputs.values()}) == 1
    assert torch.equal(labels, tokens.labels[:3])


def test_a_batch_is_padded_to_its_longest_example_and_the_padding_is_masked() -> None:
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}, {"input_ids": [8], "attention_mask": [1]}]
    tokens = Tokens.of(
        [*rows, {"input_ids": [9] * 6, "attention_mask": [1] * 6}],
        torch.tensor([0, 1, 1]),
        {"input_ids": 3, "attention_mask": 0},
    )
    inputs, labels = tokens.batch([1, 0])
    assert inputs["input_ids"].tolist() == [[8, 3, 3], [5, 6, 7]]
    assert inputs["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert labels.tolist() == [1, 0] and inputs["input_ids"].dtype == torch.int64


def test_words_are_known_to_the_tiny_tokenizer(tiny: dict) -> None:
    _, tokens, options, _ = prepared(tiny)
    unknown = models.tokenizer(options).unk_token_id
    assert not any(unknown in row["input_ids"] for row in tokens.rows)


def test_long_inputs_are_cut(tiny: dict) -> None:
    _, tokens, _, _ = prepared(tiny, task="rte", max_length=7)
    assert max(len(row["input_ids"]) for row in tokens.rows) == 7
