"""`python -m simulations`: the command line of a simulation."""

from simulations import commands, environment
from simulations.options import Options

# Seconds instead of minutes: the scores mean nothing.
QUICK = {
    "clients": 2,
    "rounds": 2,
    "steps": 3,
    "layers": 1,
    "batch_size": 8,
    "train_examples": 400,
    "eval_examples": 100,
}


@commands.takes(Options, QUICK, quick="A preset of seconds: 2 clients, 2 rounds, 3 steps, 1 layer.")
def run(options: Options) -> None:
    """Fine-tune one model with several federated strategies on the same clients, and compare them.

    With no option: FedFroM against FedAvg on film reviews that four clients hold unevenly, offline, within minutes.

    Examples: python -m simulations --quick; python -m simulations --task sst2 --glue-dir GLUE --alpha 0.5;
    python -m simulations --partition tasks --task qnli,rte,wnli --strategies from,average,fedavg;
    python -m simulations --ranks 4,8,16 --strategies from,average
    """
    environment.prepare(options.validated().needs_hub)
    from simulations.running import run as run_options

    run_options(options)


def main() -> None:
    """Run the command line."""
    commands.execute(commands.command(run), "python -m simulations")


if __name__ == "__main__":
    main()
