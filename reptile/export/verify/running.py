"""What the checks of all learners share: sessions, groups of checks, golden cases.

What is checked is in `parity`, `closed_form` and `values`.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnxruntime as ort

from reptile.bundle_format import (
    GOLDEN_FILE,
    GOLDEN_FOLDER,
    GRAPHS,
    MANIFEST_FILE,
    Manifest,
    parse_golden,
    parse_manifest,
)
from reptile.data.coding import Coding, NumberCoding
from reptile.errors import InputError
from reptile.export.coding import coded_tensors, raw_tensors
from reptile.export.reference import Array, Tensors
from reptile.export.verify.conformance import Check
from reptile.provenance import versions

SETTINGS = tuple(itertools.product((False, True), (1, 2)))  # optimised, threads
ROUNDING = 10  # times the error of eager float32, both measured against float64

Subject = TypeVar("Subject")


class Session:
    """An onnxruntime session that runs by names.

    Of a table, on coded tensors: what goes in and comes out of the graph is raw.
    """

    def __init__(
        self, path: Path, optimised: bool, threads: int, coding: Coding | None = None
    ) -> None:
        self._coding = coding
        options, levels = ort.SessionOptions(), ort.GraphOptimizationLevel
        options.graph_optimization_level = (
            levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
        )
        options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(
            path.read_bytes(), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, feeds: Tensors) -> Tensors:
        """Run it."""
        if self._coding is None:
            return self.run(feeds)
        return coded_tensors(self.run(raw_tensors(feeds, self._coding)), self._coding)

    def run(self, feeds: Tensors) -> Tensors:
        """Run it on the graph's tensors as they are."""
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, feeds), strict=True))


class Sessions:
    """The sessions of a bundle's graphs, each opened once."""

    def __init__(self, folder: Path, manifest: Manifest, coding: Coding | None = None) -> None:
        self._folder, self._manifest = folder, manifest
        # Bundles of earlier versions take coded rows.
        self.coding = coding if manifest.columns else None
        self._open: dict[tuple[str, bool, int], Session] = {}

    def path(self, graph: str) -> Path:
        """Return a graph's file."""
        return self._folder / self._manifest.graphs[graph].path

    def __call__(self, graph: str, optimised: bool = True, threads: int = 1) -> Session:
        """Return the session of a graph."""
        key = graph, optimised, threads
        if key not in self._open:
            self._open[key] = Session(self.path(graph), optimised, threads, self.coding)
        return self._open[key]

    def possible(self, inputs: Array) -> Array:
        """Return the nearest inputs that rows can have: a category is one of its list, or other."""
        return inputs if self.coding is None else self.coding.encode_rows(self.coding.rows(inputs))

    @property
    def bad_input(self) -> float | None:
        """What must not be reported as a success; NaN is missing in a row. None: nothing is."""
        if self.coding is None:
            return math.nan
        numbers = any(isinstance(each, NumberCoding) for each in self.coding.inputs)
        return math.inf if numbers else None


def setting(optimised: bool, threads: int) -> str:
    """Name one of `SETTINGS`."""
    return f"optimisation {'on' if optimised else 'off'}, {threads} threads"


def read_manifest(bundle: Path) -> Manifest:
    """Read a bundle's manifest.

    Raises:
        InputError: there is none.
    """
    path = bundle / MANIFEST_FILE
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{bundle}: no manifest ({error}); run `reptile export` first") from None


def run_checks(
    groups: Iterable[Callable[[Subject], Iterator[Check]]], subject: Subject
) -> dict[str, Any]:
    """Return {"passed": bool, "checks": [{"name", "passed", "measured", …}], "versions": {…}}."""
    checks: list[Check] = []
    for group in groups:
        try:
            checks += group(subject)
        except Exception as error:  # an exception in a check is a failure
            name = group.__name__.strip("_").replace("_", " ")
            checks.append(Check.none_of(f"{name} can be checked", [repr(error)]))
    return {
        "passed": all(check.passed for check in checks),
        "checks": [check._asdict() for check in checks],
        "versions": versions("torch", "onnx") | {"onnxruntime": ort.__version__},
    }


def check_golden(folder: Path, manifest: Manifest, sessions: Sessions) -> Iterator[Check]:
    """Run the golden tensors in plain onnxruntime, as any consumer would."""
    golden = folder / GOLDEN_FOLDER
    cases = parse_golden((golden / GOLDEN_FILE).read_bytes(), GOLDEN_FILE)
    covered = {case.graph for case in cases}
    missing = [f"no case of {name}" for name in GRAPHS[manifest.learner] if name not in covered]
    yield Check.none_of("golden tensors cover every graph", missing)
    worst, refusals = 0.0, 0
    for case in cases:
        feeds = {name: np.load(golden / file) for name, file in case.inputs.items()}
        actual = sessions(case.graph).run(feeds)
        refusals += not actual.get("finite", True)
        for name, file in case.outputs.items():
            wanted = np.load(golden / file).astype(np.float64)
            allowed = case.atol + case.rtol * np.abs(wanted)
            excess = np.abs(actual[name] - wanted) / allowed
            worst = float(np.maximum(worst, excess.max(initial=0)))
    detail = "deviation as a share of the stated tolerance"
    yield Check.at_most("golden tensors are reproduced", worst, 1, detail)
    none = [] if refusals else ["no case whose finite is false"]
    yield Check.none_of("golden tensors hold a refused input", none)
