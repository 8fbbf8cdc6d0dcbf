"""Strategies by name: Flower's own FedAvg, and fedfrom's methods."""

from collections.abc import Callable
from typing import Any

from flwr.serverapp.strategy import FedAvg, Strategy

from fedfrom.errors import BadInput
from simulations.options import Options


def build(
    spec: str, options: Options, lora_config: dict[str, Any] | None, validate: Callable[[Any], float] | None = None
) -> Strategy:
    """Return a fresh strategy.

    Parameters
    ----------
    spec : str
        A name, and after colons the strategy's own settings: "fedavg", "from", "from:k=1:examples_power=0".
    options : Options
        The settings that all strategies share.
    lora_config : dict[str, Any] | None
        The server's PEFT configuration; None for full fine-tuning.
    validate : Callable[[Mapping[str, Tensor]], float] | None (default: None)
        Scores a global state, for k=auto, coefficient=auto and greedy-soup.

    Raises
    ------
    BadInput
        The name or a setting is unknown, or a setting is out of its bounds.
    """
    name, *pairs = spec.split(":")
    settings = dict(_setting(spec, pair) for pair in pairs)
    flower: dict[str, Any] = {
        # All connected nodes take part in a round, at least two (FedAvg's minimum). A run starts with all clients (see
        # server_app); a deployment goes on without the lost ones.
        "fraction_evaluate": 1.0 if options.federated_evaluation else 0.0,
    }
    try:
        if name == "fedavg":
            return FedAvg(**flower, **settings)
        if "auto" in settings.values() or name == "greedy-soup":
            if validate is None:
                raise BadInput(f"--strategies {spec}: it chooses by held-out examples; set --validation-examples")
            settings["validate"] = validate
        return _merging(name, options, lora_config, settings, flower)
    except BadInput:
        raise
    except (TypeError, ValueError) as error:
        raise BadInput(f"--strategies {spec}: {error}") from None


def _merging(
    name: str, options: Options, lora_config: dict[str, Any] | None, settings: dict[str, Any], flower: dict[str, Any]
) -> Strategy:
    import fedfrom

    shared: dict[str, Any] = {
        "server_lr": options.server_lr,
        "lora_config": lora_config,
        "seed": options.seed,
        "dora": options.dora,
    }
    if name == "from":
        own = {
            "k": options.k,
            "examples_power": options.examples_power,
            "rank": options.rank,
            "solver": options.solver,
            "scope": options.scope,
        }
        return fedfrom.FedFroM(**{**shared, **own, **settings}, **flower)
    names = sorted(fedfrom.methods())
    if name not in names:
        raise BadInput(f"--strategies: unknown strategy {name!r}; choose from fedavg, {', '.join(names)}")
    return fedfrom.FedMerge(**{"method": name, **shared, **settings}, **flower)


def _setting(spec: str, pair: str) -> tuple[str, Any]:
    key, equals, text = pair.partition("=")
    if not equals:
        raise BadInput(f"--strategies {spec}: expected key=value after the colon, found {pair!r}")
    for kind in (int, float):
        try:
            return key, kind(text)
        except ValueError:
            continue
    return key, {"true": True, "false": False, "none": None}.get(text.lower(), text)
