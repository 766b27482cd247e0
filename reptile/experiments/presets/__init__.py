"""Settings of published experiments, one file each in the layout of params.yaml.

A file holds the settings that differ from the defaults, and as `paper` what it reproduces. A user's
settings belong in a params.yaml.
"""

import shlex
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import Field
from rich import box
from rich.table import Table

from reptile.errors import InputError
from reptile.settings import BatchNormMode, Section, Settings, load_settings

FOLDER = Path(__file__).parent
PUBLISHED_MODES: tuple[BatchNormMode, ...] = ("transductive", "non_transductive")


class PaperRow(Section):
    """What a preset reproduces, and the published accuracy."""

    row: str = ""
    source: str = ""
    """The publication."""
    accuracy: dict[BatchNormMode, tuple[float, float]] = Field(default_factory=dict)
    """Per cent, and half the width of the interval, on the held-out classes at the fewest shots."""

    def show(self, mode: BatchNormMode) -> str:
        """Format the published accuracy for a mode; empty if there is none."""
        if mode not in self.accuracy:
            return ""
        mean, interval = self.accuracy[mode]
        return f"{mean:.2f} ± {interval:.2f}"


class Preset(NamedTuple):
    """One preset as in its file."""

    name: str
    settings: Settings
    paper: PaperRow


def preset_names() -> list[str]:
    """Return the names of all presets, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def preset_path(name: str) -> Path:
    """Return the file of a preset.

    Raises:
        InputError: there is none of this name.
    """
    names = preset_names()
    if name not in names:
        near = get_close_matches(name, names, 3, 0.5) or names
        raise InputError(
            f"no preset {name!r}; `reptile presets` lists them; like it: {', '.join(near)}"
        )
    return FOLDER / f"{name}.yaml"


def load_preset(name: str) -> Preset:
    """Read a preset.

    Raises:
        InputError: there is none of this name.
    """
    path = preset_path(name)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return Preset(name, load_settings(path), PaperRow.model_validate(values.get("paper", {})))


def presets_table() -> Table:
    """Return what the presets reproduce, and the published accuracies."""
    title = "presets; published accuracy, %"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column("preset", no_wrap=True)
    table.add_column("reproduces", no_wrap=True)
    for mode in PUBLISHED_MODES:
        table.add_column(mode.replace("_", "-\n"), justify="right", no_wrap=True, vertical="bottom")
    for name in preset_names():
        paper = load_preset(name).paper
        table.add_row(name, paper.row, *map(paper.show, PUBLISHED_MODES))
    return table


def dvc_command(preset: Settings, params: Path) -> str:
    """Return the `dvc exp run` that gives every stage the settings of a preset.

    Args:
        preset: the settings to reach.
        params: the params.yaml that DVC changes; settings that already match are omitted.

    Raises:
        InputError: the file is no valid params.yaml.
    """
    present = load_settings(params)
    written = set(dict(_leaves(yaml.safe_load(params.read_text(encoding="utf-8")) or {})))
    now = dict(_leaves(present.model_dump(mode="json")))
    options = [
        f"-S {shlex.quote(f'{_add(name, written)}{name}={_hydra(value)}')}"
        for name, value in _leaves(preset.model_dump(mode="json"))
        if value != now[name]
    ]
    return " ".join(["dvc exp run", *options])


def changes(settings: Settings, preset: Settings) -> dict[str, tuple[Any, Any]]:
    """Return each setting that differs from the preset, as (here, in the preset)."""
    there = dict(_leaves(preset.model_dump(mode="json")))
    return {
        name: (value, there[name])
        for name, value in _leaves(settings.model_dump(mode="json"))
        if value != there[name]
    }


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _add(name: str, written: set[str]) -> str:
    """Return DVC's prefix for a setting: none to change an existing one, `+` to add one."""
    return "" if name in written else "+"


def _hydra(value: Any) -> str:
    """Write a value so that DVC reads it as YAML would have."""
    if isinstance(value, list):
        return f"[{','.join(map(_inside, value))}]"
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    return str(value)


def _inside(value: Any) -> str:
    """Write a value of a list."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}:{_inside(each)}' for name, each in value.items())}}}"
    return f"'{value}'" if isinstance(value, str) else _hydra(value)
