"""The candidates of a sweep: every combination of the settings that were given several values."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import yaml

from reptile.errors import InputError
from reptile.settings import Settings, load_settings


def candidates(params: Path, changes: Sequence[str]) -> list[Settings]:
    """Return the settings of each candidate, in the order of the values.

    They differ in the section `train` alone, as all candidates are trained on the same data, and
    only the best of them is evaluated.

    Args:
        params: file of settings.
        changes: such as `train.meta_step=0.5,1.0`, values separated by commas.

    Raises:
        InputError: a setting is wrong, several values are given to one of another section, there
            are fewer than two candidates, or there is nothing to choose by.
    """
    choices = [_each_value(change) for change in changes]
    for several in choices:
        name = several[0].partition("=")[0]
        if len(several) > 1 and not name.startswith("train."):
            raise InputError(
                f"--set {name}: several values; a sweep varies settings of `train`, as its "
                "candidates share the data and the best is evaluated once; give it one value"
            )
    found: list[Settings] = []
    for combination in product(*choices):
        settings = load_settings(params, combination)
        if settings not in found:
            found.append(settings)
    if found[0].prepare.validation == 0:
        raise InputError(
            "prepare.validation = 0: a sweep chooses by the validation split; hold out some of it"
        )
    if len(found) < 2:
        raise InputError(
            "a sweep needs two candidates or more; give a setting several values, such as "
            "--set train.meta_step=0.5,1.0"
        )
    return found


def _each_value(change: str) -> list[str]:
    """Split `name=1,2` into `name=1` and `name=2`; commas within brackets separate nothing."""
    name, equals, text = change.partition("=")
    try:
        values = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        values = []
    if not equals or not isinstance(values, list) or len(values) < 2:
        return [change]  # one value, or a mistake that the settings explain
    return [
        f"{name}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"
        for value in values
    ]
