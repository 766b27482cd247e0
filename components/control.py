"""What joins the stages: the gate, and the choice among the candidates of a sweep."""

from kfp.dsl import Artifact, Input, Markdown, Model, Output

from components.image import component


@component
def gate(
    settings: str,
    champion: str,
    checkpoint: Input[Model],
    evaluation: Input[Artifact],
    verdict: Output[Markdown],
) -> None:
    """Fail, with the reason, unless the checkpoint may be exported.

    A failure rather than a condition: it ends the run on every backend, and its reason is the end
    of its log, which is all that a backend tells whoever waits.
    """
    from components import artifacts

    reason = artifacts.gate(settings, champion, checkpoint, evaluation, verdict)
    if reason:
        raise SystemExit(f"refused by the gate: {reason}")


@component
def choose(
    checkpoints: Input[list[Model]], best: Output[Model], candidates: Output[Markdown]
) -> None:
    """Keep the candidate with the best validation score; the test split is not looked at."""
    from components import artifacts

    artifacts.choose(checkpoints, best, candidates)
