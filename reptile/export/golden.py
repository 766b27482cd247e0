"""Golden cases: a graph's inputs, and the outputs that eager PyTorch gives for them in float64.

Which tasks they are of is in `write` and `closed_form_golden`.
"""

import math
from pathlib import Path

import numpy as np

from reptile.bundle_format import GOLDEN_FILE, GoldenCase, golden_json
from reptile.export.reference import Tensors
from reptile.files import write_json

ATOL, RTOL = 1e-4, 1e-4  # well above float32 rounding, well below any fault's effect
MAX_TOLERANCE = 1e-2  # a tolerance this wide says nothing


class Golden:
    """Collects golden cases; a tensor used twice is stored once.

    Each case's tolerance is ten times what eager float32 deviates from float64, so it allows
    rounding and no more; a case so unstable that this says nothing is left out.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cases: list[GoldenCase] = []

    def add(self, graph: str, name: str, feeds: Tensors, single: Tensors, double: Tensors) -> None:
        """Add a case.

        Args:
            graph: its name.
            name: of the folder for its tensors.
            feeds: the graph's inputs.
            single: its outputs in eager float32.
            double: its outputs in eager float64, which are stored; others, such as `finite`, as
                they are.
        """
        # Relative where values are large, as masked outputs are: there `rtol` allows for rounding.
        deviation = max(
            float((np.abs(single[key] - want) / np.maximum(1, np.abs(want))).max(initial=0))
            for key, want in double.items()
            if key in single
        )
        tolerance = max(ATOL, 10.0 ** math.ceil(math.log10(10 * deviation + 1e-30)))
        if tolerance > MAX_TOLERANCE:
            return
        inputs = self._store(name, feeds)
        case = GoldenCase(graph, inputs, self._store(name, double), tolerance, RTOL)
        self._cases.append(case)

    def refuse(self, graph: str, name: str, feeds: Tensors) -> None:
        """Add a case whose only output is that the numbers are not finite."""
        outputs = self._store(name, {"finite": np.array(False)})
        self._cases.append(GoldenCase(graph, self._store(name, feeds), outputs, ATOL, RTOL))

    def close(self) -> None:
        """Write the index of the cases."""
        write_json(self._folder / GOLDEN_FILE, golden_json(self._cases))

    def _store(self, name: str, tensors: Tensors) -> dict[str, str]:
        files = {key: f"{name}/{key}.npy" for key in tensors}
        for key, value in tensors.items():
            path = self._folder / files[key]
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, value.astype(np.float32) if value.dtype == np.float64 else value)
        return files
