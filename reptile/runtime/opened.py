"""The common part of opened bundles, for classification and regression.

Tasks and their results are in `model` and `regressor`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from reptile.errors import InputError
from reptile.runtime.bundle import Bundle, open_bundle
from reptile.runtime.golden import check_golden

_RUN = {
    "gradient": ("adapt", "predict_adapted"),
    "closed_form": ("embed", "fit", "predict_adapted"),  # not `adapt`: its halves take any number
}


@dataclass(frozen=True, eq=False, repr=False)
class OpenedBundle:
    """A bundle opened in ONNX Runtime; immutable, and threads may share it."""

    bundle: Bundle
    _sessions: Mapping[str, Any]  # of its graphs, by name
    _options: dict[str, Any]

    kind: ClassVar[str]
    """The manifest's kind of the bundles that a class opens."""
    others: ClassVar[str]
    """The error message for bundles of the other kind."""

    @classmethod
    def load(
        cls, bundle: str | Path, *, threads: int = 1, providers: Sequence[str] | None = None
    ) -> Self:
        """Check every file of a bundle against its manifest and open it.

        Args:
            bundle: the folder that holds manifest.json.
            threads: threads one call may use; calls from several threads each use as many.
            providers: ONNX Runtime's execution providers by preference; None means CPU. Others
                have not been verified on hardware.

        Raises:
            InputError: a damaged or unknown bundle, one of the other kind, a provider that does
                not start, or no usable ONNX Runtime.
        """
        opened = open_bundle(Path(bundle))
        if opened.kind != cls.kind:
            raise InputError(f"{bundle} {cls.others}.load")
        options: dict[str, Any] = {"threads": threads, "providers": providers}
        sessions = {graph: opened.open(graph, **options) for graph in _RUN[opened.learner]}
        return cls(opened, sessions, options)

    @property
    def manifest(self) -> dict[str, Any]:
        """The bundle's manifest.json, unchanged."""
        return self.bundle.raw

    def check(self) -> float:
        """Run the bundle's golden cases here and return the largest absolute deviation.

        Raises:
            InputError: a deviation beyond a case's tolerance, or golden files that cannot be used.
        """
        return check_golden(self.bundle, **self._options)
