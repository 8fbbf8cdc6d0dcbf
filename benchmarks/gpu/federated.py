"""Federated LoRA on GLUE, in this process: clients take turns on the device, as the local engine runs them on a GPU."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from benchmarks.gpu.tables import Table, number
from benchmarks.gpu.timing import MIB, Device, Limits
from fedfrom import FedFroM
from simulations import client_app, glue, models, training
from simulations.batches import Tokens, tokenise
from simulations.engines.local import serve
from simulations.engines.workers import InTurn
from simulations.options import ABOUT, Options
from simulations.worker import Data, Worker

TASKS = ("sst2", "qnli")
COLUMNS = ["task", "rounds", "rounds a minute", "training share", "examples a second", "peak MiB", "accuracy before"]
COLUMNS += ["accuracy after", "majority"]


@dataclass(frozen=True)
class Federation:
    """A run of one task.

    Attributes
    ----------
    rounds, steps, batch_size, max_length : int
        Of the training: rounds, a client's steps in a round, examples in a step, tokens of the longest input.
    layers : int | None
        Transformer layers that are kept, 0 for all; None is the simulation's default.
    examples, held_out : int
        Training examples of all clients together, and held-out ones that are scored before and after.
    clients, rank : int
        Number of clients; r.
    """

    rounds: int
    steps: int
    batch_size: int
    max_length: int
    layers: int | None
    examples: int
    held_out: int
    clients: int = 4
    rank: int = 8

    def options(self, task: str, model: str) -> Options:
        """Return the simulation's options."""
        return Options(
            strategies=("from",),
            task=(task,),
            model=model,
            partition="iid",
            clients=self.clients,
            lora_r=self.rank,
            rounds=self.rounds,
            steps=self.steps,
            batch_size=self.batch_size,
            max_length=self.max_length,
            layers=self.layers,
            train_examples=self.examples,
            eval_examples=self.held_out,
        ).validated()


FEDERATION = Federation(10, 32, 32, 128, 0, 40_000, 872)
QUICK = Federation(2, 4, 8, 32, 2, 400, 64)


class Columns:
    """Examples by column, as `tokenise` takes them."""

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self._columns = columns

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        return list(self._columns)

    def __getitem__(self, column: str, /) -> Sequence[Any]:
        return self._columns[column]

    def __len__(self) -> int:
        return len(self._columns["label"])


def shares(columns: glue.Columns, parts: int, most: int) -> list[Columns]:
    """Return at most so many of the examples, in an order drawn from a seed, dealt out evenly."""
    rows = list(range(len(columns["label"])))
    random.Random("benchmarks.gpu").shuffle(rows)
    rows = rows[:most]
    used = [name for name in ("text", "pair") if name in columns]
    return [
        Columns(
            {name: [columns[name][row] for row in rows[part::parts]] for name in used}
            | {"label": [int(columns["label"][row]) for row in rows[part::parts]]}
        )
        for part in range(parts)
    ]


@dataclass(frozen=True)
class Prepared:
    """What a run needs: its options, the server's model, the clients' worker, and held-out examples."""

    options: Options
    model: Any
    worker: Worker
    held_out: Tokens

    @classmethod
    def of(cls, options: Options, folder: Path) -> Prepared:
        """Read GLUE's files and the model.

        Raises
        ------
        BadInput
            A file or the model can't be read.
        """
        task = options.task[0]
        tokenizer, head = models.tokenizer(options), models.Head(len(glue.LAYOUTS[task].names), False)
        train, held_out = (glue.from_folder(task, folder, part)[0] for part in ("train", "held-out"))

        def tokens(columns: Columns) -> Tokens:
            return tokenise(columns, tokenizer, options, regression=False)

        dealt = [tokens(share) for share in shares(train, options.clients, options.train_examples)]
        data = [Data(task, own, own.select([])) for own in dealt]
        base = models.base_model(options, head)
        worker = Worker(options, data.__getitem__, lambda: copy.deepcopy(base))
        scored = tokens(shares(held_out, 1, options.eval_examples)[0])
        return cls(options, models.adapt(copy.deepcopy(base), options, options.server_rank), worker, scored)

    def accuracy(self, arrays: ArrayRecord) -> float:
        """Return the global adapter's accuracy on the held-out examples."""
        models.load_trained_state(self.model, arrays.to_torch_state_dict())
        return training.evaluate(self.model, self.held_out, self.options.task[0])["score"]

    def initial(self) -> ArrayRecord:
        """Return the initial adapter and head."""
        state = models.trained_state(self.model)
        return ArrayRecord({name: tensor.detach().cpu().clone() for name, tensor in state.items()})


@dataclass
class Clock:
    """The seconds of whole rounds and of training, and the examples trained on."""

    rounds: int = 0
    start: float = 0.0
    end: float = 0.0
    training: float = 0.0
    examples: float = 0.0

    def ended(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Note that a round has ended; round 0 is the start."""
        self.end = time.perf_counter()
        if server_round <= 1:  # the first round loads and warms up
            self.start, self.training, self.examples = self.end, 0.0, 0.0
        else:
            self.rounds += 1
        return None


class _Timed(FedFroM):
    """FedFroM that adds up what clients say of their training."""

    def __init__(self, clock: Clock, **options: Any) -> None:
        super().__init__(**options)
        self._clock = clock

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """Merge as FedFroM does."""
        replies = list(replies)
        for reply in replies:
            if reply.has_error():
                raise RuntimeError(f"a client failed: {reply.error.reason}")
            about = reply.content.config_records[ABOUT]
            self._clock.training += float(about["seconds"])
            self._clock.examples += float(about["seconds"]) * float(about["speed"])
        return super().aggregate_train(server_round, replies)


def run(prepared: Prepared) -> tuple[Clock, ArrayRecord]:
    """Run all rounds; return the clock, and the last global adapter."""
    clock, options = Clock(), prepared.options
    final: list[ArrayRecord] = []
    config = prepared.model.peft_config["default"].to_dict()
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        sent: ConfigRecord = options.to_record()
        sent["strategy"] = "from"
        strategy = _Timed(clock, fraction_evaluate=0.0, lora_config=config, seed=options.seed)
        result = strategy.start(
            grid=grid,
            initial_arrays=prepared.initial(),
            num_rounds=options.rounds,
            train_config=sent,
            evaluate_fn=clock.ended,
        )
        final.append(result.arrays)

    client_app.provide(prepared.worker)
    serve(app, InTurn(client_app.app), options.clients, options.seed)
    return clock, final[0]


def measure(
    what: Federation, model: str, folder: Path, device: Device, limits: Limits, out: Path | None, about: str
) -> Table:
    """Write the table of both tasks."""
    table = Table("federated", COLUMNS, f"{about}\n\n{_text(what, model, device)}", out)
    limits.begin()
    for task in TASKS:
        if limits.left < 0:
            table.left_out(task)
            continue
        prepared = Prepared.of(what.options(task, model), folder)
        before = prepared.accuracy(prepared.initial())
        (clock, arrays), peak = _with_peak(device, prepared)
        seconds = clock.end - clock.start
        labels = prepared.held_out.labels
        majority = float(torch.bincount(labels).max()) / len(labels)
        table.add(
            task,
            clock.rounds,
            number(60 * clock.rounds / seconds),
            number(clock.training / seconds),
            number(clock.examples / clock.training),
            number(peak),
            number(before),
            number(prepared.accuracy(arrays)),
            number(majority),
        )
        device.release()
    return table


def _with_peak(device: Device, prepared: Prepared) -> tuple[tuple[Clock, ArrayRecord], float | None]:
    """Run, and return the peak of all that is allocated on the device, in MiB; None on the CPU."""
    if not device.is_gpu:
        return run(prepared), None
    torch.cuda.reset_peak_memory_stats()
    found = run(prepared)
    return found, torch.cuda.max_memory_allocated() / MIB


def _text(what: Federation, model: str, device: Device) -> str:
    kept = {None: "the simulation's layers", 0: "all layers"}.get(what.layers, f"{what.layers} layers")
    lines = [
        f"FedFroM, LoRA of rank {what.rank} on {model} ({kept}), {what.clients} clients with equal shares of at most "
        f"{what.examples:,} training examples, {what.steps} steps of {what.batch_size} examples in a round, inputs of "
        f"at most {what.max_length} tokens. {device.describe()}",
        "Clients take turns in this process, by the local engine; messages are serialised as on a network, and the "
        "server merges on the CPU. The first of the rounds warms up and is not counted. `training share`: of the "
        "counted rounds' seconds. `peak MiB`: all memory that torch allocated on the device. `accuracy`: on at most "
        f"{what.held_out:,} held-out examples; `majority`: that of always answering with the more frequent label.",
    ]
    return "\n\n".join(lines)
