"""What holds the stages together: the gate, the check that follows it, and the run's summary.

All but the gate need nothing but Python, and so start at once.
"""

from typing import NamedTuple

from kfp.dsl import Input, Markdown, Metrics, Model, Output, PipelineTaskFinalStatus

from components.image import component


@component
def gate(
    settings: str, champion: str, checkpoint: Input[Model], evaluation: Input[Metrics]
) -> NamedTuple("Verdict", passed=bool, reason=str):  # type: ignore[valid-type]
    """Say whether the checkpoint may be exported, and if not, why."""
    from components import artifacts

    return artifacts.gate(settings, champion, checkpoint, evaluation)


@component
def refuse(reason: str) -> str:
    """End the run as a failure, as the gate has refused."""
    raise SystemExit(f"not exported: {reason}")


@component
def conclude(verified: str) -> None:
    """Make sure that a bundle was exported and verified.

    A condition that cannot be evaluated counts as false, and then a run without a bundle would
    look like a success.
    """
    if not verified:
        raise SystemExit("no bundle was exported and verified")
    print(f"verified the bundle whose manifest.json has SHA-256 {verified}")


@component
def summarise(
    data_revision: str,
    data_md5: str,
    git_commit: str,
    image: str,
    status: PipelineTaskFinalStatus,
    summary: Output[Markdown],
) -> None:
    """Write how the run ended, and of what it was made."""
    from pathlib import Path

    rows = {
        "state": status.state,
        "error": status.error_message or "",
        "data_revision": data_revision,
        "data_md5": data_md5,
        "git_commit": git_commit,
        "image": image,
    }
    text = "\n".join(["| run | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items()), ""])
    Path(summary.path).write_text(text, encoding="utf-8")
    summary.metadata.update(rows)
    print(text)


@component
def tabulate(rows: list[str], table: Output[Markdown]) -> None:
    """Put the rows of all measured points into one table, % ± 95 % interval."""
    from pathlib import Path

    head = ["| held-out tasks | trained | random initialisation |", "|---|---|---|"]
    text = "\n".join([*head, *rows, ""])
    Path(table.path).write_text(text, encoding="utf-8")
    print(text)
