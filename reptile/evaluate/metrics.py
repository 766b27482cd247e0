"""metrics.json: what an evaluation leaves for whoever reads it."""

import json
from pathlib import Path
from typing import Any

from reptile.errors import InputError


def read_metrics(evaluation: Path) -> dict[str, Any]:
    """Read metrics.json of an evaluation folder."""
    return read_json(evaluation / "metrics.json")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of an evaluation folder that holds one JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run `reptile evaluate` first") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); run `reptile evaluate` again") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: not a JSON object; run `reptile evaluate` again")
    return dict(values)
