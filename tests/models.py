"""Small models, the clients that train them, and a dense oracle, for the tests of whole rounds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from tests.inprocess import InProcessGrid

Arrays = dict[str, np.ndarray]
PREFIX = "base_model.model."


class Net(nn.Module):
    """A text classifier in miniature: an embedding, a linear layer, BatchNorm's buffers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(24, 18)
        self.query = nn.Linear(18, 20)
        self.norm = nn.BatchNorm1d(20)
        self.head = nn.Linear(20, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.query(self.words(tokens).mean(dim=1))).relu())


def net(seed: int = 0) -> Net:
    """Return the same pretrained model every time."""
    torch.manual_seed(seed)
    return Net()


def adapted(r: int = 4, lora_alpha: float = 8, seed: int = 0, **config: Any) -> PeftModel:
    """Return the pretrained model with a fresh adapter: LoRA on `query`, norm and head trained in full."""
    config = {"target_modules": ["query"], "modules_to_save": ["norm", "head"], **config}
    base = net()
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(r=r, lora_alpha=lora_alpha, **config))


def adapter(model: PeftModel) -> ArrayRecord:
    """Return what a server app starts from."""
    return ArrayRecord(get_peft_model_state_dict(model, save_embedding_layers=False))


def train(model: nn.Module, partition: int, server_round: int, steps: int = 2, lr: float = 0.5) -> float:
    """Take a few steps of SGD on a batch that belongs to the partition and the round; return the loss."""
    generator = torch.Generator().manual_seed(1000 * server_round + partition)
    tokens = torch.randint(0, 24, (12, 5), generator=generator)
    labels = (tokens.sum(dim=1) + partition) % 3
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens), labels)
        loss.backward()
        optimizer.step()
    return loss.item()


def arrays_of(record: ArrayRecord) -> Arrays:
    """Return a record's arrays by key."""
    return {key: array.numpy() for key, array in record.items()}


def record_of(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Return arrays as a record."""
    return ArrayRecord({key: Array(np.asarray(value)) for key, value in arrays.items()})


def same_bits(one: ArrayRecord, other: ArrayRecord) -> bool:
    """Whether two records hold the same bytes under the same keys."""
    return {k: (a.dtype, a.data) for k, a in one.items()} == {k: (a.dtype, a.data) for k, a in other.items()}


# --- A client without a model: milliseconds for many rounds ----------------------------------------------------------


def mixed_state(rank: int = 4, seed: int = 0, dtype: type = np.float32) -> Arrays:
    """Return a global state with an adapter, a plain tensor, a running statistic and an integer."""
    draw = np.random.default_rng(seed)
    return {
        "base_model.model.q.lora_A.weight": draw.normal(size=(rank, 12)).astype(dtype),
        "base_model.model.q.lora_B.weight": draw.normal(size=(10, rank)).astype(dtype),
        "base_model.model.head.weight": draw.normal(size=(3, 10)).astype(dtype),
        "base_model.model.norm.running_mean": draw.normal(size=10).astype(dtype),
        "base_model.model.norm.num_batches_tracked": np.array(7),
    }


def noisy(message: Message, context: Context) -> Message:
    """Answer as a client that moves every number by noise of its partition's own, or evaluates."""
    partition = int(context.node_config["partition-id"])
    server_round = int(message.content["config"]["server-round"])
    metrics: dict[str, Any] = {"num-examples": 10 * (partition + 1), "loss": 1.0 / (partition + 3)}
    if message.metadata.message_type == "evaluate":
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
    draw = np.random.default_rng([server_round, partition])
    (sent,) = message.content.array_records.values()
    moved = {}
    for key, value in arrays_of(sent).items():
        step = 0.1 * (partition + 1) * draw.normal(size=value.shape)
        moved[key] = (value + step).astype(value.dtype) if value.dtype.kind == "f" else value + partition
    content = RecordDict({"arrays": record_of(moved), "metrics": MetricRecord(metrics)})
    return Message(content, reply_to=message)


Fault = Callable[[RecordDict], None]


def faulty(faults: Mapping[int, Fault], message_type: str = "train") -> Callable[[Message, Context], Message]:
    """Return `noisy` with the replies of some partitions altered in place."""

    def client(message: Message, context: Context) -> Message:
        reply = noisy(message, context)
        fault = faults.get(int(context.node_config["partition-id"]))
        if fault is not None and message.metadata.message_type == message_type:
            fault(reply.content)
        return reply

    return client


def crossed(grid: InProcessGrid, direction: str, message_type: str = "train") -> list[dict[int, RecordDict]]:
    """Return what a recording grid saw, a dict from partition to content for each round; errors left out."""
    rounds: dict[int, dict[int, RecordDict]] = {}
    current = 0
    for traffic in grid.traffic:
        assert traffic.message is not None, "expected a grid with record=True"
        if traffic.direction == "down":
            current = int(traffic.message.content["config"]["server-round"])
        if (traffic.direction, traffic.message_type) == (direction, message_type) and traffic.message.has_content():
            rounds.setdefault(current, {})[traffic.partition] = traffic.message.content
    return [rounds[number] for number in sorted(rounds)]


# --- The oracle: dense, float64, numpy, straight from the equations --------------------------------------------------

Scaling = Callable[[str], float]
FEDFROM: dict[str, Any] = {"k": 0.5, "p": 0.5, "clip": 1.0}
"""FedFroM's defaults, in the oracle's words."""


def modules_of(state: Arrays) -> list[str]:
    """Return the adapted modules' names."""
    return sorted({key.split(".lora_")[0] for key in state if ".lora_" in key})


def factors(state: Arrays, module: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (B, A) in float64. For an embedding these are lora_embedding_B (d, r) and lora_embedding_A (r, V)."""
    for middle in ("lora_{}.weight", "lora_embedding_{}"):
        if f"{module}.{middle.format('A')}" in state:
            B, A = (state[f"{module}.{middle.format(part)}"].astype(np.float64) for part in "BA")
            return B, A
    raise KeyError(module)


def products(state: Arrays, scaling: Scaling = lambda module: 1.0, rank: Callable[[str], int | None] | None = None):
    """Return {module: s B A} with everything else under its key, float64; `rank` cuts to the leading columns."""
    found = {}
    for module in modules_of(state):
        B, A = factors(state, module)
        r = None if rank is None else rank(module)
        found[module] = scaling(module) * B[:, :r] @ A[:r]
    rest = {key: value.astype(np.float64) for key, value in state.items() if ".lora_" not in key}
    return found | rest


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Return the closest matrix of that rank."""
    unit = float(np.abs(matrix).max(initial=0.0)) or 1.0  # near float64's largest numbers LAPACK does not converge
    U, S, Vh = np.linalg.svd(matrix / unit, full_matrices=False)
    return U[:, :rank] * (S[:rank] * unit) @ Vh[:rank]


def oracle(
    sent: Arrays,
    replies: Sequence[Arrays],
    examples: Sequence[float],
    *,
    k: float,
    p: float,
    server_lr: float = 1.0,
    rank: int | None = None,
    scope: str = "layer",
    scaling: Scaling = lambda module: 1.0,
    scalings: Sequence[Scaling] | None = None,
    clip: float | None = None,
) -> dict[str, np.ndarray]:
    """Return the new global products and tensors: W + alpha sum_i w_i (W_i - ref_i), truncated to the sent rank."""
    scalings = [scaling] * len(replies) if scalings is None else scalings
    W = products(sent, scaling)
    deltas = []
    for state, own in zip(replies, scalings, strict=True):
        # a client of smaller rank was sent the leading columns; one of a larger rank all there is
        received = products(sent, scaling, lambda module, state=state: factors(state, module)[1].shape[0])
        mine = products(state, own)
        deltas.append({name: mine[name] - received[name] for name in W})

    def is_buffer(name: str) -> bool:
        return name.endswith(("running_mean", "running_var"))

    def is_integer(name: str) -> bool:
        return name in sent and sent[name].dtype.kind in "iu"

    counted = [name for name in W if not is_buffer(name) and not is_integer(name)]
    norms = {name: np.array([np.linalg.norm(d[name]) for d in deltas]) for name in W}
    if clip is not None:
        for name, found in norms.items():
            shorter = np.minimum(1.0, clip * np.median(found[found > 0]) / np.maximum(found, 1e-300))
            deltas = [{**d, name: factor * d[name]} for d, factor in zip(deltas, shorter, strict=True)]
            norms[name] = found * shorter
    whole = np.sqrt(sum(norms[name] ** 2 for name in counted))
    merged = {}
    for name, value in W.items():
        if is_integer(name):
            merged[name] = value
            continue
        size = whole if scope == "model" else norms[name]
        weights = np.asarray(examples, dtype=float) ** p * (1.0 if is_buffer(name) else size**k)
        weights = weights / weights.sum()
        change = sum(w * d[name] for w, d in zip(weights, deltas, strict=True))
        merged[name] = value + (1.0 if is_buffer(name) else server_lr) * change
        if name not in sent:
            own = factors(sent, name)[1].shape[0]
            merged[name] = truncated(merged[name], own if rank is None else min(rank, own))
    return merged


def far_apart(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """Return the largest relative Frobenius distance over the layers."""
    assert found.keys() == expected.keys()
    return max(
        float(np.linalg.norm(found[name] - expected[name]) / max(1e-30, np.linalg.norm(expected[name])))
        for name in expected
    )
