"""Comparisons of learners, one file each: a dataset, tasks, and the settings of each learner."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from reptile.errors import InputError
from reptile.settings import (
    AnySection,
    BatchNormMode,
    EvaluateSettings,
    Positive,
    PrepareSettings,
    Section,
    TrainSettings,
    describe,
)

FOLDER = Path(__file__).parent


class Learner(Section):
    """What differs from the settings that all learners share."""

    train: dict[str, Any] = Field(default_factory=dict)
    """By default, `algorithm` is the learner's name."""
    evaluate: dict[str, Any] = Field(default_factory=dict)
    published: str = ""
    """The published result on such tasks, for the table."""


class ComparisonFile(Section):
    """A file of this folder, or a user's."""

    prepare: PrepareSettings = PrepareSettings()
    train: dict[str, Any] = Field(default_factory=dict)
    evaluate: dict[str, Any] = Field(default_factory=dict)
    ways: Positive = 5
    """Classes of a test task; 1 for values."""
    steps: tuple[Positive, ...] = ()
    """Numbers of steps at which learners of gradient steps are measured; empty: their
    evaluate.steps."""
    mode: BatchNormMode = "transductive"
    """What batch norm sees, of learners of gradient steps."""
    learners: dict[str, Learner]

    def training(self, name: str, **changes: Any) -> TrainSettings:
        """Return the settings of a learner's training.

        Raises:
            InputError: a setting is unknown or out of range.
        """
        own = self.learners[name].train
        values = _merged({"algorithm": name} | self.train, own) | changes
        return _checked(TrainSettings, values, f"learners.{name}.train")

    def evaluation(self, name: str) -> EvaluateSettings:
        """Return the settings of a learner's evaluation.

        Raises:
            InputError: a setting is unknown or out of range.
        """
        values = _merged(self.evaluate, self.learners[name].evaluate)
        return _checked(EvaluateSettings, values, f"learners.{name}.evaluate")


def load_comparison(name: str) -> ComparisonFile:
    """Read a comparison of this folder by its name, or any .yaml file by its path.

    Raises:
        InputError: there is none, or a setting is unknown or out of range.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = sorted(each.stem for each in FOLDER.glob("*.yaml"))
        near = get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise InputError(f"{name}: no such comparison; {hint} Or give a .yaml file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read as YAML: {reason}") from None
    return _checked(ComparisonFile, values, str(path))


def _checked(section: type[AnySection], values: Any, where: str) -> AnySection:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise InputError("\n".join(f"{where}: {line}" for line in describe(error))) from None


def _merged(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return `shared` with the values of `own`, also inside of sections."""
    merged = shared | own
    for key in shared.keys() & own.keys():
        if isinstance(shared[key], dict) and isinstance(own[key], dict):
            merged[key] = _merged(shared[key], own[key])
    return merged
