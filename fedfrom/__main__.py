"""`fedfrom …` and `python -m fedfrom …`."""

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        from fedfrom import cli
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "click", "rich"):
            raise
        print("error: the command line is not installed: pip install 'fedfrom[cli]'", file=sys.stderr)
        sys.exit(2)
    cli.main()


if __name__ == "__main__":
    main()
