"""One client's training in one round, and the evaluation of a model."""

import contextlib
import hashlib
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from simulations import environment, metrics, models
from simulations.batches import Tokens, training_batches
from simulations.options import Options


@dataclass(frozen=True)
class Trained:
    """A finished training: mean loss over its steps, number of steps, examples seen, and seconds."""

    loss: float
    steps: int
    examples: int
    seconds: float


def round_seed(*parts: int) -> int:
    """Return a seed from several numbers (seed, round, client), by SHA-256: other numbers give another seed."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def device() -> torch.device:
    """Return the GPU that this process may use, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _autocast(where: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Return the context of a model's arithmetic in a precision, one of `Options.precision`."""
    if precision == "float32" or (precision == "auto" and where.type != "cuda"):
        return contextlib.nullcontext()
    half = where.type == "cuda" and not torch.cuda.is_bf16_supported()
    return torch.autocast(where.type, torch.float16 if half else torch.bfloat16)


def loss_of(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of logits, or the mean squared error where the labels are real numbers."""
    if labels.is_floating_point():
        return nn.functional.mse_loss(output.squeeze(-1).float(), labels)
    return nn.functional.cross_entropy(output.float(), labels)


def train(
    model: nn.Module,
    tokens: Tokens,
    options: Options,
    seed: int,
    after_step: Callable[[int], None] | None = None,
    rate: Callable[[float], float] | None = None,
) -> Trained:
    """Train the model in place on a client's examples, with fresh moments of AdamW.

    Parameters
    ----------
    model : nn.Module
        The client's model with the global weights. Only parameters that require a gradient change.
    tokens : Tokens
        The client's training examples.
    options : Options
        Learning rate, batch size, steps or epochs.
    seed : int
        Fixes the order of the examples and the dropout. On one device the same seed gives the same weights.
    after_step : Callable[[int], None] | None (default: None)
        Called with the number of steps done after each, to keep checkpoints.
    rate : Callable[[float], float] | None (default: None)
        What the learning rate is multiplied by, given the share of the steps that is done; None is 1 throughout.

    Raises
    ------
    ArithmeticError
        The loss is no longer finite.
    """
    where = device()
    model.to(where).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)
    half = where.type == "cuda" and options.precision != "float32" and not torch.cuda.is_bf16_supported()
    scaler = torch.amp.GradScaler(enabled=half)
    start, losses, seen = time.perf_counter(), [], 0
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        torch.manual_seed(seed)
        batches = list(training_batches(tokens, options, seed))
        for step, chosen in enumerate(batches):
            if rate is not None:
                optimizer.param_groups[0]["lr"] = options.learning_rate * rate((step + 0.5) / len(batches))
            inputs, labels = tokens.batch(chosen)
            with _autocast(where, options.precision):
                output = models.logits(model, {name: value.to(where) for name, value in inputs.items()})
            loss = loss_of(output, labels.to(where))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            seen += len(chosen)
            if after_step is not None:
                after_step(len(losses))
    mean = float(torch.stack(losses).mean())
    if not math.isfinite(mean):
        raise ArithmeticError(f"the training loss is {mean} after {len(losses)} steps; lower --lr")
    return Trained(mean, len(losses), seen, time.perf_counter() - start)


def warmed_up(done: float, share: float = 0.06) -> float:
    """Return a learning rate's factor that rises to 1 over the first share of the steps, and falls to 0 from there."""
    return min(done / share, (1 - done) / (1 - share))


def free_workers() -> int:
    """Return the threads of an evaluation while no client trains: one a core; a GPU needs one."""
    return environment.cores() if device().type == "cpu" else 1


def outputs(
    model: nn.Module, tokens: Tokens, workers: int = 1, precision: str = "auto"
) -> list[tuple[list[int], torch.Tensor]]:
    """Return the rows of each batch of the examples, by length, and the model's float32 outputs for them.

    Parameters
    ----------
    model : nn.Module
        It is moved to the GPU where there is one, and put into evaluation mode.
    tokens : Tokens
        The examples.
    workers : int
        Threads, each of which evaluates whole batches. Torch's own threads wait for each other within each product,
        which on a busy machine takes more time than they save. The result does not depend on the number of threads.
    precision : str (default: "auto")
        As `Options.precision` has it.

    Returns
    -------
    list[tuple[list[int], Tensor]]
        The rows, and their (rows, outputs of the head) logits or scores, on the model's device.
    """
    where = device()
    model.to(where).eval()

    @torch.inference_mode()
    def output(chosen: list[int]) -> torch.Tensor:
        inputs, _ = tokens.batch(chosen)
        with _autocast(where, precision):
            return models.logits(model, {name: value.to(where) for name, value in inputs.items()}).float()

    batches = tokens.by_length()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(zip(batches, pool.map(output, batches), strict=True))


def evaluate(model: nn.Module, tokens: Tokens, task: str, workers: int = 1, precision: str = "auto") -> metrics.Scores:
    """Return the task's metrics, its "score" and the mean loss over the examples; see `outputs`.

    Parameters
    ----------
    task : str
        Names the metrics.
    """
    labels = tokens.labels.numpy()
    predictions, loss = np.empty_like(labels), 0.0
    for chosen, output in outputs(model, tokens, workers, precision):
        own = tokens.labels[chosen]
        answer = output.squeeze(-1) if own.is_floating_point() else output.argmax(-1)
        predictions[chosen] = answer.cpu().numpy()
        loss += float(loss_of(output, own.to(output.device))) * len(chosen)
    return {**metrics.scores(task, predictions, labels), "loss": loss / len(tokens)}
