"""Checks on a command that DVC runs: DVC must track the code and the data in use."""

import os
from pathlib import Path

from reptile.errors import InputError
from reptile.provenance import PACKAGE
from reptile.settings import PrepareSettings

NAMED_SOURCES = ("digits", "glyphs", "sinusoid")
"""Sources without files; the project has a file of each name, for DVC to depend on."""
FOLLOWED = Path("datasets")
"""dvc.yaml's dependency besides `prepare.source`: DVC cannot depend on the items of a list."""


def check_code() -> None:
    """Refuse to run other code than that next to the stage's dvc.yaml.

    Raises:
        InputError: another checkout or an installed package would run.
    """
    hashed = Path.cwd() / "reptile"  # a stage runs in its dvc.yaml's folder
    if "DVC_STAGE" in os.environ and hashed.is_dir() and hashed.resolve() != PACKAGE.resolve():
        raise InputError(
            f"DVC tracks the code in {hashed}, but {PACKAGE} would run; unset PYTHONSAFEPATH and "
            "PYTHONPATH, and let dvc.yaml run `python -m reptile`"
        )


def check_data(settings: PrepareSettings) -> None:
    """Refuse sources whose changes DVC would not see.

    Raises:
        InputError: `cross_domain` or `held_out` names a path that dvc.yaml does not depend on.
    """
    if "DVC_STAGE" not in os.environ:
        return
    used = {f"prepare.cross_domain = {source}": source for source in settings.cross_domain}
    if settings.held_out.endswith(".json"):
        used[f"prepare.held_out = {settings.held_out}"] = settings.held_out
    followed = [FOLLOWED.resolve(), Path(settings.source).resolve()]
    for setting, name in used.items():
        path = Path(name).resolve()
        if name not in NAMED_SOURCES and not any(path.is_relative_to(each) for each in followed):
            raise InputError(
                f"{setting}: DVC would not see its changes; put it into {FOLLOWED}/, or run "
                "`reptile prepare` without DVC"
            )
