"""A compiled pipeline as the cluster takes it, and the values of its parameters.

Not for making one (see `compile`), and it knows nothing of a cluster.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from reptile import __version__
from reptile.errors import InputError

# A backend refuses a document with a field that it does not know: up to 2.15, a task's security
# context.
FIRST_BACKEND = (2, 15)
"""The oldest release of Kubeflow Pipelines that the pipeline was tried on."""
SECURITY_BACKEND = (2, 16)
"""The first that knows all fields of the pipeline."""


@dataclass(frozen=True)
class Package:
    """A compiled pipeline: its name, its text, and the definitions of its parameters."""

    name: str
    text: bytes
    parameters: Mapping[str, Mapping[str, Any]]
    description: str
    loops: frozenset[str]  # parameters that are lists with a task for each item
    pods: Mapping[str, Mapping[str, Any]]  # what Kubernetes is to see to, by executor

    @property
    def sha256(self) -> str:
        """Hash of the text."""
        return hashlib.sha256(self.text).hexdigest()

    @property
    def backend(self) -> tuple[int, int]:
        """The first release of Kubeflow Pipelines whose servers take this pipeline."""
        secured = any("securityContext" in pod for pod in self.pods.values())
        return SECURITY_BACKEND if secured else FIRST_BACKEND

    @property
    def defaults(self) -> dict[str, Any]:
        """The values that parameters have if they are not given."""
        return {n: d["defaultValue"] for n, d in self.parameters.items() if "defaultValue" in d}

    def values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of a run's parameters, as far as they are given or have a default."""
        return {**self.defaults, **given}

    @property
    def version(self) -> str:
        """Name of the version on the cluster: this package's, and the start of the text's hash.

        Short enough for a label of Kubernetes, and for a column of Kubeflow's web page.
        """
        return f"{__version__}-{self.sha256[:12]}"


def load_package(path: Path, caching: bool | None = None) -> Package:
    """Read a compiled pipeline; `caching` overrides what it says for every task.

    Raises:
        InputError: there is no such file, or it is not a compiled pipeline.
    """
    try:
        text = path.read_bytes()
        documents = list(yaml.safe_load_all(text))
        spec = documents[0]
        name = spec["pipelineInfo"]["name"]
        description = spec["pipelineInfo"].get("description", "")
        platform = documents[1]["platforms"]["kubernetes"] if len(documents) > 1 else {}
        pods = platform.get("deploymentSpec", {}).get("executors", {})
        parameters = spec["root"].get("inputDefinitions", {}).get("parameters", {})
        graphs = [spec["root"], *spec.get("components", {}).values()]
        tasks = [t for g in graphs for t in g.get("dag", {}).get("tasks", {}).values()]
        items = [t["parameterIterator"]["items"] for t in tasks if "parameterIterator" in t]
        loops = {i.get("inputParameter", "").removeprefix("pipelinechannel--") for i in items}
        if caching is not None:
            # kfp.Client overrides tasks of the root alone, and nothing for an uploaded version;
            # the tasks in conditions, loops and exit handlers are in the components.
            for task in tasks:
                if "cachingOptions" in task:  # groups of tasks have none
                    task["cachingOptions"] = {"enableCache": True} if caching else {}
            text = yaml.safe_dump_all(documents).encode()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; run `python -m pipeline compile`") from None
    except (yaml.YAMLError, IndexError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{path}: not a compiled pipeline; make one with `python -m pipeline compile`"
        ) from None
    return Package(name, text, parameters, description, frozenset(loops & set(parameters)), pods)


def run_parameters(
    package: Package, given: Mapping[str, Any], *, complete: bool = True
) -> dict[str, Any]:
    """Return the given values in the types of the pipeline's definitions.

    A value for anything but a STRING may be text, which is read as JSON; a STRING may be a mapping
    or list, which is written as JSON.

    Raises:
        InputError: a name is not defined, a value is not of its type, or one that has no default is
            missing although the parameters are to be `complete`.
    """
    known = package.parameters
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InputError(
            f"pipeline {package.name} has no parameter {', '.join(unknown)}; it has "
            f"{', '.join(sorted(known)) or 'none'}"
        )
    missing = [n for n, d in known.items() if not d.get("isOptional") and n not in given]
    if missing and complete:
        raise InputError(
            f"pipeline {package.name} needs a value of {', '.join(sorted(missing))}; "
            f"give --param {min(missing)}=VALUE"
        )
    return {name: _typed(name, value, known[name]) for name, value in given.items()}


def without_volume(package: Package) -> Package:
    """Return the pipeline without its volume, which a store of unfinished training replaces.

    Kubeflow cannot mount a volume on a condition: it refuses a claim without a name.
    """
    spec, platform = yaml.safe_load_all(package.text)
    for task in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        task.pop("pvcMount", None)
    return replace(package, text=yaml.safe_dump_all([spec, platform]).encode())


def _typed(name: str, value: Any, definition: Mapping[str, Any]) -> Any:
    kind = definition["parameterType"]
    if kind == "STRING":
        if isinstance(value, (dict, list)):
            return json.dumps(value, allow_nan=False)
        if isinstance(value, str):
            return value
        raise InputError(f"parameter {name}: {value!r} is not text; put it in quotes")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise _mistyped(name, value, kind) from None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = {
        "NUMBER_INTEGER": number and isinstance(value, int),
        "NUMBER_DOUBLE": number and math.isfinite(value),
        "BOOLEAN": isinstance(value, bool),
        "LIST": isinstance(value, list),
        "STRUCT": isinstance(value, dict),
    }
    if not fits.get(kind, True):
        raise _mistyped(name, value, kind)
    return value


def _mistyped(name: str, value: Any, kind: str) -> InputError:
    wanted = {
        "NUMBER_INTEGER": "a whole number",
        "NUMBER_DOUBLE": "a finite number",
        "BOOLEAN": "true or false",
        "LIST": "a list, as JSON [...]",
        "STRUCT": "a mapping, as JSON {...}",
    }
    return InputError(f"parameter {name}: {value!r} is not {wanted[kind]}")
