"""Checks on a command that DVC runs: DVC must track the code and the data in use."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from reptile.errors import InputError
from reptile.provenance import PACKAGE
from reptile.settings import PrepareSettings, TrainSettings

NAMED_SOURCES = ("digits", "glyphs", "sinusoid")
"""Sources without files; the project has a file of each name, for DVC to depend on."""
FOLLOWED = Path("datasets")
"""dvc.yaml's dependency besides `prepare.source`: DVC cannot depend on the items of a list."""
REBUILDING = ("evaluate", "export", "verify")
"""Stages that build the network of a checkpoint again."""


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


def check_networks(settings: TrainSettings) -> None:
    """Refuse weights and code of networks whose changes DVC would not see.

    Raises:
        InputError: a file of weights, or a module in the working directory, that is no dependency
            of the stage in dvc.yaml; a module also of the stages that build the network again.
    """
    file = Path("dvc.yaml")  # a stage runs in its folder
    if "DVC_STAGE" not in os.environ or not file.is_file():
        return
    stages = yaml.safe_load(file.read_text(encoding="utf-8"))["stages"]
    stage = os.environ["DVC_STAGE"]
    for network in settings.model.towers or (settings.model,):
        if Path(network.weights).suffix:
            setting = f"train.model.weights = {network.weights}"
            _refuse_unseen(setting, Path(network.weights), stages, [stage])
        package = network.name.removeprefix("module:").rpartition(".")[0]
        source = _source(package) if network.name.startswith("module:") else None
        if source and source.is_relative_to(Path.cwd()) and "site-packages" not in source.parts:
            setting = f"train.model.name = {network.name}"
            _refuse_unseen(setting, source, stages, [stage, *REBUILDING])


def _source(package: str) -> Path | None:
    try:
        spec = find_spec(package)
    except ModuleNotFoundError:  # as building the network will say
        return None
    return Path(spec.origin).resolve() if spec and spec.origin else None


def _refuse_unseen(setting: str, path: Path, stages: dict[str, Any], names: list[str]) -> None:
    path = path.resolve()
    blind = [
        name
        for name in names
        if name in stages
        and not any(
            path.is_relative_to(Path(dep).resolve()) for dep in stages[name].get("deps", ())
        )
    ]
    if blind:
        shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        raise InputError(
            f"{setting}: DVC would not see changes of {shown}; add it to the deps of "
            f"{', '.join(blind)} in dvc.yaml, or run `reptile train` without DVC"
        )
