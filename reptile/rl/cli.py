"""The commands `reptile rl ...`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from reptile.errors import InputError

if TYPE_CHECKING:
    from reptile.rl.settings import RLSettings

app = typer.Typer(
    no_args_is_help=True,
    help="Meta-reinforcement-learning: policies that learn a new task from their own trajectories.",
)
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-S", metavar="KEY=VALUE", help="Change one setting; may be repeated."),
]
RUNS = Path("artifacts/rl")


def read_settings(changes: list[str] | None, **values: Any) -> "RLSettings":
    """Return the defaults with changes such as `episodes=20000`."""
    from reptile.rl.settings import RLSettings
    from reptile.settings import apply_change, describe

    for change in changes or ():
        apply_change(values, change)
    try:
        return RLSettings.model_validate(values)
    except ValidationError as error:
        raise InputError("\n".join(describe(error))) from None


@app.command()
def train(
    folder: Annotated[Path, typer.Argument(help="Folder of the checkpoint.")] = RUNS / "policy",
    changes: SetOption = None,
) -> None:
    """Train a policy's initialisation; an interrupted training resumes.

    Settings and their defaults: reptile/rl/settings.py.

    Example: reptile rl train runs/maml -S environment=navigation -S algorithm=maml
    """
    settings = read_settings(changes)
    from reptile.rl.train import train as train_policy

    with _progress() as observe:
        trained = train_policy(
            settings, folder, lambda done, total: observe(settings.algorithm, done, total)
        )
    if trained.run.curve:
        last = trained.run.curve[-1]
        typer.echo(
            f"return on validation tasks: {last.before:.2f} before, {last.after:.2f} after "
            f"{settings.updates} update{'s' * (settings.updates > 1)}"
        )
    typer.echo(f"saved {folder}")


@app.command()
def compare(
    algorithms: Annotated[
        list[str] | None, typer.Argument(help="By default all, and a random start.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Training runs, from `seed` on.")] = 1,
    output: Annotated[Path, typer.Option(help="Folder to write.")] = RUNS / "compare",
    changes: SetOption = None,
) -> None:
    """Train algorithms within the same budget of episodes; measure them on the same new tasks.

    Finished trainings are reused, and an interrupted one resumes.

    Example: reptile rl compare reptile maml random --seeds 3 -S environment=navigation
    """
    from typing import get_args

    from reptile.rl.compare import compare as compare_algorithms
    from reptile.rl.compare import markdown
    from reptile.rl.settings import AlgorithmName

    known = get_args(AlgorithmName)
    for name in algorithms or ():
        if name not in known:
            raise InputError(f"{name}: no such algorithm; there are {', '.join(known)}")
    settings = read_settings(changes)
    chosen: Any = algorithms or list(known)
    with _progress() as observe:
        rows = compare_algorithms(settings, chosen, seeds, output, observe)
    typer.echo(markdown(rows))
    typer.echo(f"written to {output / 'result.html'}, result.md and result.json")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the checkpoint.")] = RUNS / "policy",
    bundle: Annotated[Path, typer.Argument(help="Folder to write.")] = RUNS / "bundle",
) -> None:
    """Write the policy and its update as ONNX graphs, and verify them against PyTorch.

    Example: reptile rl export runs/maml runs/bundle
    """
    from reptile.rl.export import export_policy
    from reptile.rl.train import load

    for check in export_policy(load(checkpoint), bundle):
        typer.echo(f"{check.name}: {check.measured:.1e}, limit {check.limit:g}")
    typer.echo(f"wrote {bundle}")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def observe(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what)
            bar.update(tasks[what], completed=done, total=total)

        yield observe
