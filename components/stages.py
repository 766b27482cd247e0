"""The five stages, and publishing.

Settings travel as JSON text, so that large seeds and nested values survive.
"""

from kfp.dsl import (
    HTML,
    Artifact,
    ClassificationMetrics,
    Dataset,
    Input,
    Markdown,
    Metrics,
    Model,
    Output,
)

from components.image import component


@component
def prepare(
    settings: str,
    repository: str,
    revision: str,
    path: str,
    md5: str,
    git_commit: str,
    prepared: Output[Dataset],
) -> None:
    """Fetch the data by DVC and make the prepared dataset of it."""
    from components import artifacts

    artifacts.prepare(settings, repository, revision, path, md5, git_commit, prepared)


@component
def check(
    train_settings: str,
    beside_settings: str,
    evaluate_settings: str,
    export_settings: str,
    verify_settings: str,
    prepared: Input[Dataset],
) -> None:
    """Refuse, before training, what a later stage would refuse after it."""
    from components import artifacts

    artifacts.check(
        train_settings,
        beside_settings,
        evaluate_settings,
        export_settings,
        verify_settings,
        prepared,
    )


@component
def train(
    settings: str,
    work: str,
    nodes: int,
    prepared: Input[Dataset],
    checkpoint: Output[Model],
    curves: Output[Artifact],
) -> None:
    """Meta-train; a run that was interrupted goes on from its latest checkpoint below `work`."""
    from components import artifacts

    artifacts.train(settings, work, nodes, prepared, checkpoint, curves)


@component
def train_beside(
    settings: str,
    work: str,
    nodes: int,
    prepared: Input[Dataset],
    beside: Output[Model],
    curves: Output[Artifact],
) -> None:
    """Train the second learner likewise; with the algorithm `none` there is no checkpoint."""
    from components import artifacts

    artifacts.train(settings, work, nodes, prepared, beside, curves)


@component
def evaluate(
    settings: str,
    points: list[str],
    prepared: Input[Dataset],
    checkpoint: Input[Model],
    beside: Input[Model],
    evaluation: Output[Artifact],
    scores: Output[Metrics],
    other_tasks: Output[Markdown],
    confusion_matrix: Output[ClassificationMetrics],
    report: Output[HTML],
) -> None:
    """Measure few-shot scores on held-out classes and on other data, and on the tasks of `points`.

    All in one task: a task of its own for each point costs more than most points take.
    """
    from components import artifacts

    artifacts.evaluate(
        settings,
        points,
        prepared,
        checkpoint,
        beside,
        evaluation,
        scores,
        other_tasks,
        confusion_matrix,
        report,
    )


@component
def export(
    settings: str,
    prepared: Input[Dataset],
    checkpoint: Input[Model],
    beside: Input[Model],
    evaluation: Input[Artifact],
    bundle: Output[Model],
    bundles: Output[Artifact],
) -> None:
    """Write the ONNX bundle, that of the best learner on validation tasks, and those of all."""
    from components import artifacts

    artifacts.export(settings, prepared, checkpoint, beside, evaluation, bundle, bundles)


@component
def verify(
    settings: str,
    prepared: Input[Dataset],
    checkpoint: Input[Model],
    beside: Input[Model],
    bundle: Input[Model],
    bundles: Input[Artifact],
    verification: Output[Artifact],
    checks: Output[Markdown],
) -> str:
    """Check the bundles against eager PyTorch; return the SHA-256 of the manifest that passed."""
    from components import artifacts

    return artifacts.verify(
        settings, prepared, checkpoint, beside, bundle, bundles, verification, checks
    )


@component
def publish(bundle: Input[Model], remote: str, pointer: Output[Artifact]) -> None:
    """Push the bundle to a DVC remote; its .dvc file, to be committed, is the pointer."""
    from components import artifacts

    artifacts.publish(bundle, remote, pointer)
