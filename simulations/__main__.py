"""`python -m simulations`: the command line, made from the options themselves."""

import dataclasses
import inspect
import types
import typing
from typing import Annotated, Any

import typer

from simulations import commands, environment
from simulations.errors import BadInput
from simulations.options import Options

# Seconds instead of minutes: shows that everything works, not how well.
QUICK = {
    "clients": 2,
    "rounds": 2,
    "steps": 3,
    "layers": 1,
    "batch_size": 8,
    "train_examples": 400,
    "eval_examples": 100,
}


def run(**given: Any) -> None:
    """Fine-tune one model with several federated strategies on the same clients, and compare them.

    With no option: FedFroM against FedAvg on film reviews that four clients hold unevenly, offline, within minutes.

    Examples: python -m simulations --quick; python -m simulations --task sst2 --glue-dir GLUE --alpha 0.5;
    python -m simulations --partition tasks --task qnli,rte,wnli --strategies from,average,fedavg;
    python -m simulations --ranks 4,8,16 --strategies from,average
    """
    quick = given.pop("quick")
    asked = {name: value for name, value in given.items() if value is not None}
    try:
        options = Options.from_mapping({**(QUICK if quick else {}), **asked})
        environment.prepare(options.validated().needs_hub)
        from simulations.running import run as run_options

        run_options(options)
    except BadInput as error:
        raise commands.ended(error, 2) from None
    except PermissionError as error:
        reason = f"{error.filename}: can't be read or written: {error.strerror}; check its rights"
        raise commands.ended(reason, 2) from None
    except RuntimeError as error:
        raise commands.ended(error, 1) from None


def _parameters() -> list[inspect.Parameter]:
    hints = typing.get_type_hints(Options)
    parameters = []
    for field in dataclasses.fields(Options):
        kind = hints[field.name]
        listed = typing.get_origin(kind) is tuple
        if isinstance(kind, types.UnionType):
            kind = typing.get_args(kind)[0]
        default: Any = field.default
        if listed:
            default = ",".join(map(str, default))
        # None stands for "not given", so that --quick changes only what was left open.
        shown = "" if default in (None, "") or kind is bool else f" [default: {default}]"
        name = "--" + field.name.replace("_", "-")
        declared = typer.Option(
            f"{name}/--no-{name[2:]}" if kind is bool else name, help=field.metadata["help"] + shown, show_default=False
        )
        parameters.append(_keyword(field.name, Annotated[(str if listed else kind) | None, declared], None))
    quick = typer.Option("--quick", help="A preset of seconds: 2 clients, 2 rounds, 3 steps, 1 layer.")
    return [*parameters, _keyword("quick", Annotated[bool, quick], False)]


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def main() -> None:
    """Run the command line."""
    parameters = _parameters()
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    commands.execute(commands.command(run), "python -m simulations")


if __name__ == "__main__":
    main()
