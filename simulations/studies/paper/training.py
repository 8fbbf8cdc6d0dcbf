"""Training of the base model with its head, and of each task's adapter or weights under that head."""

from torch import Tensor

from simulations import client_statistics, training
from simulations.batches import Tokens
from simulations.studies.paper import arena, data
from simulations.studies.paper.options import BASE_TASK, CHECKPOINTS, CHECKPOINTS_OF, TASKS, PaperOptions
from simulations.studies.shelf import Shelf
from simulations.studies.study import Row

STATISTICS = ("gram", "fisher")


def train_base(options: PaperOptions, seed: int, shelf: Shelf) -> list[Row]:
    """Train encoder and head on binary MNLI, save the weights, and return the rows of its loss and its score."""
    model = arena.new_model(options, "base", seed, None)
    tokens = data.load(options)[BASE_TASK]
    simulation = options.simulation("base", seed)
    done = training.train(model, tokens.train, simulation, data.order_seed(seed, BASE_TASK))
    scores = training.evaluate(model, tokens.reported, BASE_TASK, precision=options.precision)
    shelf.put(f"base-s{seed}", arena.trained_state(model, "base"))
    trained = {"task": BASE_TASK, "split": "training", "n": done.examples, "loss": done.loss}
    reported = {"split": data.REPORTED, "n": len(tokens.reported), "score": scores["accuracy"], "loss": scores["loss"]}
    return [trained, {"task": BASE_TASK, **reported}]


def train_task(options: PaperOptions, kind: str, seed: int, task: str, shelf: Shelf) -> list[Row]:
    """Train one task, or all tasks pooled, from the base model; save the state, its checkpoints and statistics."""
    model = arena.new_model(options, kind, seed, shelf.get(f"base-s{seed}"))
    simulation = options.simulation(kind, seed, options.task_steps(task))
    tokens = data.load(options)[task].train if task in TASKS else _pooled(options, kind, seed)
    order = data.order_seed(seed, task)
    kept = {round(share * simulation.steps): number for number, share in enumerate(CHECKPOINTS)}

    def keep(name: str) -> None:
        shelf.put(name, arena.trained_state(model, kind))
        if task in TASKS:
            for what in STATISTICS:
                shelf.put(f"{name}-{what}", _statistics(what))

    def _statistics(what: str) -> dict[str, Tensor]:
        return client_statistics.compute(what, model, tokens, simulation, order)

    def after_step(number: int) -> None:
        if task == CHECKPOINTS_OF and number in kept and number < simulation.steps:
            keep(f"{kind}-s{seed}-{task}-{kept[number]}")

    done = training.train(model, tokens, simulation, order, after_step)
    keep(f"{kind}-s{seed}-{task}")
    return [{"task": task, "split": "training", "n": done.examples, "loss": done.loss}]


def _pooled(options: PaperOptions, kind: str, seed: int) -> Tokens:
    parts = []
    for task in TASKS:
        simulation = options.simulation(kind, seed, options.task_steps(task))
        parts.append((data.load(options)[task].train, simulation, data.order_seed(seed, task)))
    return data.pooled(parts)


def names(kind: str, seed: int, tasks: tuple[str, ...]) -> list[str]:
    """Return the names of the tasks' states on the shelf."""
    return [f"{kind}-s{seed}-{task}" for task in tasks]


def checkpoint_names(kind: str, seed: int) -> list[str]:
    """Return the names of the three checkpoints of one task."""
    last = f"{kind}-s{seed}-{CHECKPOINTS_OF}"
    return [*(f"{last}-{number}" for number in range(len(CHECKPOINTS) - 1)), last]
