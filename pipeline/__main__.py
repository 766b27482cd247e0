"""The command line: compile the pipeline, run it here, or on a cluster, once or on a schedule.

It only reads options and shows results; the work is done by the modules beside it.
"""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline import COMPILED, SWEEP
from reptile.cli import PARAMS, ParamsOption, PresetOption, SetOption, read_settings
from reptile.errors import InputError, PlatformError, ReptileError
from reptile.files import atomic_file
from reptile.settings import Settings, load_settings

if TYPE_CHECKING:
    from kfp.dsl.graph_component import GraphComponent

    from pipeline.cluster import Cluster, Outcome
    from pipeline.package import Package

app = typer.Typer(
    help="The Kubeflow pipeline: the same five stages as dvc.yaml, with a gate before the export."
    "\n\nExit codes beside those of each command: 2 wrong option, parameter or file; 6 this "
    "machine lacks something; 7 the cluster cannot be reached, or refuses.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

PipelineOption = Annotated[Path, typer.Option("--pipeline", help="Compiled pipeline.")]
SectionsOption = Annotated[
    Path | None,
    typer.Option("--params", help="File of settings; without it, those that were compiled."),
]
ParamOption = Annotated[
    list[str] | None,
    typer.Option("--param", "-P", metavar="NAME=VALUE", help="A run parameter; may be repeated."),
]
InputsOption = Annotated[
    Path | None, typer.Option("--inputs", help="YAML file of run parameters; --param goes first.")
]
ExperimentOption = Annotated[
    str, typer.Option(envvar="KF_PIPELINES_DEFAULT_EXPERIMENT_NAME", help="Made if missing.")
]
CacheOption = Annotated[
    bool | None, typer.Option("--cache/--no-cache", help="Instead of what was compiled.")
]
RootOption = Annotated[str | None, typer.Option("--pipeline-root", help="Where outputs go.")]
AccountOption = Annotated[
    str | None, typer.Option("--service-account", help="Kubernetes account of the run's pods.")
]
HostOption = Annotated[
    str | None,
    typer.Option(
        envvar="KF_PIPELINES_ENDPOINT",
        help="Address of Kubeflow Pipelines; without it, the cluster one is in, or kubeconfig's.",
    ),
]
NamespaceOption = Annotated[
    str | None, typer.Option(help="Where there are several users: the namespace to work in.")
]
TokenOption = Annotated[
    Path | None,
    typer.Option("--token-file", help="File with the token; or put it into KF_PIPELINES_TOKEN."),
]
CertificateOption = Annotated[
    Path | None, typer.Option("--ca-cert", help="PEM file of the host's certificate authority.")
]
ForceOption = Annotated[
    bool,
    typer.Option(
        "--force", help="Allow an image without digest or version, and more than any node holds."
    ),
]
WaitOption = Annotated[bool, typer.Option("--wait", help="Until the run has ended.")]
TimeoutOption = Annotated[
    float | None, typer.Option(min=0, help="Seconds to wait; without it, as long as it takes.")
]
PollOption = Annotated[float, typer.Option(min=0.01, help="Seconds between looks.")]


@app.command(name="compile")
def compile_(
    output: Annotated[
        Path, typer.Option(help="Folder of the compiled files.", file_okay=False)
    ] = COMPILED.parent,
    backend: Annotated[
        str,
        typer.Option(
            metavar="RELEASE",
            help="Oldest release of Kubeflow Pipelines to run on; 2.15 knows no security context.",
        ),
    ] = "2.16",
    pull_policy: Annotated[
        str | None,
        typer.Option(
            metavar="POLICY",
            help="When pods pull the image: Always, IfNotPresent, Never; Kubernetes' default.",
        ),
    ] = None,
) -> None:
    """Write reptile.yaml and sweep.yaml from the source, params.yaml and data.dvc.

    Example: python -m pipeline compile --backend 2.15 --output compiled
    """
    from pipeline.document import read_backend, read_pull_policy, render
    from pipeline.graph import reptile, reptile_sweep

    release, policy = read_backend(backend), pull_policy and read_pull_policy(pull_policy)
    output.mkdir(parents=True, exist_ok=True)
    for path, graph in ((COMPILED, reptile), (SWEEP, reptile_sweep)):
        with atomic_file(output / path.name) as temporary:
            temporary.write_text(render(graph, release, policy or None), encoding="utf-8")
        console.print(f"wrote {output / path.name}", soft_wrap=True)


@app.command()
def run_local(
    params: ParamsOption = None,
    preset: PresetOption = None,
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
    from pipeline.graph import reptile

    settings = settings_arguments(read_settings(params, preset, changes))
    raise typer.Exit(
        _run_here(
            reptile,
            settings,
            output,
            work,
            repository=repository,
            revision=revision,
            champion=champion,
            points=points,
            bundle_remote=bundle_remote,
            image=(image or _image()) if docker else None,
        )
    )


def _image() -> str:
    from components.image import IMAGE

    return IMAGE


def _run_here(
    graph: "GraphComponent",
    settings: dict[str, Any],
    output: Path,
    work: Path,
    *,
    repository: Path = Path(),
    revision: str = "HEAD",
    champion: Path | None = None,
    points: list[str] | None = None,
    bundle_remote: str = "",
    image: str | None = None,
) -> int:
    """Run a pipeline on this machine and show what it has made; return the exit code."""
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
        "image": image or "",
        "points": points or list(POINTS),
        **settings,
    }
    run = local.run_local(arguments, output, image, graph)
    table = Table("stage", "what it made")
    for result in run.results:
        table.add_row(result.stage, result.found)
    console.print(table)
    console.print(f"{run.outcome.name.lower()}: {run.folder}", soft_wrap=True)
    if run.message:
        typer.echo(run.message, err=True)
    return run.outcome


@app.command()
def submit(
    pipeline: PipelineOption = COMPILED,
    params: SectionsOption = None,
    changes: SetOption = None,
    param: ParamOption = None,
    inputs: InputsOption = None,
    name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    experiment: ExperimentOption = "Default",
    cache: CacheOption = None,
    pipeline_root: RootOption = None,
    service_account: AccountOption = None,
    force: ForceOption = False,
    wait: WaitOption = False,
    timeout: TimeoutOption = None,
    poll: PollOption = 10.0,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    token_file: TokenOption = None,
    ca_cert: CertificateOption = None,
) -> None:
    """Run the pipeline once.

    Exit code: 0 submitted, or with --wait succeeded; 1 failed; 2 wrong option or parameter; 3
    refused by the gate; 4 cancelled; 5 not ended in time, or lost contact; 7 the cluster cannot be
    reached or refuses; 130 interrupted. The run goes on after 5 and 130.

    Example: python -m pipeline submit --wait -P repository=https://… -P data_revision=4f2c…
    """
    from pipeline.cluster import RunOptions

    package, parameters = _load_run(pipeline, cache, _given(params, changes, inputs, param))
    options = RunOptions(parameters, experiment, pipeline_root, service_account)
    cluster = _cluster_for(package, parameters, force, host, namespace, token_file, ca_cert)
    run_id = cluster.submit(
        package, options, name or f"{package.name} {datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
    )
    console.print(f"run {run_id}: {cluster.link(run_id)}", soft_wrap=True, highlight=False)
    if wait:
        raise typer.Exit(_follow(cluster, run_id, timeout, poll))


@app.command()
def sweep(
    params: ParamsOption = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-S",
            metavar="KEY=VALUE[,VALUE…]",
            help="Change a setting; several values of one of `train` are tried. May be repeated.",
        ),
    ] = None,
    here: Annotated[
        bool, typer.Option("--local", help="Run on this machine, as run-local does.")
    ] = False,
    param: ParamOption = None,
    inputs: InputsOption = None,
    name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    experiment: ExperimentOption = "Default",
    cache: CacheOption = None,
    pipeline_root: RootOption = None,
    service_account: AccountOption = None,
    force: ForceOption = False,
    wait: WaitOption = False,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    token_file: TokenOption = None,
    ca_cert: CertificateOption = None,
) -> None:
    """Train with each combination of settings; evaluate and export the best by validation.

    The best is measured on the test split, and only the best, once. Exit codes are those of submit,
    or with --local those of run-local.

    Example: python -m pipeline sweep --local -S train.meta_step=0.5,1.0 -S train.seed=0,1
    """
    from pipeline.sweep import candidates

    tried = candidates(params or PARAMS, changes or ())
    settings: dict[str, Any] = dict(settings_arguments(tried[0]))
    settings["train_settings"] = [each.train.model_dump_json() for each in tried]
    console.print(f"{len(tried)} candidates", highlight=False)
    if here:
        from pipeline.graph import reptile_sweep

        runs, work = Path("artifacts/kubeflow"), Path("artifacts/training")
        raise typer.Exit(_run_here(reptile_sweep, settings, runs, work))
    # Of the other sections those that are given here; else the file of inputs has its say.
    changed = {change.partition(".")[0] for change in changes or ()} | {"train"}
    given = [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in settings.items()
        if params or key.removesuffix("_settings") in changed
    ]
    submit(
        pipeline=SWEEP,
        param=[*(param or ()), *given],
        inputs=inputs,
        name=name,
        experiment=experiment,
        cache=cache,
        pipeline_root=pipeline_root,
        service_account=service_account,
        force=force,
        wait=wait,
        timeout=None,
        poll=10.0,
        host=host,
        namespace=namespace,
        token_file=token_file,
        ca_cert=ca_cert,
    )


@app.command()
def status(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Id of the run, as submit prints it.")],
    wait: WaitOption = False,
    timeout: TimeoutOption = None,
    poll: PollOption = 10.0,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    token_file: TokenOption = None,
    ca_cert: CertificateOption = None,
) -> None:
    """Show the state of a run, and if it failed, which task did and the end of its log.

    Exit code: 0 succeeded; 1 failed; 3 refused by the gate; 4 cancelled; 5 not ended, or with
    --wait not in time; 130 interrupted.

    Example: python -m pipeline status 990880c5-66ea-4aa6-baed-76ab61790c8f
    """
    from pipeline.cluster import Cluster
    from pipeline.connection import connect
    from pipeline.progress import state

    cluster = Cluster(connect(host, namespace, token_file, ca_cert))
    found = cluster.run(run)
    console.print(f"{state(found)}: {cluster.link(run)}", soft_wrap=True, highlight=False)
    raise typer.Exit(_follow(cluster, run, timeout, poll) if wait else _explain(cluster, found))


@app.command()
def check(
    pipeline: PipelineOption = COMPILED,
    params: SectionsOption = None,
    changes: SetOption = None,
    param: ParamOption = None,
    inputs: InputsOption = None,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    token_file: TokenOption = None,
    ca_cert: CertificateOption = None,
) -> None:
    """Look at what a run with these parameters needs of the cluster; nothing is changed there.

    Exit code: 0 nothing is wrong; 2 wrong option or parameter; 7 something is, so that a run would
    fail or wait for ever. What this account may not read is no error.

    Example: python -m pipeline check --inputs nightly.yaml
    """
    from pipeline.checks import findings
    from pipeline.cluster import Cluster
    from pipeline.connection import ClusterError, connect
    from pipeline.kube import find_kubernetes
    from pipeline.package import load_package, run_parameters

    package = load_package(pipeline)
    given = _given(params, changes, inputs, param)
    parameters = run_parameters(package, given, complete=False)
    cluster: Cluster | ClusterError
    try:
        cluster = Cluster(connect(host, namespace, token_file, ca_cert))
        namespace = cluster.namespace
    except ClusterError as error:
        cluster = error
    table = Table("checked", "state", "found")
    wrong = False
    for finding in findings(cluster, find_kubernetes(namespace), package, parameters):
        table.add_row(*map(escape, finding))
        wrong = wrong or finding.state == "wrong"
    console.print(table)
    raise typer.Exit(ClusterError.exit_code if wrong else 0)


@app.command()
def schedule(
    name: Annotated[str, typer.Argument(help="Name of the schedule; there is one of each.")],
    cron: Annotated[
        str, typer.Argument(help="Six fields, seconds first, UTC: '0 0 2 * * *' is 02:00 nightly.")
    ],
    pipeline: PipelineOption = COMPILED,
    params: SectionsOption = None,
    changes: SetOption = None,
    param: ParamOption = None,
    inputs: InputsOption = None,
    start: Annotated[str | None, typer.Option(help="Not before, as 2027-01-31T02:00Z.")] = None,
    end: Annotated[str | None, typer.Option(help="Not after.")] = None,
    catch_up: Annotated[
        bool, typer.Option("--catch-up", help="Also run every time missed since --start.")
    ] = False,
    experiment: ExperimentOption = "Default",
    cache: CacheOption = None,
    pipeline_root: RootOption = None,
    service_account: AccountOption = None,
    force: ForceOption = False,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    token_file: TokenOption = None,
    ca_cert: CertificateOption = None,
) -> None:
    """Run the pipeline again and again: have exactly this schedule of that name.

    The same again changes nothing; anything else replaces the schedule. One run at a time.

    Example: python -m pipeline schedule nightly '0 0 2 * * *' --inputs nightly.yaml
    """
    from pipeline.cluster import RunOptions, Timetable
    from pipeline.cron import parse_cron

    package, parameters = _load_run(pipeline, cache, _given(params, changes, inputs, param))
    options = RunOptions(parameters, experiment, pipeline_root, service_account)
    timetable = Timetable(parse_cron(cron), _time(start), _time(end), catch_up)
    now = datetime.now(UTC)
    times = timetable.times(now, 3)
    cluster = _cluster_for(package, parameters, force, host, namespace, token_file, ca_cert)
    done = cluster.schedule(name, package, options, timetable, now)
    console.print(
        f"schedule {name} {done}: {timetable.cron.words}, UTC; next "
        + (", ".join(f"{time:%Y-%m-%d %H:%M:%S}" for time in times) or "none"),
        soft_wrap=True,
        highlight=False,
    )


@app.command()
def unschedule(
    name: Annotated[str, typer.Argument(help="Name of the schedule.")],
    every: Annotated[bool, typer.Option("--all", help="Even if several have the name.")] = False,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    token_file: TokenOption = None,
    ca_cert: CertificateOption = None,
) -> None:
    """Remove a schedule; a run that it has started goes on. Nothing to remove is no error.

    Example: python -m pipeline unschedule nightly
    """
    from pipeline.cluster import Cluster
    from pipeline.connection import connect

    cluster = Cluster(connect(host, namespace, token_file, ca_cert))
    removed = cluster.unschedule(name, every=every)
    console.print(
        f"schedule {name} removed" if removed else f"there is no schedule {name}",
        soft_wrap=True,
        highlight=False,
    )


def _load_run(
    pipeline: Path, cache: bool | None, given: dict[str, Any]
) -> tuple["Package", dict[str, Any]]:
    """Return the compiled pipeline, without a volume where a store has its place, and parameters.

    Args:
        pipeline: the compiled file.
        cache: whether tasks may come from the cache; None is as compiled.
        given: run parameters.
    """
    from pipeline.package import load_package, run_parameters, without_volume

    package = load_package(pipeline, cache)
    parameters = run_parameters(package, given)
    return without_volume(package) if "://" in parameters.get("work", "") else package, parameters


def _given(
    params: Path | None, changes: list[str] | None, inputs: Path | None, param: list[str] | None
) -> dict[str, Any]:
    """Return the run parameters that were given: settings first, then the file, then the pairs."""
    given: dict[str, Any] = {}
    if params or changes:
        given |= settings_arguments(load_settings(params or PARAMS, changes or ()))
    if inputs:
        given |= _mapping(inputs)
    for pair in param or ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--param {pair!r} is not NAME=VALUE")
        given[key] = value
    return given


def _mapping(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML ({error})".replace("\n", " ")) from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{path}: not a mapping from names of run parameters to values")
    return value


def settings_arguments(settings: Settings) -> dict[str, str]:
    """Return the settings as the pipeline takes them: one JSON text a section."""
    return {f"{name}_settings": section.model_dump_json() for name, section in settings}


def _absolute(remote: str) -> str:
    """Return a remote's address, a folder's as an absolute path."""
    return remote if not remote or "://" in remote else str(Path(remote).absolute())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _time(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(f"{text!r} is not a time like 2027-01-31T02:00Z") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _cluster_for(
    package: "Package",
    parameters: dict[str, Any],
    force: bool,
    host: str | None,
    namespace: str | None,
    token_file: Path | None,
    ca_cert: Path | None,
) -> "Cluster":
    """Return the cluster, unless the run cannot succeed or the server is too old for it."""
    from pipeline.cluster import Cluster
    from pipeline.connection import check_version, connect
    from pipeline.kube import find_kubernetes
    from pipeline.preflight import check_run

    check_run(package, parameters, find_kubernetes(namespace), force=force)
    cluster = Cluster(connect(host, namespace, token_file, ca_cert))
    remark = check_version(cluster.version(), package.backend)
    if remark:
        typer.echo(remark, err=True)
    return cluster


def _follow(cluster: "Cluster", run_id: str, timeout: float | None, poll: float) -> int:
    """Show what becomes of a run and its tasks until it has ended; return the exit code."""
    from pipeline.cluster import Outcome
    from pipeline.kube import find_kubernetes
    from pipeline.progress import Progress

    later = f"the run goes on; look at {cluster.link(run_id)}"
    kube = find_kubernetes(cluster.namespace)
    progress = Progress(kube.obstacles if kube else lambda workflow: None)
    run = None
    try:
        with console.status("waiting"):
            for run in cluster.follow(run_id, timeout, poll):
                for line in progress.news(run):
                    console.print(
                        f"{datetime.now(UTC):%H:%M:%S} {line}",
                        soft_wrap=True,
                        highlight=False,
                        markup=False,
                    )
    except KeyboardInterrupt:
        typer.echo(f"no longer waiting; {later}", err=True)
        return 130
    except ReptileError as error:
        typer.echo(f"error: {error}\nno longer waiting; {later}", err=True)
        return Outcome.UNKNOWN
    result = _explain(cluster, run)
    if result is Outcome.UNKNOWN:
        typer.echo(f"not ended after {timeout:g} seconds; {later}", err=True)
    return result


def _explain(cluster: "Cluster", run: Any) -> "Outcome":
    """Say on stderr why a run has failed, if it has; return how it ended."""
    from pipeline.cluster import Outcome, outcome
    from pipeline.failure import REFUSED
    from pipeline.kube import find_kubernetes
    from pipeline.workflow import workflow_name

    result = outcome(run and run.state)
    if result is not Outcome.FAILED:
        return result
    kube, workflow = find_kubernetes(cluster.namespace), workflow_name(run)
    failed = cluster.failures(run, kube.endings(workflow) if kube and workflow else {})
    for failure in failed:
        if failure.refusal:
            typer.echo(f"{REFUSED}{failure.refusal}", err=True)
            return Outcome.REFUSED
    for failure in failed:
        typer.echo(str(failure), err=True)
    if not failed:
        typer.echo(f"no task is named as failed; look at {cluster.link(run.run_id)}", err=True)
    return result


def main() -> None:
    """Run the command line; a foreseeable error becomes one line and its class's exit code."""
    try:
        app()
    except ReptileError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        message = f"{error.filename or ''}: {error.strerror or error}".removeprefix(": ")
        _fail(message, (InputError if error.filename else PlatformError).exit_code)
    except ModuleNotFoundError as error:
        _fail(
            f"the package {error.name} is missing; it is needed for a cluster: "
            "pip install 'reptile-fewshot[train,kubeflow]'",
            PlatformError.exit_code,
        )


def _fail(message: str, exit_code: int) -> None:
    typer.echo(f"error: {message}", err=True)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
