"""The bundle's self-check: known inputs through its graphs, compared with known outputs.

Not a test of accuracy: it detects a machine or an ONNX Runtime whose results differ from the
exporter's.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from reptile.bundle_format import GOLDEN_FILE, GOLDEN_FOLDER, parse_golden
from reptile.errors import InputError
from reptile.runtime.bundle import Bundle

_INDEX = f"{GOLDEN_FOLDER}/{GOLDEN_FILE}"


def check_golden(
    bundle: Bundle, *, threads: int = 1, providers: Sequence[str] | None = None
) -> float:
    """Run every case of golden/golden.json and return the largest absolute deviation.

    Raises:
        InputError: files that cannot be used, or a deviation beyond a case's tolerance.
    """
    sessions: dict[str, Any] = {}
    largest = 0.0
    for case in parse_golden(bundle.read(_INDEX), _INDEX):
        if case.graph not in bundle.graphs:
            raise InputError(f"{_INDEX}: there is no graph {case.graph!r}; export the bundle again")
        if case.graph not in sessions:
            sessions[case.graph] = bundle.open(case.graph, threads=threads, providers=providers)
        inputs = {name: _array(bundle, file) for name, file in case.inputs.items()}
        wanted = {name: _array(bundle, file) for name, file in case.outputs.items()}
        actual = sessions[case.graph].run(list(wanted), inputs)
        for (name, want), got in zip(wanted.items(), actual, strict=True):
            what = f"graph {case.graph!r}, output {name!r}"
            largest = max(largest, _deviation(got, want, case.atol, case.rtol, what))
    return largest


def _array(bundle: Bundle, file: str) -> npt.NDArray[Any]:
    try:
        return np.asarray(
            np.load(io.BytesIO(bundle.read(f"{GOLDEN_FOLDER}/{file}")), allow_pickle=False)
        )
    except (ValueError, EOFError) as error:
        raise InputError(f"golden/{file} is not a .npy file: {error}") from error


def _deviation(
    got: npt.NDArray[Any], want: npt.NDArray[Any], atol: float, rtol: float, what: str
) -> float:
    if got.shape != want.shape or got.dtype != want.dtype:
        raise InputError(
            f"{what}: got {got.dtype} {got.shape}, expected {want.dtype} {want.shape}: "
            "export the bundle again"
        )
    reference = want.astype(np.float64)
    difference = np.abs(got.astype(np.float64) - reference)
    if not (difference <= atol + rtol * np.abs(reference)).all():  # so that NaN fails too
        raise InputError(
            f"{what} deviates by {difference.max():.3g}, beyond atol {atol:g} + rtol {rtol:g}: "
            "this machine or ONNX Runtime computes other results than the exporter; "
            "try another onnxruntime version or provider"
        )
    return float(difference.max(initial=0.0))
