"""What the checks of all learners share: sessions, groups of checks, files, golden cases, scores.

The other checks are in `parity`, `closed_form` and `values`.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
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
from reptile.data.dataset import PreparedData
from reptile.errors import InputError
from reptile.export.coding import coded_tensors, raw_tensors
from reptile.export.reference import Array, Tensors
from reptile.export.verify.conformance import Check, check_files, check_graph
from reptile.learn.checkpoint import Checkpoint
from reptile.objectives import Objective
from reptile.provenance import versions
from reptile.runtime import FewShotModel, FewShotRegressor
from reptile.settings import VerifySettings

SETTINGS = tuple(itertools.product((False, True), (1, 2)))  # optimised, threads
ROUNDING = 10  # times the error of eager float32, both measured against float64


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


@dataclass(frozen=True)
class Subject:
    """The bundle, and what it is compared with."""

    settings: VerifySettings
    folder: Path
    manifest: Manifest
    session: Sessions
    checkpoint: Checkpoint
    data: PreparedData

    @property
    def objective(self) -> Objective:
        """What its outputs are for."""
        return self.checkpoint.info.objective

    @property
    def adam(self) -> bool:
        """Whether its inner steps carry Adam's state."""
        settings = self.checkpoint.info.settings
        return not settings.closed_form and settings.optimizer.name == "adam"


AnySubject = TypeVar("AnySubject", bound=Subject)


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
    groups: Iterable[Callable[[AnySubject], Iterator[Check]]], subject: AnySubject
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


def conformance(subject: Subject) -> Iterator[Check]:
    """Check the form of the bundle's files and graphs; see `conformance`."""
    yield from check_files(subject.folder, subject.manifest)
    for graph in GRAPHS[subject.manifest.learner]:
        yield from check_graph(graph, subject.session.path(graph), subject.manifest, subject.adam)


def golden(subject: Subject) -> Iterator[Check]:
    """Run the golden tensors in plain onnxruntime, as any consumer would."""
    folder, manifest = subject.folder / GOLDEN_FOLDER, subject.manifest
    cases = parse_golden((folder / GOLDEN_FILE).read_bytes(), GOLDEN_FILE)
    covered = {case.graph for case in cases}
    missing = [f"no case of {name}" for name in GRAPHS[manifest.learner] if name not in covered]
    yield Check.none_of("golden tensors cover every graph", missing)
    worst, refusals = 0.0, 0
    for case in cases:
        feeds = {name: np.load(folder / file) for name, file in case.inputs.items()}
        actual = subject.session(case.graph).run(feeds)
        refusals += not actual.get("finite", True)
        for name, file in case.outputs.items():
            wanted = np.load(folder / file).astype(np.float64)
            allowed = case.atol + case.rtol * np.abs(wanted)
            excess = np.abs(actual[name] - wanted) / allowed
            worst = float(np.maximum(worst, excess.max(initial=0)))
    detail = "deviation as a share of the stated tolerance"
    yield Check.at_most("golden tensors are reproduced", worst, 1, detail)
    none = [] if refusals else ["no case whose finite is false"]
    yield Check.none_of("golden tensors hold a refused input", none)


def runtime(subject: Subject) -> Iterator[Check]:
    """Open the bundle with `reptile.runtime`, and run that runtime's self-check."""
    opened = FewShotRegressor if subject.manifest.kind == "regression" else FewShotModel
    opened.load(subject.folder).check()
    yield Check.none_of("the runtime loads the bundle", [])


def compare_answers(
    objective: Objective, answers: Iterable[tuple[Array, Array, Array]], limit: float
) -> Iterator[Check]:
    """Compare few-shot scores and outputs on the same tasks, ONNX against PyTorch.

    Args:
        objective: of the bundle.
        answers: of each task the outputs [Q, outputs] of ONNX and of PyTorch, and the targets.
        limit: of `Objective.disagreement`, on average.
    """
    scores, apart = [], []
    for onnx, eager, targets in answers:
        scores.append([objective.scores(outputs, targets) for outputs in (onnx, eager)])
        apart.append(objective.disagreement(onnx, eager))
    means = np.mean(scores, axis=0)
    interval = 1.96 * np.std(scores, axis=0, ddof=1)[1] / math.sqrt(len(scores))
    detail = (
        f"ONNX {means[0]:.5f}, PyTorch {means[1]:.5f} ± {interval:.5f} over {len(scores)} tasks"
    )
    name = f"few-shot {objective.title} within PyTorch's 95 % interval"
    yield Check.at_most(name, abs(means[0] - means[1]), interval, detail)
    name = f"{objective.disagreement_title} from PyTorch's"
    yield Check.at_most(name, float(np.mean(apart)), limit)
