"""The graph: dvc.yaml's five stages with a gate before the export, for Kubeflow Pipelines.

What a run may choose is a parameter; the rest (retries, time limits, mounts) stands here. There are
two pipelines with the same graph: `reptile` trains once, `reptile_sweep` several times at once.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from kfp import dsl, kubernetes
from kfp.dsl import PipelineTask

from components import control, secrets, stages
from components.image import IMAGE
from pipeline.revisions import DATA_FILE, data_md5
from reptile.settings import load_settings

ROOT = Path(__file__).parent.parent
# Counted from the start of the first attempt: with the default of an hour, no longer training would
# be retried, and a second attempt would be stopped when the hour is over.
RETRY_WINDOW = "7d"
WORK = "/workspace"  # where the volume for unfinished training runs is mounted
# In the mode that the bundle runs in, down to the fewest classes that it takes.
POINTS = ("2-way 1-shot frozen", "3-way 1-shot frozen", "5-way 1-shot frozen")


def _place(task: PipelineTask, image: str, pull_secret: str, hours: int = 1) -> PipelineTask:
    """Say where a task runs and as whom, and when it is given up."""
    task.set_container_image(image)
    kubernetes.set_image_pull_secrets(task, [pull_secret])
    # Kubeflow itself drops all capabilities, forbids privilege escalation and sets the seccomp
    # profile; this is what the Pod Security Standard `restricted` needs besides.
    kubernetes.set_security_context(task, run_as_non_root=True)
    # For roots that are read-only; Kubeflow mounts the other folders that its launcher writes to.
    kubernetes.empty_dir_mount(task, "temporary", "/tmp")
    # OpenMP threads that spin slow everything down where cores are shared.
    task.set_env_variable("OMP_WAIT_POLICY", "PASSIVE")
    return kubernetes.set_timeout(task, hours * 60 * 60)


def _give_secret(task: PipelineTask, name: str, folder: Path) -> None:
    # Not as environment variables: Kubeflow's launcher would take those keys for its own store.
    kubernetes.use_secret_as_volume(task, name, str(folder), optional=True)


_SETTINGS = load_settings(ROOT / "params.yaml")


def _graph(
    repository: str,
    data_revision: str,
    data_md5: str = data_md5((ROOT / DATA_FILE).read_text(encoding="utf-8")),
    data_path: str = "data",
    git_commit: str = "",
    image: str = IMAGE,
    pull_secret: str = "reptile-registry",
    champion: str = "",
    bundle_remote: str = "",
    prepare_settings: str = _SETTINGS.prepare.model_dump_json(),
    train_settings: str = _SETTINGS.train.model_dump_json(),
    beside_settings: str = _SETTINGS.beside.model_dump_json(),
    evaluate_settings: str = _SETTINGS.evaluate.model_dump_json(),
    export_settings: str = _SETTINGS.export.model_dump_json(),
    verify_settings: str = _SETTINGS.verify.model_dump_json(),
    points: list[str] = list(POINTS),
    work: str = WORK,
    work_volume: str = "reptile-work",
    work_secret: str = "reptile-work",
    nodes: int = 1,
    data_secret: str = "reptile-data",
    git_secret: str = "reptile-git",
    accelerator: str = "nvidia.com/gpu",
    accelerators: str = "0",
    cpu: str = "4",
    memory: str = "8Gi",
    node_selector: dict[str, str] = {},
    tolerations: list[dict[str, Any]] = [],
) -> None:
    """Fetch, prepare, train, evaluate, and export what passes the gate.

    Args:
        repository: git address of the repository whose data.dvc tracks the data.
        data_revision: commit of that repository.
        data_md5: hash of the data in data.dvc at that commit; the cache goes by it.
        data_path: what to fetch of it, relative to its root.
        git_commit: commit of the code in the image, for lineage; empty for the one that the image
            was built from.
        image: the project's image for training, best by digest.
        pull_secret: Kubernetes secret for the image's registry; may be missing.
        champion: text of the manifest.json of the bundle in use, which the new one must not be
            worse than; empty for none.
        bundle_remote: address of a DVC remote that a verified bundle is pushed to; empty for none.
        prepare_settings: section `prepare` of params.yaml, as JSON.
        train_settings: section `train` of params.yaml, as JSON; of a sweep, a list of such texts.
        beside_settings: section `beside` of params.yaml, as JSON; its algorithm may be none.
        evaluate_settings: section `evaluate` of params.yaml, as JSON.
        export_settings: section `export` of params.yaml, as JSON; its gate decides.
        verify_settings: section `verify` of params.yaml, as JSON.
        points: other tasks to measure, such as `3-way 1-shot frozen`; may be empty.
        work: folder for unfinished training runs, on the volume below; or an address such as
            `s3://bucket/unfinished`, with which no volume is mounted.
        work_volume: persistent volume claim that is mounted for training.
        work_secret: Kubernetes secret with the credentials of the store at `work`; may be missing.
        nodes: pods that training is shared among, by Kubeflow Trainer; 1 needs no Trainer.
        data_secret: Kubernetes secret with the credentials of the DVC remote; may be missing.
        git_secret: Kubernetes secret with a key or token for the git repository; may be missing.
        accelerator: resource name of the accelerator.
        accelerators: how many of them training gets; 0 trains on CPUs.
        cpu: CPUs of training and evaluation.
        memory: memory of training and evaluation.
        node_selector: labels of the nodes to train on.
        tolerations: taints that training tolerates.
    """
    prepared = stages.prepare(
        settings=prepare_settings,
        repository=repository,
        revision=data_revision,
        path=data_path,
        md5=data_md5,
        git_commit=git_commit,
    )
    _place(prepared, image, pull_secret)
    prepared.set_retry(
        3, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration=RETRY_WINDOW
    )
    _give_secret(prepared, data_secret, secrets.DATA)
    _give_secret(prepared, git_secret, secrets.GIT)
    dataset = prepared.outputs["prepared"]

    def check(settings: Any) -> PipelineTask:
        checked = stages.check(
            train_settings=settings,
            beside_settings=beside_settings,
            evaluate_settings=evaluate_settings,
            export_settings=export_settings,
            verify_settings=verify_settings,
            prepared=dataset,
        )
        return _place(checked, image, pull_secret)

    def train(settings: Any, stage: Callable[..., Any] = stages.train) -> Any:
        trained = stage(settings=settings, work=work, nodes=nodes, prepared=dataset)
        _place(trained, image, pull_secret, hours=24)
        trained.set_retry(
            5, backoff_duration="60s", backoff_factor=2.0, backoff_max_duration=RETRY_WINDOW
        )
        trained.set_cpu_limit(cpu).set_memory_limit(memory)
        trained.set_accelerator_type(accelerator).set_accelerator_limit(accelerators)
        # KFP 2.17 forgets to hand these on into a group of tasks such as a loop.
        trained.register_pipeline_channels([accelerator, accelerators, cpu, memory])
        kubernetes.mount_pvc(trained, work_volume, WORK)
        _give_secret(trained, work_secret, secrets.WORK)
        kubernetes.empty_dir_mount(trained, "shared-memory", "/dev/shm", "Memory", "2Gi")
        kubernetes.add_node_selector_json(trained, node_selector)
        kubernetes.add_toleration_json(trained, tolerations)
        return trained

    if train_settings.channel_type.startswith("List"):  # type: ignore[attr-defined]  # of kfp
        # Without a name: backends up to 2.15 cannot collect the results of a loop that has one.
        with dsl.ParallelFor(train_settings) as candidate:
            trained = train(candidate).after(check(candidate))
            checkpoints = trained.outputs["checkpoint"]
        chosen = control.choose(checkpoints=dsl.Collected(checkpoints))
        checkpoint = _place(chosen, image, pull_secret).outputs["best"]
        second = train(beside_settings, stages.train_beside)
    else:
        checked = check(train_settings)
        checkpoint = train(train_settings).after(checked).outputs["checkpoint"]
        second = train(beside_settings, stages.train_beside).after(checked)
    beside = second.outputs["beside"]

    evaluated = stages.evaluate(
        settings=evaluate_settings,
        points=points,
        prepared=dataset,
        checkpoint=checkpoint,
        beside=beside,
    )
    _place(evaluated, image, pull_secret, hours=6)
    evaluated.set_cpu_limit(cpu).set_memory_limit(memory)
    evaluation = evaluated.outputs["evaluation"]

    judged = control.gate(
        settings=export_settings, champion=champion, checkpoint=checkpoint, evaluation=evaluation
    )
    _place(judged, image, pull_secret)
    # A refusal fails the gate's task, and so the run. A condition would do neither: a backend skips
    # its tasks, and does not see a group as complete whose tasks were skipped or cached.
    exported = stages.export(
        settings=export_settings,
        prepared=dataset,
        checkpoint=checkpoint,
        beside=beside,
        evaluation=evaluation,
    ).after(judged)
    _place(exported, image, pull_secret)
    verified = stages.verify(
        settings=verify_settings,
        prepared=dataset,
        checkpoint=checkpoint,
        beside=beside,
        bundle=exported.outputs["bundle"],
        bundles=exported.outputs["bundles"],
    )
    _place(verified, image, pull_secret)
    # Nothing may depend on this group: by default it is skipped.
    with dsl.If(bundle_remote != "", name="publish"):
        published = stages.publish(bundle=exported.outputs["bundle"], remote=bundle_remote).after(
            verified
        )
        _place(published, image, pull_secret)
        published.set_retry(
            3, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration=RETRY_WINDOW
        )
        _give_secret(published, data_secret, secrets.DATA)


def _swept(graph: Callable[..., None]) -> Callable[..., None]:
    """Return the graph with `train_settings` as a list; nothing else differs."""

    @wraps(graph)
    def sweep(*arguments: Any) -> None:
        graph(*arguments)

    signature = inspect.signature(graph)
    each = signature.parameters["train_settings"]
    many = each.replace(annotation=list[str], default=[each.default])
    sweep.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*(signature.parameters | {"train_settings": many}).values()]
    )
    return sweep


reptile = dsl.pipeline(
    name="reptile",
    description="Few-shot learning with Reptile: from images at a DVC revision to a verified "
    "ONNX bundle",
)(_graph)

reptile_sweep = dsl.pipeline(
    name="reptile-sweep",
    description="Few-shot learning with Reptile: trains with several settings at once, chooses by "
    "validation, and makes a verified ONNX bundle of the best",
)(_swept(_graph))
