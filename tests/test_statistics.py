"""Gram and Fisher statistics: what clients compute of their data, and whole rounds that merge by it."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from fedfrom import FedFroM, FedMerge, client
from fedfrom.merging.methods.soups import GreedySoup
from fedfrom.merging.peft.layers import find_layers
from fedfrom.wire.contents import STATISTICS_KEY, model_record
from tests.inprocess import InProcessGrid
from tests.models import (
    PREFIX,
    Arrays,
    adapted,
    adapter,
    arrays_of,
    crossed,
    factors,
    far_apart,
    faulty,
    mixed_state,
    noisy,
    products,
    record_of,
    same_bits,
    train,
    truncated,
)


class Tagger(nn.Module):
    """Words in, a label out; linear inputs of all kinds: tokens with padding, flattened tokens, a pooled vector."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(24, 6)
        self.first = nn.Linear(6, 7)
        self.second = nn.Linear(7, 6)
        self.unused = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        inside = self.first(self.words(tokens)).tanh()
        outside = self.second(inside.flatten(0, 1)).view(*tokens.shape, -1).tanh()
        mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
        pooled = (outside * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return self.head(self.drop(pooled))


def tagger(kind: str) -> nn.Module:
    """Return the model in one of the ways that it is trained."""
    torch.manual_seed(0)
    model = Tagger()
    if kind == "full":
        return model
    if kind == "head":
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        return model
    config = LoraConfig(r=2, target_modules=["first", "second"], lora_dropout=0.3, modules_to_save=["head"])
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)  # zero would leave A without a gradient
    return adapted


def batch(seed: int, sizes: tuple[int, ...] = (5, 2, 4)) -> dict[str, Tensor]:
    """Return examples of these lengths, padded with what would be seen if it counted."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 24, (len(sizes), max(sizes)), generator=generator)
    mask = (torch.arange(max(sizes)) < torch.tensor(sizes).unsqueeze(1)).long()
    return {"tokens": tokens, "attention_mask": mask}


def inputs_by_hand(model: nn.Module, kind: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return (rows, d_in) float64 inputs of each linear layer, every example run alone and without its padding."""
    rows: dict[str, list[Tensor]] = {"first": [], "second": [], "head": []}
    net = model.get_base_model() if isinstance(model, PeftModel) else model
    for tokens, mask in zip(given["tokens"], given["attention_mask"], strict=True):
        x = net.words(tokens[mask.bool()])
        inside = net.first(x).tanh()
        pooled = net.second(inside).tanh().mean(0, keepdim=True)
        for name, value in {"first": x, "second": inside, "head": pooled}.items():
            rows[name].append(value)
    prefix = PREFIX if kind == "lora" else ""
    return {prefix + name: torch.cat(values).detach().double() for name, values in rows.items()}


def same_model(before: list[Any], after: list[Any]) -> bool:
    """Return whether two lists from `everything` agree."""
    pairs = zip(before, after, strict=True)
    return all(torch.equal(one, other) if isinstance(one, Tensor) else one == other for one, other in pairs)


def everything(model: nn.Module) -> list[Any]:
    """Return what a helper must leave alone: weights, modes, gradients and hooks."""
    kept: list[Any] = [value.clone() for value in model.state_dict().values()]
    for module in model.modules():
        kept += [module.training, len(module._forward_pre_hooks)]
    return kept + [parameter.grad is None for parameter in model.parameters()]


# --- Gram matrices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full", "head"])
def test_gram_is_the_mean_of_x_x_without_padding(kind: str) -> None:
    model = tagger(kind).eval()
    batches = [batch(1), batch(2, (3, 3)), batch(3, (1, 6))]
    by_hand = [inputs_by_hand(model, kind, given) for given in batches]
    model.train()
    before = everything(model)
    found = client.gram(model, iter(batches))
    assert same_model(before, everything(model))
    expected = {name: torch.cat([rows[name] for rows in by_hand]) for name in by_hand[0]}
    if kind == "head":
        expected = {"head": expected["head"]}
    assert found.keys() == expected.keys()
    for name, X in expected.items():
        G = found[name]
        assert G.dtype == torch.float32 and torch.equal(G, G.T) and not G.requires_grad
        # the model runs in float32
        assert torch.allclose(G.double(), X.T @ X / len(X), rtol=1e-5, atol=1e-6)


def test_gram_names_are_those_of_the_layers_that_are_sent() -> None:
    for kind in ("lora", "full"):
        model = tagger(kind)
        state = client.adapter_state(model) if kind == "lora" else model.state_dict()
        names = {name.removesuffix(".weight") for name in find_layers(state, "state")}
        assert client.gram(model, [batch(0)]).keys() < names


def test_padding_counts_where_no_mask_says_it_is_padding() -> None:
    model = tagger("full")
    tokens = batch(0)["tokens"]
    X = model.words(tokens).detach().flatten(0, 1)
    for given in (tokens, (tokens,), {"tokens": tokens}):
        assert torch.allclose(client.gram(model, [given])["first"], X.T @ X / len(X), rtol=1e-5, atol=1e-6)


def test_gram_takes_so_many_batches_at_most() -> None:
    model, batches = tagger("full"), [batch(seed) for seed in range(3)]
    two, limited = client.gram(model, batches[:2]), client.gram(model, iter(batches), max_batches=2)
    assert all(torch.equal(two[name], limited[name]) for name in two)


def test_gram_is_collected_during_training() -> None:
    model = tagger("lora").eval()  # without dropout, and at lr 0, the rounds of training see what `gram` sees
    batches = [batch(1), batch(2)]
    with client.collecting_gram(model) as found:
        for given in batches:
            model(**given).sum().backward()
    expected = client.gram(model, batches)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-6) for name in found)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_has_no_statistics_is_said() -> None:
    frozen = tagger("full").requires_grad_(False)
    for helper in (client.gram, lambda model, batches: client.fisher(model, batches, nll)):
        with pytest.raises(ValueError, match="model: expected a .* trained.*, found none"):
            helper(frozen, [batch(0)])
        with pytest.raises(ValueError, match="batches: expected at least one, found none"):
            helper(tagger("full"), [])
    broken = tagger("full")
    nn.init.constant_(broken.words.weight, float("nan"))
    with pytest.raises(ValueError, match="'first': expected finite inputs"):
        client.gram(broken, [batch(0)])


# --- Fisher diagonals ------------------------------------------------------------------------------------------------


def nll(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """Return the mean negative log-likelihood of labels that follow from the tokens."""
    return nn.functional.cross_entropy(model(**given), given["tokens"][:, 0] % 3)


@pytest.mark.parametrize("kind", ["lora", "full", "head"])
def test_fisher_is_the_mean_of_each_examples_squared_gradient(kind: str) -> None:
    model = tagger(kind)
    batches = [batch(1), batch(2, (3, 3))]
    before = everything(model.train())
    found = client.fisher(model, iter(batches), nll)
    assert same_model(before, everything(model))
    model.eval()
    state = dict(client.adapter_state(model) if kind == "lora" else model.state_dict(keep_vars=True))
    trained = {p.data_ptr(): p for p in model.parameters() if p.requires_grad}
    expected: dict[str, Tensor] = {}
    for given in batches:
        for i in range(len(given["tokens"])):
            model.zero_grad()
            nll(model, {name: value[i : i + 1] for name, value in given.items()}).backward()
            for key, tensor in state.items():
                if (parameter := trained.get(tensor.data_ptr())) is not None:
                    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    expected[key] = expected.get(key, 0) + gradient.double().square() / 5
    assert found.keys() == expected.keys()
    for key in expected:
        assert found[key].dtype == torch.float32 and found[key].shape == state[key].shape
        assert torch.allclose(found[key].double(), expected[key], rtol=1e-5, atol=1e-12)
    assert any(value.abs().max() > 0 for value in expected.values())


def test_fisher_takes_inputs_and_labels_as_data_loaders_give_them() -> None:
    model, given = tagger("full"), batch(0)
    labels = given["tokens"][:, 0] % 3

    def loss(model: nn.Module, pair: Any) -> Tensor:
        inputs, label = pair
        return nn.functional.cross_entropy(model(**inputs), label)

    expected = client.fisher(model, [given], nll)
    for pair in ([given, labels], (given, labels)):
        found = client.fisher(model, [pair], loss)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    with pytest.raises(ValueError, match=r"one example an entry of dimension 0, found \[2, 3\]"):
        client.fisher(model, [(given, labels[:2])], loss)


# --- Whole rounds ----------------------------------------------------------------------------------------------------

EXAMPLES = [10, 20, 30]


def data(partition: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(partition)
    # words of its own for each client, so that their inputs differ
    tokens = torch.randint(0, 24, (16, 5), generator=generator)
    tokens[:, 1:] = tokens[:, 1:] // 3 + 8 * partition
    return tokens, (tokens.sum(dim=1) + partition) % 3


def statistics(model: nn.Module, needs: str, partition: int) -> dict[str, Tensor]:
    tokens, labels = data(partition)
    if needs == "gram":
        return client.gram(model, [tokens])
    return client.fisher(
        model, [(tokens, labels)], lambda model, pair: nn.functional.cross_entropy(model(pair[0]), pair[1])
    )


Fault = Callable[[RecordDict], None]


def sending(needs: str, faults: dict[int, Fault] | None = None) -> Callable[[Message, Context], Message]:
    """Return a client that trains an adapter, computes its statistics and sends them; some replies altered."""

    def answer(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "evaluate":
            return noisy(message, context)
        partition = int(context.node_config["partition-id"])
        model = adapted()
        client.load(model, message)
        train(model, partition, int(message.content["config"]["server-round"]), lr=0.1)
        metrics = {"num-examples": EXAMPLES[partition]}
        reply = client.reply(model, message, metrics, statistics=statistics(model, needs, partition))
        if faults and partition in faults:
            faults[partition](reply.content)
        return reply

    return answer


def regmean(deltas: list[np.ndarray], grams: list[np.ndarray], weights: np.ndarray, a: float) -> np.ndarray:
    """Return RegMean's theta* from dense float64 matrices."""
    shrunk = [w * (a * G + (1 - a) * np.diag(np.diag(G))) for w, G in zip(weights, grams, strict=True)]
    return sum(d @ G for d, G in zip(deltas, shrunk, strict=True)) @ np.linalg.inv(sum(shrunk))


def expected_round(name: str, sent: Arrays, replies: list[Arrays], stats: list[Arrays], a: float) -> Arrays:
    """Return what a round leads to: products of adapters and tensors, dense and in float64."""
    weights = np.array(EXAMPLES[: len(replies)]) / sum(EXAMPLES[: len(replies)])

    def mean(values: list[np.ndarray]) -> np.ndarray:
        return sum(w * value for w, value in zip(weights, values, strict=True))

    if name == "fisher":
        merged = {}
        for key, W in sent.items():
            deltas = [reply[key].astype(np.float64) - W for reply in replies]
            if W.dtype.kind in "iu":
                merged[key] = W
            elif key not in stats[0]:
                merged[key] = W + mean(deltas)
            else:
                F = [s[key].astype(np.float64) + 1e-12 for s in stats]
                merged[key] = W + mean([f * d for f, d in zip(F, deltas, strict=True)]) / mean(F)
        return products(merged)
    W, own, merged = products(sent), [products(reply) for reply in replies], {}
    for layer, value in W.items():
        deltas = [reply[layer] - value for reply in own]
        G = [s[layer.removesuffix(".weight")].astype(np.float64) for s in stats if layer.removesuffix(".weight") in s]
        if layer in sent and sent[layer].dtype.kind in "iu":
            merged[layer] = value
        elif not G:
            merged[layer] = value + mean(deltas)
        else:
            change = regmean(deltas, G, weights, a)
            if name == "lorm" and layer not in sent:
                # min ||(X - W - change) M^(1/2)|| over rank r is a truncated SVD in the metric M = sum w G
                M = sum(w * (a * g + (1 - a) * np.diag(np.diag(g))) for w, g in zip(weights, G, strict=True))
                C = np.linalg.cholesky(M)
                best = truncated((value + change) @ C, factors(sent, layer)[1].shape[0]) @ np.linalg.inv(C)
                change = best - value
            merged[layer] = value + change
        if layer not in sent:
            merged[layer] = truncated(merged[layer], factors(sent, layer)[1].shape[0])
    return merged


@pytest.mark.parametrize("name", ["regmean", "lorm", "fisher"])
def test_rounds_equal_a_dense_float64_oracle(name: str) -> None:
    # few words leave LoRM's metric near singular at a = 0.9, where its alternation takes thousands of steps
    options = {} if name == "fisher" else {"off_diagonal": 0.5}
    strategy = FedMerge(name, examples_power=1, **options)
    grid = InProcessGrid(sending(strategy.method.needs), 3, record=True)
    result = strategy.start(grid, adapter(adapted()), num_rounds=2)
    assert not grid.errors and not strategy.reports[2].rejected
    down, up = crossed(grid, "down"), crossed(grid, "up")
    ends = [arrays_of(down[1][0]["arrays"]), arrays_of(result.arrays)]
    for number, end in enumerate(ends):
        replies = [arrays_of(up[number][i]["arrays"]) for i in range(3)]
        stats = [arrays_of(up[number][i][STATISTICS_KEY]) for i in range(3)]
        expected = expected_round(name, arrays_of(down[number][0]["arrays"]), replies, stats, 0.5)
        # float32 factors on the wire; LoRM stops at a tolerance
        assert far_apart(products(end), expected) < (1e-4 if name == "lorm" else 2e-6)
    plain = expected_round("regmean", arrays_of(down[1][0]["arrays"]), replies, [{}] * 3, 0.5)
    assert far_apart(products(ends[1]), plain) > 1e-3  # the statistics count


def test_equal_gram_matrices_give_the_mean() -> None:
    identical = statistics(adapted(), "gram", 0)
    for G in identical.values():
        G += torch.eye(len(G))  # inputs that are never other than 0 would keep their weights

    def equal(content: RecordDict) -> None:
        content[STATISTICS_KEY] = record_of({name: G.numpy() for name, G in identical.items()})

    start = adapter(adapted())
    ends = []
    for strategy in (FedMerge("regmean"), FedMerge("average")):
        grid = InProcessGrid(sending("gram", dict.fromkeys(range(3), equal)), 3)
        ends.append(products(arrays_of(strategy.start(grid, start, num_rounds=1).arrays)))
        assert len(strategy.reports[1].nodes) == 3
    assert far_apart(*ends) < 1e-6


def strip(content: RecordDict) -> None:
    del content[STATISTICS_KEY]


def altered(change: Callable[[Arrays], None]) -> Fault:
    def fault(content: RecordDict) -> None:
        arrays = {key: value.copy() for key, value in arrays_of(content[STATISTICS_KEY]).items()}
        change(arrays)
        content[STATISTICS_KEY] = record_of(arrays)

    return fault


QUERY = f"{PREFIX}query"
FAULTS: dict[str, tuple[Fault, str]] = {
    "none": (strip, r"expected {0} statistics .* found none: .* fedfrom.client.{0} .* fedfrom.client.reply"),
    "empty": (altered(Arrays.clear), r"expected {0} statistics .* found none: .* fedfrom.client.{0}"),
    "NaN": (altered(lambda s: next(iter(s.values())).fill(np.nan)), "statistics, .*expected finite numbers"),
    "negative": (altered(lambda s: next(iter(s.values())).fill(-1)), "statistics, .*expected mean squares >= 0"),
    "shape": (
        altered(lambda s: s.update({next(iter(s)): np.ones((2, 3), np.float32)})),
        r"statistics, .*expected floating-point \(.*\), found \(2, 3\) float32",
    ),
    "integers": (
        altered(lambda s: s.update({key: value.astype(np.int64) for key, value in s.items()})),
        "statistics, .*expected floating-point .* int64",
    ),
    "name": (altered(lambda s: s.update({"mine": s.popitem()[1]})), "statistics, 'mine': expected the name of a layer"),
    "a layer less": (
        altered(lambda s: s.popitem() and None),
        "{0} statistics: expected those of the layers .* 1 missing",
    ),
    "unreadable": (
        lambda content: setattr(next(iter(content[STATISTICS_KEY].values())), "data", b"no"),
        "statistics, .*expected a readable array",
    ),
}


@pytest.mark.parametrize("needs", ["gram", "fisher"])
@pytest.mark.parametrize("fault", FAULTS)
def test_bad_statistics_are_rejected_by_name_and_the_rest_goes_on(fault: str, needs: str) -> None:
    change, reason = FAULTS[fault]
    name = {"gram": "regmean", "fisher": "fisher"}[needs]
    strategy, without = FedMerge(name), FedMerge(name, min_train_nodes=1)
    result = strategy.start(grid := InProcessGrid(sending(needs, {2: change}), 3), start := adapter(adapted()), 1)
    report = strategy.reports[1]
    (bad,) = [node for node, partition in grid.partition_of.items() if partition == 2]
    assert list(report.rejected) == [bad] and len(report.nodes) == 2 and not grid.errors
    assert re.search(reason.format(needs), report.rejected[bad], re.DOTALL), report.rejected[bad]
    two = without.start(InProcessGrid(sending(needs), 3, silent={2}), start, num_rounds=1)
    assert same_bits(result.arrays, two.arrays)


def test_a_run_without_any_statistics_ends_with_what_is_missing() -> None:
    strategy, start = FedMerge("lorm"), record_of(mixed_state())
    with pytest.raises(RuntimeError, match=r"fedfrom\.client\.gram"):
        strategy.start(InProcessGrid(noisy, 3), start, num_rounds=1)
    assert strategy.reports[1].merge is None
    assert all("fedfrom.client.gram" in reason for reason in strategy.reports[1].rejected.values())
    assert len(strategy.reports[1].rejected) == 3


def test_methods_that_need_no_statistics_leave_them_unread() -> None:
    def spoil(content: RecordDict) -> None:
        altered(lambda s: next(iter(s.values())).fill(np.nan))(content)
        content["my-own-name"] = content.pop("arrays")  # statistics do not count as a second model

    start, ends = adapter(adapted()), []
    for faults in ({}, {0: spoil}, dict.fromkeys(range(3), strip)):
        strategy = FedFroM()
        ends.append(strategy.start(InProcessGrid(sending("gram", faults), 3), start, num_rounds=1).arrays)
        assert not strategy.reports[1].rejected
    assert same_bits(ends[0], ends[1]) and same_bits(ends[0], ends[2])


def test_the_order_of_replies_changes_nothing_to_the_bit() -> None:
    """Three clients train alike and know other data: only their statistics part them (two would commute)."""

    def twin(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        if message.metadata.message_type == "evaluate":
            return noisy(message, context)
        model = adapted()
        client.load(model, message)
        train(model, 0 if partition < 3 else partition, 1)
        found = statistics(model, "gram", 0)
        generator = torch.Generator().manual_seed(partition)
        mixed = {name: G + torch.rand(len(G), generator=generator).diag() for name, G in found.items()}
        return client.reply(model, message, {"num-examples": 7}, statistics=mixed)

    start, ends, nodes = adapter(adapted()), [], []
    for order in (lambda replies: replies, lambda replies: replies[::-1], lambda replies: replies[1:] + replies[:1]):
        grid, strategy = InProcessGrid(twin, 4, reply_order=order), FedMerge("regmean")
        ends.append(strategy.start(grid, start, num_rounds=1).arrays)
        nodes.append(strategy.reports[1].nodes)  # rounding to float32 would hide most sums in another order
        assert not grid.errors
    assert same_bits(ends[0], ends[1]) and same_bits(ends[0], ends[2])
    assert nodes[0] == nodes[1] == nodes[2]


def test_statistics_are_sent_only_when_given(task_identity: None) -> None:
    message = Message(RecordDict(), 1, "train")
    model = adapted()
    plain = client.reply(model, message, {"num-examples": 1})
    assert list(plain.content.array_records) == ["arrays"]
    with_gram = client.reply(model, message, {"num-examples": 1}, statistics={"a": torch.eye(2)})
    assert set(with_gram.content.array_records) == {"arrays", STATISTICS_KEY}
    assert isinstance(model_record(with_gram.content, "arrays"), ArrayRecord)


def test_a_greedy_soup_leaves_out_who_makes_the_model_worse() -> None:
    """One client of three sends noise a hundred times as large; the smallest model is the best."""

    def loud(content: RecordDict) -> None:
        arrays = arrays_of(content["arrays"])
        content["arrays"] = record_of({key: 100 * value for key, value in arrays.items()})

    def smallest(state: Any) -> float:
        return -float(sum(value.double().square().sum() for value in state.values()))

    for strategy in (FedMerge("greedy-soup", validate=smallest), FedMerge(GreedySoup(validate=smallest))):
        grid = InProcessGrid(faulty({2: loud}), 3)
        found = strategy.start(grid, record_of(mixed_state()), num_rounds=1)
        report = strategy.reports[1]
        assert report.valid == 3 and len(report.nodes) in (1, 2) and not report.missing
        assert report.merge is not None and len(report.merge.clients) == len(report.nodes)
        assert found.train_metrics_clientapp[1]["replies-valid"] == 3
        soup = FedMerge("soup").start(InProcessGrid(faulty({2: loud}), 3), record_of(mixed_state()), num_rounds=1)
        scores = [smallest(each.arrays.to_torch_state_dict()) for each in (found, soup)]
        assert scores[0] > scores[1] / 10
    with pytest.raises(ValueError, match="validate"):
        FedMerge("greedy-soup")
