"""What must hold where DVC runs a command: that it knows the code and the data that are used."""

import os
from pathlib import Path

from reptile.errors import InputError
from reptile.provenance import PACKAGE
from reptile.settings import PrepareSettings

NAMED_SOURCES = ("digits", "glyphs", "sinusoid")
"""Sources without files; the project has a file of each name, for DVC to depend on."""
FOLLOWED = Path("datasets")
"""What dvc.yaml depends on for `prepare.cross_domain`, a list, which DVC cannot depend on."""


def check_code() -> None:
    """Refuse to run other code than that beside the dvc.yaml whose stage this is.

    Raises:
        InputError: another checkout or an installed package would run.
    """
    root = os.environ.get("DVC_ROOT")
    if root is None or not (hashed := Path(root, "reptile")).is_dir():
        return
    if hashed.resolve() != PACKAGE.resolve():
        raise InputError(
            f"DVC knows the code in {hashed}, but {PACKAGE} would run; unset PYTHONSAFEPATH and "
            "PYTHONPATH, and let dvc.yaml run `python -m reptile`"
        )


def check_data(settings: PrepareSettings) -> None:
    """Refuse sources whose changes DVC would not see.

    Raises:
        InputError: `cross_domain` names a path outside the folder that dvc.yaml depends on.
    """
    if "DVC_STAGE" not in os.environ:
        return
    followed = [FOLLOWED.resolve(), Path(settings.source).resolve()]
    for source in settings.cross_domain:
        path = Path(source).resolve()
        if source not in NAMED_SOURCES and not any(path.is_relative_to(each) for each in followed):
            raise InputError(
                f"prepare.cross_domain = {source}: DVC would not see its changes; put it into "
                f"{FOLLOWED}/, or run `reptile prepare` without DVC"
            )
