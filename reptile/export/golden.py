"""Golden cases: a graph's inputs, and the outputs that eager PyTorch gives for them in float64.

Which tasks they are of is in `write` and `closed_form_golden`.
"""

import math
from pathlib import Path

import numpy as np

from reptile.bundle_format import GOLDEN_FILE, MAX_ATOL, GoldenCase, golden_json
from reptile.data.coding import Coding
from reptile.export.coding import raw_tensors
from reptile.export.reference import Tensors
from reptile.files import write_json

ATOL, RTOL = 1e-4, 1e-4  # well above float32 rounding, well below any fault's effect
MAX_TOLERANCE = 1e-2  # a tolerance this wide says nothing


class Golden:
    """Collects golden cases; a tensor used twice is stored once.

    Each case's tolerance is ten times what eager float32 deviates from float64, so it allows
    rounding and no more; a case so unstable that this says nothing is left out.
    """

    def __init__(self, folder: Path, coding: Coding | None = None) -> None:
        self._folder, self._coding = folder, coding
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

        Of a table, tensors are given as they are coded, and stored raw. Each output in the units of
        its column is a case of its own, with the tolerance in these units.
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
        inputs, outputs = self._store(name, feeds), self._store(name, double)
        units = self._units(double)
        for output, unit in units.items():
            one = {output: outputs.pop(output)}
            self._cases.append(
                GoldenCase(graph, inputs, one, min(MAX_ATOL, tolerance * unit), RTOL)
            )
        if outputs:
            self._cases.append(GoldenCase(graph, inputs, outputs, tolerance, RTOL))

    def refuse(self, graph: str, name: str, feeds: Tensors) -> None:
        """Add a case whose only output is that the numbers are not finite."""
        outputs = self._store(name, {"finite": np.array(False)})
        self._cases.append(GoldenCase(graph, self._store(name, feeds), outputs, ATOL, RTOL))

    def close(self) -> None:
        """Write the index of the cases."""
        write_json(self._folder / GOLDEN_FILE, golden_json(self._cases))

    def _units(self, outputs: Tensors) -> dict[str, float]:
        """Return the unit of each output that is stored in a table's: the largest of several."""
        if not self._coding or not self._coding.targets:
            return {}
        deviation = float(self._coding.deviations.max())
        units = {"logits": deviation, "variance": deviation**2}
        return {name: unit for name, unit in units.items() if name in outputs}

    def _store(self, name: str, tensors: Tensors) -> dict[str, str]:
        files = {key: f"{name}/{key}.npy" for key in tensors}
        raw = {} if self._coding is None else raw_tensors(tensors, self._coding)
        for key, value in tensors.items():
            path = self._folder / files[key]
            path.parent.mkdir(parents=True, exist_ok=True)
            if key in raw and raw[key] is not value:
                value = raw[key]
            elif value.dtype == np.float64:
                value = value.astype(np.float32)
            np.save(path, np.asarray(value, order="C"))  # as readers in other languages expect
        return files
