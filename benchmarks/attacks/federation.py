"""Training: one round of clients that fine-tune an encoder, and whole federations on the encoder's frozen features.

A round of the encoder (LoRA on the first layers of MiniLM, SST-2) gives real deltas. Accuracy under attack needs many
rounds of many strategies: there the encoder is frozen, and clients train a LoRA module and a head on its sentence
vectors, which takes milliseconds.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from fedfrom.atomic import whole_file
from simulations import environment, models, training
from simulations.batches import Tokens, tokenise
from simulations.experiment import Experiment
from simulations.options import Options

environment.prepare(online=False)

CLIENTS = 10
ROUND = Options(
    task=("sst2",), clients=CLIENTS, alpha=1.0, train_examples=1500, eval_examples=8, steps=12, batch_size=8,
    max_length=48,
)  # fmt: skip
FEATURES = replace(ROUND, train_examples=2500, eval_examples=872)
A, B = "hidden.lora_A.weight", "hidden.lora_B.weight"
HEAD, BIAS = "head.weight", "head.bias"
RANK, WIDTH = 8, 384

Arrays = dict[str, np.ndarray]


def encoder_round(folder: Path, attackers: int = 3, options: Options = ROUND) -> dict[str, Arrays]:
    """Return the states of one round by name: "sent", "0", "1", ... and "flipped-0", ...; "sizes" has the examples.

    "0" is the reply of client 0. "flipped-0" is its reply after training on wrong labels, where it may be an attacker.
    The states are trained once and kept in the folder.
    """
    names = ["sent", *map(str, range(options.clients)), *(f"flipped-{i}" for i in range(attackers)), "sizes"]
    paths = {name: folder / f"round-{name}.safetensors" for name in names}
    if all(path.is_file() for path in paths.values()):
        return {name: load_file(path) for name, path in paths.items()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    experiment = Experiment.prepare(options)
    tokenizer = models.tokenizer(experiment.options)
    found: dict[str, Arrays] = {"sent": {key: value.numpy() for key, value in experiment.initial.items()}}
    for name in names[1:-1]:
        client = int(name.removeprefix("flipped-"))
        tokens = tokenise(experiment.shares[client].examples, tokenizer, experiment.options, False)
        if name != str(client):
            tokens = replace(tokens, labels=1 - tokens.labels)
        models.load_trained_state(experiment.model, experiment.initial)
        training.train(experiment.model, tokens, experiment.options, training.round_seed(options.seed, 1, client))
        state = models.trained_state(experiment.model)
        found[name] = {key: value.detach().clone().numpy() for key, value in state.items()}
    found["sizes"] = {"examples": np.array([len(share.examples) for share in experiment.shares])}
    for name, path in paths.items():
        with whole_file(path) as hidden:
            save_file(found[name], hidden)
    return found


def features(folder: Path, options: Options = FEATURES) -> Arrays:
    """Return "train" and "test" sentence vectors of SST-2 from the frozen encoder, and labels; kept in the folder."""
    path = folder / "features.safetensors"
    if path.is_file():
        return load_file(path)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    experiment = Experiment.prepare(replace(options, full=True))
    tokenizer = models.tokenizer(experiment.options)
    task = experiment.tasks[0]
    found: Arrays = {}
    for name, examples in {"train": task.train, "test": task.held_out}.items():
        tokens = tokenise(examples, tokenizer, experiment.options, False)
        found[name] = _vectors(experiment.model, tokens)
        found[f"{name}-labels"] = tokens.labels.numpy()
    with whole_file(path) as hidden:
        save_file(found, hidden)
    return found


@torch.inference_mode()
def _vectors(model: nn.Module, tokens: Tokens) -> np.ndarray:
    kept: list[Tensor] = []
    hook = model.classifier.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))  # type: ignore[operator, union-attr]
    result = np.empty((len(tokens), WIDTH), np.float32)
    for chosen in tokens.by_length():
        kept.clear()
        models.logits(model.eval(), tokens.batch(chosen)[0])
        result[chosen] = kept[0].numpy()
    hook.remove()
    return result


class Federation:
    """Clients with Dirichlet shares of labelled vectors, which train a LoRA module and a head on them.

    Parameters
    ----------
    data : Mapping[str, ndarray]
        From `features`.
    clients : int
        Number of clients.
    alpha : float
        Concentration of the Dirichlet distribution over each label's examples: shares and sizes are unequal.
    seed : int
        Seed of the shares, the initial adapter and the batches.
    epochs : int
        Passes of a client over its share in a round. Larger shares take more steps, and give larger updates.
    examples : int
        Training examples of all clients together.
    batch : int
        Examples in a step.
    """

    def __init__(
        self,
        data: Mapping[str, np.ndarray],
        clients: int,
        alpha: float,
        seed: int,
        epochs: int = 1,
        examples: int = 600,
        batch: int = 8,
    ) -> None:
        draw = np.random.default_rng([seed, 1])
        chosen = draw.permutation(len(data["train"]))[:examples]
        shares: list[list[int]] = [[] for _ in range(clients)]
        while min(map(len, shares)) < 8:
            shares = [[] for _ in range(clients)]
            for label in (0, 1):
                of_label = chosen[data["train-labels"][chosen] == label]
                cuts = (np.cumsum(draw.dirichlet([alpha] * clients)) * len(of_label)).astype(int)[:-1]
                for share, part in zip(shares, np.split(of_label, cuts), strict=True):
                    share += part.tolist()
        scale = float(np.abs(data["train"]).mean()) * 4
        self.inputs = [torch.from_numpy(data["train"][share] / scale) for share in shares]
        self.labels = [torch.from_numpy(data["train-labels"][share]) for share in shares]
        self.test = torch.from_numpy(data["test"] / scale), torch.from_numpy(data["test-labels"])
        self.sizes = [len(share) for share in shares]
        self.seed, self.epochs, self.batch = seed, epochs, batch
        generator = torch.Generator().manual_seed(seed)
        self.initial: Arrays = {
            A: (torch.randn(RANK, WIDTH, generator=generator) / WIDTH**0.5).numpy(),
            B: np.zeros((WIDTH, RANK), np.float32),
            HEAD: np.zeros((2, WIDTH), np.float32),
            BIAS: np.zeros(2, np.float32),
        }

    def trained(self, client: int, state: Arrays, server_round: int, flipped: bool = False) -> Arrays:
        """Return a client's state after training from `state` with Adam."""
        parameters = {key: torch.from_numpy(np.array(value)).requires_grad_() for key, value in state.items()}
        optimizer = torch.optim.Adam(parameters.values(), lr=5e-3)
        inputs, labels = self.inputs[client], self.labels[client]
        labels = 1 - labels if flipped else labels
        generator = torch.Generator().manual_seed(training.round_seed(self.seed, server_round, client))
        for _ in range(self.epochs):
            for chosen in torch.randperm(len(labels), generator=generator).split(self.batch):
                loss = nn.functional.cross_entropy(_logits(parameters, inputs[chosen]), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return {key: value.detach().numpy() for key, value in parameters.items()}

    def accuracy(self, state: Arrays) -> float:
        """Return the global model's accuracy on the held-out vectors; a model with NaN always answers one class."""
        with torch.inference_mode():
            answers = _logits({key: torch.from_numpy(value) for key, value in state.items()}, self.test[0]).argmax(1)
        return float((answers == self.test[1]).double().mean())


def _logits(state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    hidden = x + (x @ state[A].T) @ state[B].T  # the adapted module is the identity, its scaling 1
    return torch.relu(hidden) @ state[HEAD].T + state[BIAS]
