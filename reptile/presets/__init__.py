"""Settings of published experiments, one file each in the layout of params.yaml.

A file holds what differs from the defaults, and as `paper` what it reproduces. Not for settings of
one's own: those belong into a params.yaml.
"""

import shlex
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from reptile.config import Settings, load_settings
from reptile.errors import InputError

FOLDER = Path(__file__).parent


def preset_names() -> list[str]:
    """Return the names of all presets, in the order of the alphabet."""
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


def dvc_command(preset: Settings, params: Path) -> str:
    """Return the `dvc exp run` that gives every stage the settings of a preset.

    Args:
        preset: the settings to reach.
        params: the params.yaml that DVC changes; what it has as the preset wants is left out.

    Raises:
        InputError: the file is no valid params.yaml.
    """
    present = load_settings(params)
    written = set(dict(_leaves(yaml.safe_load(params.read_text(encoding="utf-8")) or {})))
    now = dict(_leaves(present.stages()))
    options = [
        f"-S {shlex.quote(f'{_add(name, written)}{name}={_hydra(value)}')}"
        for name, value in _leaves(preset.stages())
        if value != now[name]
    ]
    return " ".join(["dvc exp run", *options])


def changes(settings: Settings, preset: Settings) -> dict[str, tuple[Any, Any]]:
    """Return each setting that is not the preset's, as (here, in the preset)."""
    there = dict(_leaves(preset.stages()))
    return {
        name: (value, there[name])
        for name, value in _leaves(settings.stages())
        if value != there[name]
    }


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _add(name: str, written: set[str]) -> str:
    """Return what DVC wants before a setting: it changes what is written, and adds with `+`."""
    return "" if name in written else "+"


def _hydra(value: Any) -> str:
    """Write a value so that DVC reads it as YAML would have."""
    if isinstance(value, list):
        return f"[{','.join(map(_hydra, value))}]"
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    return str(value)
