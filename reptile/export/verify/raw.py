"""A check that a bundle codes raw rows as `data.coding` does, with gaps and unknown categories."""

from collections.abc import Callable, Iterator

import numpy as np

from reptile.data.coding import Coding, NumberCoding
from reptile.export.coding import coded_tensors
from reptile.export.reference import Array
from reptile.export.verify.conformance import Check
from reptile.export.verify.running import ROUNDING, SETTINGS, Sessions, setting

EXACT = 1e-5  # beyond rounding


def check_raw_rows(
    sessions: Sessions, graph: str, output: str, eager: Callable[[Array, bool], Array]
) -> Iterator[Check]:
    """Compare a graph of rows alone with eager PyTorch on what `Coding.encode_inputs` returns.

    Args:
        sessions: of the bundle.
        graph: its name.
        output: what is compared.
        eager: from coded inputs [N, D], and whether to compute in float64, to that output.
    """
    coding = sessions.coding
    if coding is None:
        return
    rows, columns = _rows(coding)
    coded = coding.encode_inputs(columns)
    wanted = eager(coded, True)
    largest = max(1.0, float(np.abs(wanted).max()))
    rounding = float(np.abs(eager(coded, False) - wanted).max()) / largest
    for optimised, threads in SETTINGS:
        found = sessions(graph, optimised, threads).run({"images": rows})
        error = float(np.abs(coded_tensors(found, coding)[output] - wanted).max()) / largest
        name = f"{graph} of raw rows equals coding and eager PyTorch, {setting(optimised, threads)}"
        yield Check.at_most(name, error, ROUNDING * rounding + EXACT)


def _rows(coding: Coding) -> tuple[Array, dict[str, Array]]:
    """Return rows as the graph takes them, and the same as columns that `Coding` takes.

    Each column has values about its mean, or every category; each is missing once, and each
    category unknown in three ways.
    """
    rng, size = np.random.default_rng(0), 4
    for each in coding.inputs:
        size = max(size, each.width + 4)
    rows, columns = [], {}
    for place, each in enumerate(coding.inputs):
        if isinstance(each, NumberCoding):
            numbers = each.mean + each.deviation * rng.normal(size=size)
            numbers[place % size] = np.nan
            rows.append(numbers)
            columns[each.column] = numbers
        else:
            known, most = list(each.categories), len(each.categories)
            names = np.resize(np.array([*known, None, None, None, None], dtype=object), size)
            places = np.resize(np.array([*range(most), -1, 0.5, most + 7, np.nan]), size)
            rows.append(places)
            columns[each.column] = names
    return np.stack(rows, axis=1).astype(np.float64), columns
