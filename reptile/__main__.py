"""Entry point of the `reptile` command."""

import sys


def main() -> None:
    """Run the command line; every foreseeable error is one line on stderr and exit code 2."""
    try:
        from reptile.cli import run
    except ModuleNotFoundError as error:
        sys.exit(
            f"error: the package {error.name} is missing; the command line needs "
            "pip install 'reptile-fewshot[train,cpu]' (or [train,gpu] on a CUDA machine)"
        )
    run()


if __name__ == "__main__":
    main()
