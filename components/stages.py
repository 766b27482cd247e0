"""The five stages, evaluation at single points, and publishing.

Settings travel as JSON text, so that large seeds and nested values survive.
"""

from kfp.dsl import HTML, Artifact, ClassificationMetrics, Dataset, Input, Metrics, Model, Output

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
def evaluate(
    settings: str,
    prepared: Input[Dataset],
    checkpoint: Input[Model],
    evaluation: Output[Metrics],
    confusion: Output[ClassificationMetrics],
    report: Output[HTML],
) -> None:
    """Measure few-shot accuracy; the evaluation's files lie where its metrics point."""
    from components import artifacts

    artifacts.evaluate(settings, prepared, checkpoint, evaluation, confusion, report)


@component
def measure(settings: str, point: str, prepared: Input[Dataset], checkpoint: Input[Model]) -> str:
    """Measure held-out accuracy at one point, such as `3-way 1-shot frozen`: a row of a table."""
    from components import artifacts

    return artifacts.measure(settings, point, prepared, checkpoint)


@component
def export(
    settings: str,
    prepared: Input[Dataset],
    checkpoint: Input[Model],
    evaluation: Input[Metrics],
    bundle: Output[Model],
) -> None:
    """Write the ONNX bundle."""
    from components import artifacts

    artifacts.export(settings, prepared, checkpoint, evaluation, bundle)


@component
def verify(
    settings: str,
    prepared: Input[Dataset],
    checkpoint: Input[Model],
    bundle: Input[Model],
    verification: Output[Metrics],
) -> str:
    """Check the bundle against eager PyTorch; return the SHA-256 of the manifest that held."""
    from components import artifacts

    return artifacts.verify(settings, prepared, checkpoint, bundle, verification)


@component
def publish(bundle: Input[Model], remote: str, pointer: Output[Artifact]) -> None:
    """Push the bundle to a DVC remote; its .dvc file, to be committed, is the pointer."""
    from components import artifacts

    artifacts.publish(bundle, remote, pointer)
