"""The text that a run prints: settings, progress, and the tables before and after."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fedfrom.pages.look import size

if TYPE_CHECKING:  # they import torch, which a run needs only after its folder was checked
    from simulations.experiment import Experiment
    from simulations.history import History, Round


class Narrator:
    """Prints lines to a console; no live display, so that a log reads like a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        # Without a terminal rich's default is 80 columns, too few for the tables.
        self.console = console or Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 110)

    def settings(self, experiment: "Experiment") -> None:
        """Print the tasks, the model, the trained parameters and the work of a round."""
        options = experiment.options
        total = sum(parameter.numel() for parameter in experiment.model.parameters())
        trained = sum(tensor.numel() for tensor in experiment.initial.values())
        layers = f"first {options.kept_layers} layers" if options.kept_layers else "all layers"
        what = "full fine-tuning" if options.full else self._lora(experiment)
        for task in experiment.tasks:
            kind = "scores" if task.regression else "/".join(task.label_names)
            train = f"{len(task.train):,} training" if experiment.shares else "training examples at the sites"
            self.console.print(
                f"[bold]Task[/]   {task.name} ({kind}): {train} and {len(task.held_out):,} "
                f"held-out examples; {task.metric} of a constant answer {task.baseline:.3f}"
            )
            self.console.print(f"       from {task.source}")
        pooling = "mean pooling" if options.pooling == "mean" else "the model's own head"
        self.console.print(
            f"[bold]Model[/]  {options.model}, {layers}, {pooling}; {total / 1e6:.1f} M parameters, "
            f"{trained:,} of them travel ({what})"
        )
        work = f"{options.steps} steps" if options.steps else f"{options.epochs} epochs"
        self.console.print(
            f"[bold]Rounds[/] {options.rounds} of {work} of {options.batch_size} examples on each of "
            f"{options.clients} clients, AdamW at {options.learning_rate:g}, seed {options.seed}"
        )

    @staticmethod
    def _lora(experiment: "Experiment") -> str:
        options = experiment.options
        kind = "DoRA" if options.dora else "rsLoRA" if options.rslora else "LoRA"
        ranks = ", ".join(map(str, options.ranks)) if options.ranks else str(options.lora_r)
        return f"{kind}, rank {ranks}, and the head"

    def partition(self, experiment: "Experiment") -> None:
        """Print each client's examples by label. In a deployment only the sites know them, and nothing is printed."""
        if not experiment.shares:
            return
        options = experiment.options
        name = f"{options.partition}({options.alpha:g})" if options.partition == "dirichlet" else options.partition
        table = Table(title=f"Partition: {name}", title_justify="left")
        several = len(experiment.tasks) > 1
        names = sorted({label for share in experiment.shares for label in share.label_counts})
        columns = ["client", *(["task"] if several else []), "examples", *names, *(["rank"] if options.ranks else [])]
        for column in columns:
            table.add_column(column, justify="left" if column == "task" else "right")
        for client, share in enumerate(experiment.shares):
            total = len(share.examples)
            shares = [f"{share.label_counts.get(label, 0) / total:.0%}" for label in names]
            rank = [str(options.client_rank(client))] if options.ranks else []
            table.add_row(str(client), *([share.task.name] if several else []), f"{total:,}", *shares, *rank)
        self.console.print(table)

    def results(self, experiment: "Experiment", folder: Path, page: str) -> None:
        """Print the folder of the results, and the line on the report page."""
        options = experiment.options
        pictures = "comparison.png, updates.png, partition.png" if experiment.shares else "comparison.png, updates.png"
        clients = ", and each client's" if options.save_clients else ""
        self.say(
            f"Results in {folder}: results.json, {pictures} and the final {'models' if options.full else 'adapters'}"
            f"{clients}"
        )
        self.say(page)

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text)

    def strategy(self, label: str) -> None:
        """Print the strategy that starts."""
        self.console.print(f"\n[bold]{label}[/]")

    def client(self, number: int, rounds: int, client: int, loss: float, speed: float) -> None:
        """Print the loss and the speed of a client that replied."""
        self.console.print(f"  round {number}/{rounds}  client {client}  loss {loss:.3f}  {speed:5.1f} examples/s")

    def failure(self, number: int, reason: str) -> None:
        """Print the reason of a client's failure."""
        self.console.print(f"  round {number}  [red]a client failed:[/] {reason.strip().splitlines()[-1]}", markup=True)

    def round(self, entry: "Round", rounds: int, metric: str, left: float = 0.0) -> None:
        """Print the global model's scores after a round, the clients' weights, and the time left."""
        metric = metric if " of " not in metric else "mean score"
        remaining = f"  about {left / 60:.0f} min left" if left > 90 else f"  about {left:.0f} s left" if left else ""
        weights = "  ".join(f"{client}: {weight:.2f}" for client, weight in entry.weights.items())
        weighed = f"  weights {weights}" if weights else ""
        scores = "not scored"
        if entry.scores:
            scores = f"[bold]{metric} {entry.scores['score']:.3f}[/]  loss {entry.scores['loss']:.3f}"
        self.console.print(f"  round {entry.number}/{rounds}  {scores}  {entry.seconds:.1f} s{weighed}{remaining}")

    def table(self, experiment: "Experiment", histories: Sequence["History"]) -> None:
        """Print the table that compares the strategies."""
        title = f"{experiment.metric} on held-out examples; a constant answer scores {experiment.baseline:.3f}"
        table = Table(title=title, title_justify="left")
        table.add_column("strategy")
        reaching = f"rounds to {experiment.target:.3f}"
        for column in ("final", "best", reaching, "bytes up", "bytes down", "server s", "s", "overhead"):
            table.add_column(column, justify="right")
        for history in histories:
            reached = history.rounds_to(experiment.target)
            table.add_row(
                history.label,
                f"{history.final:.3f}",
                f"{history.best:.3f}",
                "never" if reached is None else str(reached),
                size(history.total("bytes_up")),
                size(history.total("bytes_down")),
                f"{history.total('server_seconds'):.2f}",
                f"{history.wall_seconds:.0f}",
                f"{history.overhead:.0%}",
            )
        self.console.print(table)

    def seconds(self, histories: Sequence["History"], before: Mapping[str, float], total: float) -> None:
        """Print the parts of the wall time.

        Parameters
        ----------
        before : Mapping[str, float]
            Seconds of "preparing" and "starting-clients", before the first strategy.
        total : float
            Seconds of the whole run. The rest beside the parts is writing results and stopping the clients.
        """
        rest = total - sum(before.values()) - sum(history.wall_seconds for history in histories)
        title = (
            f"Seconds: {total:.0f} in all; {before['preparing']:.0f} to prepare, "
            f"{before['starting-clients']:.0f} until the clients were ready, {rest:.0f} to stop them and write results"
        )
        table = Table(title=title, title_justify="left")
        table.add_column("strategy")
        parts = ("training", "idle", "transport", "merging", "evaluation")
        for column in (*parts, "in all", "beyond training"):
            table.add_column(column, justify="right")
        for history in histories:
            split = history.split
            seconds = [f"{split[part]:.1f}" for part in parts]
            table.add_row(history.label, *seconds, f"{history.wall_seconds:.1f}", f"{split['beyond-training']:.0%}")
        self.console.print(table)
        self.console.print(
            "Training is the mean over the client processes; idle is their mean wait for the busiest process. Beyond "
            "training: the wall time relative to training, less 1."
        )
