"""`python -m simulations`: the command line, made from the options themselves."""

from typing import Any

from fedfrom.errors import BadInput
from simulations import commands, environment
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


def main() -> None:
    """Run the command line."""
    preset = "A preset of seconds: 2 clients, 2 rounds, 3 steps, 1 layer."
    commands.execute(commands.command(commands.with_options(run, Options, quick=preset)), "python -m simulations")


if __name__ == "__main__":
    main()
