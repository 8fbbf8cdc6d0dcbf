"""The settings of a strategy: their names, their ranges, and which options are the method's.

Flower does not check FedAvg's arguments. A wrong one would show up in the middle of a run, or never.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

from flwr.serverapp.strategy import FedAvg

from fedfrom.merging import methods
from fedfrom.merging.inputs import check_clip, check_safe, check_server_lr
from fedfrom.merging.methods.base import Method
from fedfrom.merging.methods.registry import make_method, meant_by, method_options
from fedfrom.numeric import is_number, is_whole, plain

log = logging.getLogger("flwr")  # where Flower's own strategies log

FEDAVG = set(inspect.signature(FedAvg.__init__).parameters) - {"self"}
"""FedAvg's arguments."""

RUN = {"checkpoint", "checkpoints_kept", "node_timeout", "memory_budget", "spool", "on_round", "max_skipped"}
"""Settings that change no number that a run computes: a resumed run may have others than the run before."""

_START = set(inspect.signature(FedAvg.start).parameters) - {"self"}

_FRACTIONS = ("fraction_train", "fraction_evaluate")
_COUNTS = ("min_train_nodes", "min_evaluate_nodes", "min_available_nodes")
_KEYS = ("weighted_by_key", "arrayrecord_key", "configrecord_key")
_FUNCTIONS = ("train_metrics_aggr_fn", "evaluate_metrics_aggr_fn")


def method_from(method: str | Method, options: Mapping[str, Any], seed: int, strategy: type, base: type) -> Method:
    """Return a strategy's merging method.

    Parameters
    ----------
    method : str | Method
        A method, or the name of one.
    options : Mapping[str, Any]
        The options that are left for a method given by name.
    seed : int
        The strategy's seed, for methods that have a seed and were given none.
    strategy : type
        The class whose constructor was called, for the error.
    base : type
        `FedMerge`, for the error: its keyword-only arguments are the settings beside the method's and FedAvg's.

    Raises
    ------
    ValueError
        An option is unknown, or out of its range.
    """
    if not isinstance(method, str) or method not in methods():
        return make_method(method, **options)
    known = method_options(method)
    if unknown := sorted(options.keys() - known):
        own = {name for name, each in inspect.signature(base).parameters.items() if each.kind is each.KEYWORD_ONLY}
        expected = sorted(known | own | FEDAVG)
        names = [*expected, *inspect.signature(strategy).parameters]
        # where the method searches for k, `grid` is taken for a wrong name of `search`, not for start's argument
        searches = {"k", "search"} <= known
        started = [name for name in unknown if name in _START and not (name == "grid" and searches)]
        meant = meant_by([name for name in unknown if name not in started], names, {"lora": "lora_config"})
        if started:
            meant = f"; {', '.join(started)} belong{'' if len(started) > 1 else 's'} to start(...){meant}"
        raise ValueError(f"{strategy.__name__}: expected {', '.join(expected)}, found {', '.join(unknown)}{meant}")
    return make_method(method, **{"seed": seed, **options} if "seed" in known else options)


def check_fedavg(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError where an argument of FedAvg is out of its range.

    Parameters
    ----------
    arguments : Mapping[str, Any]
        The given arguments, by name: fractions in [0, 1] (0 leaves training or evaluation out), whole numbers of nodes
        >= 0, non-empty keys, functions or None. Other arguments are not checked.
    """
    for name, value in arguments.items():
        is_real = isinstance(value, Real) and not isinstance(value, bool)  # numpy's numbers and Fraction are accepted
        if name in _FRACTIONS and not (is_real and 0 <= value <= 1):
            raise ValueError(f"{name}: expected a share of the nodes, a number from 0 to 1, found {value!r}")
        if name in _COUNTS and not (is_real and value >= 0 and isinstance(value, Integral)):
            raise ValueError(f"{name}: expected a whole number of nodes >= 0, found {value!r}")
        if name in _KEYS and not (isinstance(value, str) and value):
            raise ValueError(f"{name}: expected a key, text of at least one character, found {value!r}")
        if name in _FUNCTIONS and value is not None and not callable(value):
            signature = "(list[RecordDict], str) -> MetricRecord"
            raise ValueError(f"{name}: expected a function {signature} or None, found {value!r}")


def check_merge(method: Method, server_lr: Any, clip: Any) -> tuple[float | str, float | None]:
    """Return server_lr and clip as Python's own numbers.

    Raises
    ------
    ValueError
        One is out of its range, or not one for the method.
    """
    server_lr, clip = plain(server_lr), plain(clip)
    check_server_lr(server_lr)
    check_safe(server_lr, method.candidates())
    check_clip(clip)
    return server_lr, clip


def check_screening(examples_cap: float | None, min_valid_replies: int, select: str | None, attackers: int) -> None:
    """Raise ValueError where a setting of the screening is out of its range."""
    if examples_cap is not None and (not is_number(examples_cap) or not 1 <= examples_cap < math.inf):
        raise ValueError(f"examples_cap: expected a finite number >= 1 or None, found {examples_cap!r}")
    if not is_whole(min_valid_replies) or min_valid_replies < 1:
        raise ValueError(f"min_valid_replies: expected a whole number >= 1, found {min_valid_replies!r}")
    if select not in (None, "multikrum"):
        raise ValueError(f"select: expected 'multikrum' or None, found {select!r}")
    if not is_whole(attackers) or attackers < 0 or (attackers > 0 and select is None):
        raise ValueError(
            f"attackers: expected a whole number >= 0, above 0 only together with select=, found {attackers!r}"
        )


def check_run(
    node_timeout: float,
    memory_budget: float | None,
    on_round: Any,
    max_skipped: int | None,
    checkpoints_kept: int,
    **folders: Any,
) -> None:
    """Raise ValueError where a setting of the run, one of `RUN`, is out of its range."""
    if not is_number(node_timeout) or not node_timeout >= 0:
        raise ValueError(f"node_timeout: expected seconds >= 0, found {node_timeout!r}")
    if memory_budget is not None and (not is_number(memory_budget) or not memory_budget >= 0):
        raise ValueError(f"memory_budget: expected bytes >= 0 or None, found {memory_budget!r}")
    if on_round is not None and not (callable(on_round) and _takes_one(on_round)):
        raise ValueError(f"on_round: expected a function that takes a round's report, or None, found {on_round!r}")
    if max_skipped is not None and not (is_whole(max_skipped) and max_skipped >= 1):
        raise ValueError(f"max_skipped: expected a whole number of rounds >= 1 or None, found {max_skipped!r}")
    if not is_whole(checkpoints_kept) or checkpoints_kept < 1:
        raise ValueError(f"checkpoints_kept: expected a whole number >= 1, found {checkpoints_kept!r}")
    for name, folder in folders.items():
        if folder is not None and not isinstance(folder, str | os.PathLike):
            raise ValueError(f"{name}: expected the path of a folder, or None, found {folder!r}")


def _takes_one(function: Callable[..., Any]) -> bool:
    """Return whether a function can be called with one argument; of a builtin without a signature, True."""
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:  # no signature is known
        return True
    return True


def log_settings(strategy: Any) -> None:
    """Log the settings of a `FedMerge` that are not FedAvg's."""
    names = ("server_lr", "clip", "examples_cap", "min_valid_replies", "max_skipped", "select", "frozen", "seed")
    settings = {name: getattr(strategy, name) for name in names}
    settings |= {"lora_config": strategy.lora_config is not None, "checkpoint": strategy.checkpoint}
    method = strategy.method
    log.info("\t├──> Merging: %s", ", ".join(f"{name}: {value}" for name, value in method.settings().items()))
    if method.k == math.inf and method.scope == "layer" and strategy.clip is not None:
        shared = "in each layer the updates that clip shortens share the weight; clip=None gives it to the largest"
        log.info("\t│\t├── k is infinite: %s", shared)
    log.info("\t│\t└── %s", ", ".join(f"{name}: {value}" for name, value in settings.items()))
