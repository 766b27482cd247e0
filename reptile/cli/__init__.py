"""The command line: a command for each stage, with settings from params.yaml or a preset, and more.

It shows progress and results; all work is done by `reptile.stages` and
`reptile.cli.classify`. Each command imports what it needs: `classify` runs without torch.
"""

import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from reptile.cli.under_dvc import check_code, check_data, check_networks
from reptile.errors import InputError, PlatformError, ReptileError, StoppedError
from reptile.experiments.presets import dvc_command, load_preset, preset_path, presets_table
from reptile.rl.cli import app as rl_app
from reptile.settings import (
    BatchNormMode,
    Settings,
    TrainSettings,
    apply_change,
    load_settings,
    second_learner,
)

if TYPE_CHECKING:
    from reptile.learn.train import Progress as TrainingProgress
    from reptile.runtime import AdaptedModel, Prediction
    from reptile.stages import Counted

log = logging.getLogger(__name__)

app = typer.Typer(
    help="Few-shot learning with Reptile: from images to an ONNX bundle, and its use.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
data_app = typer.Typer(
    help="Draw the starter dataset, or download public ones.", no_args_is_help=True
)
app.add_typer(rl_app, name="rl")
app.add_typer(data_app, name="data")
console = Console()

ParamsOption = Annotated[
    Path | None,
    typer.Option("--params", help="Settings file.", show_default="params.yaml"),
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        help="Settings of a published experiment; see `reptile presets`.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-S", metavar="KEY=VALUE", help="Change one setting; may be repeated."),
]
ArtifactsOption = Annotated[
    Path, typer.Option("--artifacts", help="Folder of the stages' inputs and outputs.")
]
PARAMS = Path("params.yaml")
ARTIFACTS = Path("artifacts")


def read_settings(params: Path | None, preset: str | None, changes: list[str] | None) -> Settings:
    """Read the file of settings or the preset, then apply the changes."""
    if params and preset:
        raise InputError(f"--params {params} --preset {preset}: name one of them")
    path = preset_path(preset) if preset else params or PARAMS
    lists = [change for change in changes or () if change.startswith("evaluate.ways=[")]
    for change in lists:
        log.warning("%s: a list was removed and has no effect; give one number", change)
    return load_settings(path, [change for change in changes or () if change not in lists])


@app.command()
def prepare(
    params: ParamsOption = None,
    preset: PresetOption = None,
    changes: SetOption = None,
    artifacts: ArtifactsOption = ARTIFACTS,
) -> None:
    """Make the prepared dataset: one array of images with its classes and splits.

    Example: reptile prepare -S prepare.source=letters.zip -S prepare.held_out=classes
    """
    settings = read_settings(params, preset, changes)
    check_data(settings.prepare)
    from reptile import stages

    folder = artifacts / "prepared"
    with _counting("preparing") as count:
        data = stages.prepare(settings.prepare, folder, count)
    sizes = {split: len(data.split(split).starts) for split in ("train", "validation", "test")}
    inputs = "images" if data.images.dtype == "uint8" else "inputs"
    what = "points" if data.values else f"{inputs} of {data.image_shape}"
    console.print(
        f"{data.name}: {len(data.images):,} {what} in {folder}; classes: "
        + ", ".join(f"{count} {split}" for split, count in sizes.items()),
        soft_wrap=True,
    )
    try:
        stages.check_later_stages(settings, folder)
    except InputError as error:  # the data may be meant for other settings
        log.warning("warning: %s", error)


@app.command()
def train(
    params: ParamsOption = None,
    preset: PresetOption = None,
    changes: SetOption = None,
    artifacts: ArtifactsOption = ARTIFACTS,
    resume: Annotated[
        bool, typer.Option(help="Resume an interrupted run from its last checkpoint.")
    ] = False,
    beside: Annotated[
        bool, typer.Option("--beside", help="Train the second learner, of the settings `beside`.")
    ] = False,
) -> None:
    """Meta-train an initialisation on the prepared data.

    The first Ctrl-C (or SIGTERM) ends it after the current meta-iteration, with a checkpoint, and
    exit code 130 (143); --resume continues. A second Ctrl-C interrupts at once.

    Example: reptile train --resume -S train.meta_iterations=5000 -S train.seed=3
    """
    settings = read_settings(params, preset, changes)
    from reptile import stages
    from reptile.learn.signals import stop_by_signal

    training = settings.beside.training if beside else settings.train
    outputs = artifacts / "beside" if beside else artifacts
    if training is None:
        shutil.rmtree(outputs, ignore_errors=True)  # of other settings
        outputs.mkdir(parents=True)  # DVC expects it
        console.print("beside.algorithm = none: no second learner to train")
        return
    check_networks(training)
    folder = outputs / "checkpoint"
    stages.check_later_stages(settings, artifacts / "prepared")
    stages.check_learner(settings, training, artifacts / "prepared")
    if not beside and (second := settings.beside.training):
        try:
            stages.check_learner(settings, second, artifacts / "prepared")
        except InputError as error:
            message = f"the second learner, of `beside`: {error}"
            if "DVC_STAGE" in os.environ:  # which trains it next
                raise InputError(message) from None
            log.warning("warning: %s", message)
    with _training(training) as observe, stop_by_signal() as stop:
        result = stages.train(
            training,
            artifacts / "prepared",
            folder,
            curves=outputs / "curves",
            work=artifacts / "training",
            resume=resume,
            on_progress=observe,
            stop=stop,
        )
    last = result.info.curve[-1]
    score = f"validation {result.info.objective.title} {last.score:#.3g}"
    console.print(f"{score}, loss {last.loss:.3f}; saved {folder}")


@app.command("check-model")
def check_model_command(
    params: ParamsOption = None,
    preset: PresetOption = None,
    changes: SetOption = None,
    artifacts: ArtifactsOption = ARTIFACTS,
) -> None:
    """Show what the network of the settings is and costs; refuse one that cannot train or export.

    Inputs are those of the prepared data, or without any of the settings of `prepare`.

    Example: reptile check-model -S train.model.name=torchvision:resnet18 -S train.adapt=head
    """
    settings = read_settings(params, preset, changes)
    from reptile.data.dataset import INDEX_FILE, load_prepared
    from reptile.export.check import check_export
    from reptile.learn.check_model import check_model

    size, values = settings.prepare.image_size, 0
    channels = 1 if settings.prepare.channels == "grey" else 3
    image_shape: tuple[int, ...] = (channels, size, size)
    if (artifacts / "prepared" / INDEX_FILE).is_file():
        data = load_prepared(artifacts / "prepared")
        image_shape, values = data.image_shape, data.values
    with console.status("checking"):
        result = check_model(settings.train, image_shape, values)
        problems = [] if settings.train.closed_form else check_export(result.model)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in result.rows():
        table.add_row(name, escape(value))
    console.print(table)
    if problems:
        raise InputError("; ".join(problems))


@app.command()
def runs(
    params: ParamsOption = None,
    preset: PresetOption = None,
    changes: SetOption = None,
    artifacts: ArtifactsOption = ARTIFACTS,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove runs that cannot be resumed.")
    ] = False,
) -> None:
    """List unfinished training runs: whether `reptile train --resume` resumes them, or why not.

    A run is resumed with the same settings, data, code and packages.

    Example: reptile runs --remove
    """
    settings = read_settings(params, preset, changes)
    from reptile.data.dataset import load_prepared
    from reptile.learn.run_folder import differences, unfinished_runs
    from reptile.learn.run_folder import remove as remove_run
    from reptile.learn.train import untrained

    work = artifacts / "training"
    if not (unfinished := unfinished_runs(work)):
        console.print(f"no unfinished runs in {work}", soft_wrap=True)
        return
    now = untrained(settings.train, load_prepared(artifacts / "prepared")).info
    for run in unfinished:
        reason = differences(run.info, now)
        removed = remove and reason != ""
        if removed:
            remove_run(run.folder)
        status = f"{'removed' if removed else 'not resumed'}: {reason}" if reason else "resumed"
        console.print(
            f"{run.folder}: meta-iteration {run.iteration}, {run.size / 1e6:.1f} MB; {status}",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )


@app.command()
def evaluate(
    params: ParamsOption = None,
    preset: PresetOption = None,
    changes: SetOption = None,
    artifacts: ArtifactsOption = ARTIFACTS,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            "--beside",
            metavar="NAME=FOLDER",
            help="Another checkpoint of the same data, measured on the same tasks; may be "
            "repeated. By default the second learner, if the settings `beside` train one.",
        ),
    ] = None,
) -> None:
    """Measure few-shot accuracy on held-out classes and other domains, with a report.

    Example: reptile evaluate -S evaluate.tasks=100 -S evaluate.queries=15
    """
    settings = read_settings(params, preset, changes)
    from reptile import stages
    from reptile.evaluate import summary_table
    from reptile.evaluate.metrics import read_metrics

    others = dict(map(_named_folder, beside or ()))
    if not beside and (second := _second_checkpoint(settings, artifacts)):
        others = {second_learner(settings.beside.algorithm): second}
    folder = artifacts / "evaluation"
    start = perf_counter()
    with _counting("evaluating") as count:
        result = stages.evaluate(
            settings.evaluate,
            artifacts / "prepared",
            artifacts / "checkpoint",
            folder,
            count,
            others,
        )
    seconds = perf_counter() - start
    metrics = read_metrics(folder)
    console.print(summary_table(metrics))
    if metrics.chosen:
        console.print(f"chosen on validation tasks: {metrics.chosen.best}")
    if result.adaptations:
        console.print(
            f"{result.adaptations} adaptations of {settings.evaluate.steps} steps in "
            f"{seconds:.0f} s, {result.adaptations / seconds:.0f} tasks/s"
        )
    console.print(f"report: {folder / 'report.html'}")


@app.command()
def export(
    params: ParamsOption = None,
    preset: PresetOption = None,
    changes: SetOption = None,
    artifacts: ArtifactsOption = ARTIFACTS,
    ignore_gate: Annotated[
        bool, typer.Option("--ignore-gate", help="Export whatever the evaluation's scores.")
    ] = False,
) -> None:
    """Write the ONNX bundle, if the evaluation passes the gate in the settings.

    Example: reptile export -S export.gate.accuracy=0.8
    """
    settings = read_settings(params, preset, changes)
    from reptile import stages

    bundle = artifacts / "bundle"
    with console.status("exporting"):
        stages.export(
            settings.export,
            artifacts / "prepared",
            artifacts / "checkpoint",
            artifacts / "evaluation",
            bundle,
            beside=_second_checkpoint(settings, artifacts),
            bundles=artifacts / "bundles",
            ignore_gate=ignore_gate,
        )
    console.print(f"bundle: {bundle}")


@app.command()
def verify(
    params: ParamsOption = None,
    preset: PresetOption = None,
    changes: SetOption = None,
    artifacts: ArtifactsOption = ARTIFACTS,
) -> None:
    """Check the bundle against eager PyTorch; exit code 5 if any check fails.

    Example: reptile verify -S verify.tasks=1000
    """
    settings = read_settings(params, preset, changes)
    from reptile import stages

    report = artifacts / "verification.json"
    with console.status("verifying"):
        result = stages.verify(
            settings.verify,
            artifacts / "prepared",
            artifacts / "checkpoint",
            artifacts / "bundle",
            report,
            beside=_second_checkpoint(settings, artifacts),
            bundles=artifacts / "bundles",
        )
    console.print(f"{len(result['checks'])} checks passed; report: {report}")


@app.command()
def show(artifacts: ArtifactsOption = ARTIFACTS) -> None:
    """Show the stages' results: the accuracies, and the paths of bundle and report."""
    from reptile.evaluate import summary_table
    from reptile.evaluate.metrics import read_metrics

    evaluation, verification = artifacts / "evaluation", artifacts / "verification.json"
    console.print(summary_table(read_metrics(evaluation)))
    if not verification.is_file():
        raise InputError(f"{verification}: no such file; run `reptile verify` first")
    checks = json.loads(verification.read_text(encoding="utf-8"))["checks"]
    passed = sum(check["passed"] for check in checks)
    console.print(f"report   {evaluation / 'report.html'}")
    console.print(f"bundle   {artifacts / 'bundle'} ({passed} of {len(checks)} checks passed)")


@app.command()
def classify(
    bundle: Annotated[Path, typer.Argument(help="Folder that `reptile export` wrote.")],
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="IMAGE...", help="PNG or JPEG files to classify.")
    ] = None,
    support: Annotated[
        Path | None,
        typer.Option(help="Folder or zip with a folder of examples for each class."),
    ] = None,
    task: Annotated[
        Path | None, typer.Option(help="Adapted task that --save wrote, instead of --support.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="File for the adapted task, to use with --task.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Inner steps; the bundle's by default. Not for closed-form bundles."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the mini-batches; 0 by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Learn new classes from a few example images, then classify other images; needs no torch.

    Example: reptile classify artifacts/bundle --support animals new/1.png new/2.png
    """
    from reptile.cli.classify import read_images, read_support, report
    from reptile.runtime import FewShotModel

    paths = images or []
    if (support is None) == (task is None):
        raise InputError(
            "give either --support, a folder of examples, or --task, what --save wrote"
        )
    if task is not None and (save, steps, seed) != (None, None, None):
        raise InputError("--save, --steps and --seed need --support: --task is adapted already")
    if not paths and save is None:
        raise InputError("no images to classify: give PNG or JPEG files, or --save to learn only")
    model = FewShotModel.load(bundle)
    queries = read_images(paths, model.pixel_shape)
    if support is not None:
        examples, labels = read_support(support, model)
        adapted = model.adapt(examples, labels, steps=steps, seed=seed or 0)
        learnt = f"learnt {len(adapted.labels)} classes from {len(labels)} images"
    elif task is not None:
        adapted = model.load_adapted(task)
        learnt = f"{task}: {len(adapted.labels)} classes"
    prediction = adapted.predict(queries)
    if save is not None:
        adapted.save(save)
    if as_json:
        typer.echo(json.dumps(report(paths, adapted, prediction), indent=2, allow_nan=False))
        return
    if len(losses := adapted.losses):  # none of a closed-form bundle
        learnt += f" in {len(losses)} steps, loss {losses[0]:.3f} → {losses[-1]:.3f}"
    console.print(learnt, markup=False, highlight=False, soft_wrap=True)
    if paths:
        console.print(_prediction_table(paths, adapted, prediction))


@app.command()
def serve(
    bundle: Annotated[
        Path | None, typer.Argument(help="Folder that `reptile export` wrote.", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 for all of the machine's addresses.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8080,
    tasks: Annotated[
        Path | None, typer.Option(help="Folder that keeps adapted tasks over a restart.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "-S", metavar="NAME=VALUE", help="Change a setting; --bounds lists them."
        ),
    ] = None,
    bounds: Annotated[bool, typer.Option("--bounds", help="List the settings and exit.")] = False,
) -> None:
    """Serve a bundle over HTTP, with a page to try it on; needs no torch.

    If the environment variable REPTILE_TOKEN is set, every request must carry it as a bearer token,
    except health checks and the page's files; the page asks its visitor for it.

    Example: reptile serve artifacts/bundle --tasks tasks -S max_tasks=100
    """
    from reptile.serve.settings import ServeSettings, changed

    if bounds:
        for name, field in ServeSettings.model_fields.items():
            if name != "tasks":
                console.print(f"{name} = {field.default}", highlight=False)
                console.print(f"    {' '.join((field.description or '').split())}", style="dim")
        return
    settings = changed(tasks, changes or ())
    if bundle is None:
        raise InputError("BUNDLE is missing: give the folder that `reptile export` wrote")
    from reptile.serve.run import run

    run(bundle, host, port, settings)


@app.command("reproduce")
def reproduce_command(
    preset: Annotated[str, typer.Argument(help="The experiment; see `reptile presets`.")],
    seeds: Annotated[int, typer.Option(min=1, help="Training runs, from train.seed on.")] = 3,
    data: Annotated[
        str | None,
        typer.Option(help="Source of images or prepared folder, instead of the preset's."),
    ] = None,
    changes: SetOption = None,
    artifacts: Annotated[
        Path | None,
        typer.Option(help="Folder to write.", show_default="artifacts/reproduce/PRESET"),
    ] = None,
) -> None:
    """Train and evaluate a preset for several seeds; compare it with the published result.

    Finished work is reused, and an interrupted seed resumes where it stopped.

    Example: reptile reproduce omniglot-5w1s --seeds 3 -S train.meta_iterations=5000
    """
    chosen = load_preset(preset)
    settings = load_settings(preset_path(preset), changes or ())
    from reptile.experiments.reproduce import markdown, reproduce

    folder = artifacts or ARTIFACTS / "reproduce" / preset
    with _several_bars() as observe:
        result = reproduce(chosen, settings, seeds, folder, data=data, on_progress=observe)
    typer.echo(markdown(result))
    console.print(f"written to {folder / 'result.md'} and result.json")


@app.command("compare")
def compare_command(
    algorithms: Annotated[
        list[str], typer.Argument(help="Values of train.algorithm; the first is the baseline.")
    ],
    seconds: Annotated[
        float | None, typer.Option(min=1, help="Budget: seconds of each training.")
    ] = None,
    gradients: Annotated[
        int | None, typer.Option(min=1, help="Budget: gradient evaluations of each training.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Training runs, from train.seed on.")] = 1,
    params: ParamsOption = None,
    preset: PresetOption = None,
    changes: SetOption = None,
    artifacts: ArtifactsOption = ARTIFACTS,
) -> None:
    """Train algorithms within the same budget, and compare them on the same test tasks.

    Each has the settings of its paper where they differ from those of `train`; `-S
    maml.train.inner_steps=5` changes one for maml alone. Reads ARTIFACTS/prepared; finished
    trainings are reused, and an interrupted one resumes.

    Example: reptile compare reptile maml ridge --seconds 60 --seeds 3
    """
    if (seconds is None) == (gradients is None):
        raise InputError("give a budget: --seconds or --gradients, one of them")
    if len(set(algorithms)) != len(algorithms):
        raise InputError("an algorithm is named twice; name each once")
    own: dict[str, dict[str, object]] = {name: {} for name in algorithms}
    shared = []
    for change in changes or ():
        name, _, rest = change.partition(".")
        if name in own:
            apply_change(own[name], rest)
        else:
            shared.append(change)
    settings = read_settings(params, preset, shared)
    from reptile.experiments.compare import Budget, compare, markdown

    folder = artifacts / "compare"
    with _several_bars() as observe:
        result = compare(
            settings,
            algorithms,
            seeds,
            Budget(seconds, gradients),
            artifacts / "prepared",
            folder,
            changes=own,
            on_progress=observe,
        )
    typer.echo(markdown(result))
    console.print(f"written to {folder / 'result.html'}, result.md and result.json")


@app.command("transfer")
def transfer_command(
    runs: Annotated[list[Path], typer.Argument(help="Artifacts folders, one per row and column.")],
    on: Annotated[
        list[Path] | None,
        typer.Option("--on", help="Another prepared dataset to test on; may be repeated."),
    ] = None,
    mode: Annotated[
        BatchNormMode, typer.Option(help="Batch norm in the table; the JSON has all.")
    ] = "transductive",
    params: ParamsOption = None,
    preset: PresetOption = None,
    changes: SetOption = None,
    output: Annotated[Path, typer.Option(help="Folder for transfer.json and transfer.md.")] = (
        ARTIFACTS / "transfer"
    ),
) -> None:
    """Test every run's initialisation on every run's held-out classes, and on more datasets.

    A run is not tested on its data split or prepared differently: it may have been trained on those
    classes.

    Example: reptile transfer letters digits --on letters/prepared/cross_domain/emnist-balanced
    """
    settings = read_settings(params, preset, changes).evaluate
    from reptile.experiments.transfer import transfer_runs

    with _counting("evaluating") as count:
        text = transfer_runs(settings, runs, on or (), output, mode, count)
    typer.echo(text)
    console.print(f"written to {output / 'transfer.md'} and transfer.json")


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="Preset to show in full.")] = None,
    params: Annotated[
        Path, typer.Option("--params", help="The file that DVC would change.")
    ] = PARAMS,
) -> None:
    """List the settings of published experiments, or show one and how to run it with DVC.

    Example: reptile presets omniglot-5w1s
    """
    if name is None:
        console.print(presets_table())
        console.print("reptile presets NAME shows one; reptile train --preset NAME uses it")
        return
    path = preset_path(name)
    typer.echo(path.read_text(encoding="utf-8"))
    if params.is_file():
        typer.echo(f"# with DVC:\n{dvc_command(load_settings(path), params)}")


@data_app.command()
def glyphs(
    path: Annotated[Path, typer.Argument(help="Zip file to write.")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Draw the starter dataset: invented alphabets, written by simulated hands.

    Example: reptile data glyphs data/glyphs.zip
    """
    from reptile.data.readers.glyphs import write_glyphs

    with console.status("drawing"):
        write_glyphs(path, seed=seed)
    console.print(f"wrote {path}")


@data_app.command()
def download(
    name: Annotated[str, typer.Argument(help="omniglot, mnist, emnist, cifar-fs or fc100.")],
    folder: Annotated[
        Path | None,
        typer.Option("--folder", help="Target folder; a folder in datasets/ by default."),
    ] = None,
) -> None:
    """Download a public dataset and check it; an interrupted download is resumed.

    Example: reptile data download omniglot
    """
    from reptile.data.download import dataset_named
    from reptile.data.download import download as fetch_files

    dataset = dataset_named(name)
    target = folder or Path(dataset.folder)
    with _bar(columns=(DownloadColumn(), TransferSpeedColumn())) as bar:
        tasks: dict[str, TaskID] = {}

        def observe(file: str, done: int, total: int | None) -> None:
            if file not in tasks:
                tasks[file] = bar.add_task(file)
            bar.update(tasks[file], completed=done, total=total)

        fetch_files(dataset, target, observe)
    console.print(f"{name}: {len(dataset.files)} files in {target}, as published", soft_wrap=True)
    console.print(f"version it:  dvc add {target}", soft_wrap=True)
    settings = " ".join(f"-S {each}" for each in (f"prepare.source={target}", *dataset.settings))
    console.print(f"prepare it:  reptile prepare {settings}", soft_wrap=True)


def _second_checkpoint(settings: Settings, artifacts: Path) -> Path | None:
    """Return the second learner's checkpoint; None if the settings train none."""
    return artifacts / "beside/checkpoint" if settings.beside.training else None


def run() -> None:
    """Run the command line; a foreseeable error prints one line and exits with its class's code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("reptile").setLevel(logging.INFO)
    # Pillow's, of more pixels than its limit: ours is lower, and says which file it is.
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a class's name may not be encodable
            stream.reconfigure(errors="backslashreplace")
    console.quiet = (
        os.environ.get("RANK", "0") != "0"
    )  # of several processes only the first one prints
    try:
        check_code()
        app()
    except StoppedError as stopped:
        if not console.quiet:
            typer.echo(str(stopped), err=True)
        sys.exit(stopped.exit_code)
    except ReptileError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        message = f"{error.filename or ''}: {error.strerror or error}".removeprefix(": ")
        if isinstance(error, FileExistsError | NotADirectoryError):
            message = f"{error.filename}: a file lies where a folder is needed; move it away"
        named = isinstance(error, FileNotFoundError | FileExistsError | NotADirectoryError)
        _fail(message, (InputError if named else PlatformError).exit_code)


def _fail(message: str, exit_code: int) -> None:
    for line in message.splitlines():
        typer.echo(f"error: {line}", err=True)
    sys.exit(exit_code)


def _prediction_table(
    paths: list[Path], adapted: "AdaptedModel", prediction: "Prediction"
) -> Table:
    """One row an image: its most probable class with its probability, and the second."""
    columns = [Column(name, overflow="fold") for name in ("image", "class", "", "", "or")]
    columns[3].justify = "right"
    table = Table(*columns, box=SIMPLE_HEAD)
    for path, row in zip(paths, prediction.probabilities, strict=True):
        first, second, *_ = row.argsort()[::-1]
        name = str(path)
        table.add_row(
            Text(name if name.isprintable() else repr(name)),
            Text(str(adapted.labels[first]), style="bold"),
            ProgressBar(total=1, completed=float(row[first]), width=12),
            f"{row[first]:.1%}",
            Text(f"{adapted.labels[second]} {row[second]:.1%}", style="dim"),
        )
    return table


@contextmanager
def _several_bars() -> "Iterator[Callable[[str, int, int], None]]":
    """Show a progress bar for each thing that is told of."""
    with _bar() as bar:
        tasks: dict[str, TaskID] = {}

        def observe(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what)
            bar.update(tasks[what], completed=done, total=total)

        yield observe


def _bar(*more: str, columns: Sequence[ProgressColumn] = (MofNCompleteColumn(),)) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        *(TextColumn(field) for field in more),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


def _named_folder(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise InputError(f"--beside {text}: write it as NAME=FOLDER")
    return name, Path(folder)


@contextmanager
def _counting(what: str) -> "Iterator[Counted]":
    """Show a progress bar; yield the function that updates it."""
    with _bar() as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _training(settings: TrainSettings) -> "Iterator[Callable[[TrainingProgress], None]]":
    """Show training: a bar in a terminal, and a line for each point of the curve."""
    shown = 0
    meta_batch = settings.meta_batch
    with _bar("{task.fields[rate]}") as bar:
        task = bar.add_task("training", total=settings.meta_iterations, rate="")

        def observe(progress: "TrainingProgress") -> None:
            nonlocal shown
            speed = bar.tasks[task].speed
            rate = f"{speed * meta_batch:.0f} tasks/s" if speed else ""
            bar.update(task, completed=progress.iteration, rate=f"{rate}, {progress.engine}")
            for point in progress.curve[shown:]:
                bar.console.print(
                    f"{point.iteration:>7} of {progress.of}: loss {point.loss:.3f}, "
                    f"validation {progress.objective.title} {point.score:#.3g}, {rate} "
                    f"({progress.engine})",
                    soft_wrap=True,
                )
            shown = len(progress.curve)

        yield observe
