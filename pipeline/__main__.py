"""The command line: compile the pipeline, and run it.

It only reads options and shows results; the work is done by the modules beside it.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from reptile.cli import PARAMS, ParamsOption, SetOption
from reptile.config import Settings, load_settings
from reptile.errors import InputError
from reptile.files import atomic_file

app = typer.Typer(
    help="The Kubeflow pipeline: the same five stages as dvc.yaml, with a gate before the export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()


@app.command(name="compile")
def compile_() -> None:
    """Write pipeline/reptile.yaml from the source, params.yaml and data.dvc.

    Example: python -m pipeline compile
    """
    from pipeline.document import COMPILED, render

    with atomic_file(COMPILED) as temporary:
        temporary.write_text(render(), encoding="utf-8")
    console.print(f"wrote {COMPILED}", soft_wrap=True)


@app.command()
def run_local(
    params: ParamsOption = PARAMS,
    changes: SetOption = None,
    repository: Annotated[
        Path, typer.Option(help="Clone whose data.dvc tracks the data.", file_okay=False)
    ] = Path(),
    revision: Annotated[
        str, typer.Option(help='Where to take the data from; "" is the working tree.')
    ] = "HEAD",
    champion: Annotated[
        Path | None, typer.Option(help="manifest.json of the bundle in use, for the gate.")
    ] = None,
    points: Annotated[
        list[str] | None,
        typer.Option("--point", help="Measure here too: `3-way 1-shot frozen`; may be repeated."),
    ] = None,
    bundle_remote: Annotated[
        str, typer.Option(help="DVC remote that a verified bundle is pushed to.")
    ] = "",
    output: Annotated[Path, typer.Option(help="Folder of runs.")] = Path("artifacts/kubeflow"),
    work: Annotated[
        Path, typer.Option(help="Folder of unfinished training runs, which are gone on with.")
    ] = Path("artifacts/training"),
    docker: Annotated[bool, typer.Option(help="Run each task in a container.")] = False,
    image: Annotated[str | None, typer.Option(help="Image for --docker.")] = None,
) -> None:
    """Run the compiled pipeline here; exit code 0: delivered, 1: failed, 3: refused by the gate.

    Example: python -m pipeline run-local -S train.meta_iterations=300
    """
    settings = load_settings(params, changes or ())
    from components.image import IMAGE
    from pipeline import local
    from pipeline.graph import POINTS
    from pipeline.revisions import code_commit, pinned_data

    repository = repository.absolute()
    data = pinned_data(repository, revision)
    work.mkdir(parents=True, exist_ok=True)
    arguments = {
        "repository": str(repository),
        "data_revision": data.revision,
        "data_md5": data.md5,
        "git_commit": code_commit(Path(__file__).parent.parent),
        "champion": _text(champion) if champion else "",
        "bundle_remote": _absolute(bundle_remote),
        "work": str(work.absolute()),
        "image": (image or IMAGE) if docker else "",
        "points": points or list(POINTS),
        **settings_arguments(settings),
    }
    run = local.run_local(arguments, output, (image or IMAGE) if docker else None)
    table = Table("stage", "what it made")
    for result in run.results:
        table.add_row(result.stage, result.found)
    console.print(table)
    console.print(f"{run.outcome.name.lower()}: {run.folder}", soft_wrap=True)
    if run.message:
        typer.echo(run.message, err=True)
    raise typer.Exit(run.outcome)


def settings_arguments(settings: Settings) -> dict[str, str]:
    """Return the settings as the pipeline takes them: one JSON text a stage."""
    return {f"{name}_settings": section.model_dump_json() for name, section in settings}


def _absolute(remote: str) -> str:
    """Return a remote's address, a folder's as an absolute path."""
    return remote if not remote or "://" in remote else str(Path(remote).absolute())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def main() -> None:
    """Run the command line and turn foreseeable errors into one line and exit code 2."""
    try:
        app()
    except InputError as error:
        for line in str(error).splitlines():
            typer.echo(f"error: {line}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
