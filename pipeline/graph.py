"""The graph: dvc.yaml's five stages with a gate before the export, for Kubeflow Pipelines.

What a run may choose is a parameter; the rest (retries, time limits, mounts) stands here.
"""

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


def _place(task: PipelineTask, image: str, hours: int = 1) -> PipelineTask:
    """Say where a task runs, and when it is given up."""
    task.set_container_image(image)
    # OpenMP threads that spin slow everything down where cores are shared.
    task.set_env_variable("OMP_WAIT_POLICY", "PASSIVE")
    return kubernetes.set_timeout(task, hours * 60 * 60)


def _give_secret(task: PipelineTask, name: str, folder: Path) -> None:
    # Not as environment variables: Kubeflow's launcher would take those keys for its own store.
    kubernetes.use_secret_as_volume(task, name, str(folder), optional=True)


_SETTINGS = load_settings(ROOT / "params.yaml")


@dsl.pipeline(
    name="reptile",
    description="Few-shot learning with Reptile: from images at a DVC revision to a verified "
    "ONNX bundle",
)
def reptile(
    repository: str,
    data_revision: str,
    data_md5: str = data_md5((ROOT / DATA_FILE).read_text(encoding="utf-8")),
    data_path: str = "data",
    git_commit: str = "",
    image: str = IMAGE,
    champion: str = "",
    bundle_remote: str = "",
    prepare_settings: str = _SETTINGS.prepare.model_dump_json(),
    train_settings: str = _SETTINGS.train.model_dump_json(),
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
        data_md5: hash of the data in data.dvc at that commit; what caching goes by.
        data_path: what to fetch of it, relative to its root.
        git_commit: commit of the code in the image, for lineage.
        image: the project's image for training, best by digest.
        champion: text of the manifest.json of the bundle in use, which the new one must not be
            worse than; empty for none.
        bundle_remote: address of a DVC remote that a verified bundle is pushed to; empty for none.
        prepare_settings: this and the next four: the sections of params.yaml, as JSON.
        train_settings: see above.
        evaluate_settings: see above.
        export_settings: see above; its gate decides.
        verify_settings: see above.
        points: where accuracy is measured besides, each by a task of its own; at least one.
        work: folder for unfinished training runs, on the volume below; or an address such as
            `s3://bucket/unfinished`, with which no volume is mounted.
        work_volume: persistent volume claim that is mounted for training.
        work_secret: Kubernetes secret with the credentials of the store at `work`; may be missing.
        nodes: pods that training is shared among, by Kubeflow Trainer; 1 needs no Trainer.
        data_secret: Kubernetes secret with the credentials of the DVC remote; may be missing.
        git_secret: Kubernetes secret with a key or token for the git repository; may be missing.
        accelerator: resource name of the accelerator.
        accelerators: how many of them training gets; 0 trains on CPUs.
        cpu: CPUs of training.
        memory: memory of training.
        node_selector: labels of the nodes to train on.
        tolerations: taints that training tolerates.
    """
    summary = control.summarise(
        data_revision=data_revision, data_md5=data_md5, git_commit=git_commit, image=image
    )
    _place(summary, image).set_caching_options(enable_caching=False)
    with dsl.ExitHandler(summary, name="run"):
        prepared = stages.prepare(
            settings=prepare_settings,
            repository=repository,
            revision=data_revision,
            path=data_path,
            md5=data_md5,
            git_commit=git_commit,
        )
        _place(prepared, image)
        prepared.set_retry(
            3, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration=RETRY_WINDOW
        )
        _give_secret(prepared, data_secret, secrets.DATA)
        _give_secret(prepared, git_secret, secrets.GIT)
        dataset = prepared.outputs["prepared"]

        trained = stages.train(settings=train_settings, work=work, nodes=nodes, prepared=dataset)
        _place(trained, image, hours=24)
        trained.set_retry(
            5, backoff_duration="60s", backoff_factor=2.0, backoff_max_duration=RETRY_WINDOW
        )
        trained.set_accelerator_type(accelerator).set_accelerator_limit(accelerators)
        trained.register_pipeline_channels([accelerator, accelerators])
        kubernetes.mount_pvc(trained, work_volume, WORK)
        _give_secret(trained, work_secret, secrets.WORK)
        kubernetes.empty_dir_mount(trained, "shared-memory", "/dev/shm", "Memory", "2Gi")
        kubernetes.add_node_selector_json(trained, node_selector)
        kubernetes.add_toleration_json(trained, tolerations)
        checkpoint = trained.outputs["checkpoint"]

        evaluated = stages.evaluate(
            settings=evaluate_settings, prepared=dataset, checkpoint=checkpoint
        )
        _place(evaluated, image, hours=6)
        for task in (trained, evaluated):
            task.set_cpu_limit(cpu).set_memory_limit(memory)
            # KFP 2.17 forgets to hand these on into a group of tasks such as an exit handler.
            task.register_pipeline_channels([cpu, memory])
        evaluation = evaluated.outputs["evaluation"]

        # Without a name: backends up to 2.15 cannot collect the results of a loop that has one.
        with dsl.ParallelFor(points) as point:
            measured = stages.measure(
                settings=evaluate_settings, point=point, prepared=dataset, checkpoint=checkpoint
            )
            _place(measured, image, hours=6)
        table = control.tabulate(rows=dsl.Collected(measured.output))
        _place(table, image)

        judged = control.gate(
            settings=export_settings,
            champion=champion,
            checkpoint=checkpoint,
            evaluation=evaluation,
        )
        _place(judged, image)
        # A refusal fails the gate's task, and so the run. A condition would do neither: a backend
        # skips its tasks, and does not see a group as complete whose tasks were skipped or cached.
        exported = stages.export(
            settings=export_settings,
            prepared=dataset,
            checkpoint=checkpoint,
            evaluation=evaluation,
        ).after(judged)
        _place(exported, image)
        verified = stages.verify(
            settings=verify_settings,
            prepared=dataset,
            checkpoint=checkpoint,
            bundle=exported.outputs["bundle"],
        )
        _place(verified, image)
        # Nothing may depend on this group: by default it is skipped.
        with dsl.If(bundle_remote != "", name="publish"):
            published = stages.publish(
                bundle=exported.outputs["bundle"], remote=bundle_remote
            ).after(verified)
            _place(published, image)
            published.set_retry(
                3, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration=RETRY_WINDOW
            )
            _give_secret(published, data_secret, secrets.DATA)
