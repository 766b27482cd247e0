"""Reading a bundle: every byte is checked against the manifest before use.

For running graphs see `model`. The hashes detect damage and mix-ups, not forgery, which would
rewrite the manifest too: compare `Bundle.sha256` for that.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from reptile.bundle_format import (
    MANIFEST_FILE,
    MAX_FILE_BYTES,
    Manifest,
    TensorType,
    parse_manifest,
    show_tensors,
)
from reptile.errors import InputError
from reptile.runtime.constants import with_constants
from reptile.runtime.provider import open_session

_MAX_MANIFEST_BYTES = 1 << 20
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


@dataclass(frozen=True, kw_only=True)
class Bundle(Manifest):
    """A bundle with a valid manifest whose files all match it."""

    folder: Path
    sha256: str  # of manifest.json, which holds the hash of every other file

    @property
    def images_at_once(self) -> int:
        """How many images one run takes, which bounds its memory; they are independent."""
        return max(1, min(256, 2**21 // math.prod(self.image_shape)))

    def read(self, name: str) -> bytes:
        """Return the content of one listed file, checked against its hash.

        Raises:
            InputError: not listed, missing, outside the bundle, too large or changed.
        """
        digest = self.files.get(name)
        if digest is None:
            raise InputError(f"{self.folder}: manifest.json does not list the file {name!r}")
        content = _read(self.folder, name, MAX_FILE_BYTES)
        if hashlib.sha256(content).hexdigest() != digest:
            raise InputError(
                f"{self.folder / name} does not match its SHA-256 in manifest.json: "
                "the file was damaged or changed; fetch the bundle again"
            )
        return content

    def open(self, graph: str, *, threads: int, providers: Sequence[str] | None) -> Any:
        """Open a session on one graph and check it against the manifest.

        Raises:
            InputError: the file, the provider or a tensor's name or type is wrong.
        """
        expected = self.graphs[graph]
        session = open_session(
            self.read(expected.path), graph, threads=threads, providers=providers
        )
        for kind, nodes, listed in (
            ("inputs", session.get_inputs(), expected.inputs),
            ("outputs", session.get_outputs(), expected.outputs),
        ):
            actual = {
                node.name: TensorType.of(_DTYPES.get(node.type, node.type), node.shape)
                for node in nodes
            }
            if actual != listed:
                raise InputError(
                    f"{self.folder / expected.path}: manifest.json and the graph disagree on its "
                    f"{kind}: {show_tensors(listed)} against {show_tensors(actual)}; export the "
                    "bundle again"
                )
        return session

    def open_with(
        self,
        graph: str,
        constants: Mapping[str, npt.NDArray[Any]],
        *,
        threads: int,
        providers: Sequence[str] | None,
    ) -> Any:
        """Open a session on one graph with arrays for some of its inputs, as constants.

        Raises:
            InputError: as `open`, or the package onnx is absent.
        """
        content = with_constants(self.read(self.graphs[graph].path), constants)
        return open_session(content, graph, threads=threads, providers=providers)


def open_bundle(folder: Path) -> Bundle:
    """Read manifest.json and check every file it lists; files it does not list are never opened.

    Raises:
        InputError: anything missing, damaged, too large, outside the folder or invalid.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give the bundle that `reptile export` wrote")
    content = _read(folder, MANIFEST_FILE, _MAX_MANIFEST_BYTES)
    where = str(folder / MANIFEST_FILE)
    manifest = parse_manifest(content, where)
    bundle = Bundle(folder=folder, sha256=hashlib.sha256(content).hexdigest(), **vars(manifest))
    for name in bundle.files:
        bundle.read(name)
    return bundle


def _read(folder: Path, name: str, limit: int) -> bytes:
    path = folder / name
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name, re.ASCII) or ".." in name.split("/"):
        raise InputError(f"{folder}: {name!r} is not a plain relative path inside the bundle")
    try:
        if not path.is_file():
            raise InputError(f"{path} is missing: the bundle is not complete; fetch it again")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{path} links out of the bundle: copy the files themselves (cp -rL)")
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > limit:
        raise InputError(f"{path} is larger than {limit} bytes, the maximum")
    return content
