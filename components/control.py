"""What joins the stages: the gate, the table of points, and what the run was made of."""

from kfp.dsl import Input, Markdown, Metrics, Model, Output

from components.image import component


@component
def gate(
    settings: str,
    champion: str,
    checkpoint: Input[Model],
    evaluation: Input[Metrics],
    verdict: Output[Markdown],
) -> None:
    """Fail, with the reason, unless the checkpoint may be exported.

    A failure rather than a condition: it ends the run on every backend, and its reason is the end
    of its log, which is all that a backend tells whoever waits.
    """
    from pathlib import Path

    from components import artifacts

    passed, reason = artifacts.gate(settings, champion, checkpoint, evaluation)
    Path(verdict.path).write_text("passed" if passed else reason, encoding="utf-8")
    if not passed:
        raise SystemExit(f"refused by the gate: {reason}")


@component
def summarise(
    data_revision: str, data_md5: str, git_commit: str, image: str, summary: Output[Markdown]
) -> None:
    """Write what the run was made of.

    Not how it ended: the state that a backend gives an exit handler is wrong after most runs.
    """
    from pathlib import Path

    rows = {
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
