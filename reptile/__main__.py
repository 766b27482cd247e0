"""Entry point of the `reptile` command."""

import sys

from reptile.cpus import settle_threads


def main() -> None:
    """Run the command line; a foreseeable error is one line on stderr and its exit code."""
    settle_threads()  # before any command loads torch
    try:
        from reptile.cli import run

        run()
    except ModuleNotFoundError as error:
        message = (
            f"error: the package {error.name} is missing; `reptile classify` needs "
            "pip install 'reptile-fewshot[cli,cpu]', `reptile serve` 'reptile-fewshot[serve,cpu]', "
            "the stages 'reptile-fewshot[train,cpu]' "
            "(gpu instead of cpu on a CUDA machine)"
        )
        print(message, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
