"""Few-shot learning with Reptile: meta-train, evaluate, export to ONNX, adapt anywhere.

    import reptile

    data = reptile.from_torch(dataset)                      # any torch Dataset of (input, label)
    trained = reptile.train(data, settings, module)         # any torch module, or none
    print(trained.evaluate(data).table())
    trained.save("checkpoint")                              # reptile.load("checkpoint", module)
    trained.export("bundle", data)                          # adapts inside ONNX Runtime

Importing `reptile` does not change the process and loads no other package; each name below loads
what it needs on first use. A consumer of a bundle imports `reptile.runtime`, which needs numpy and
onnxruntime only.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from reptile.api import Initialisation, load, train
    from reptile.data.arrays import from_arrays, from_torch
    from reptile.data.dataset import PreparedData, load_prepared
    from reptile.errors import (
        ClusterError,
        DivergedError,
        GateError,
        InputError,
        PlatformError,
        ReptileError,
        VerificationError,
    )
    from reptile.runtime import FewShotModel, FewShotRegressor
    from reptile.settings import (
        EvaluateSettings,
        ExportSettings,
        ModelSettings,
        OptimizerSettings,
        TrainSettings,
        VerifySettings,
    )

__all__ = [
    "ClusterError",
    "DivergedError",
    "EvaluateSettings",
    "ExportSettings",
    "FewShotModel",
    "FewShotRegressor",
    "GateError",
    "Initialisation",
    "InputError",
    "ModelSettings",
    "OptimizerSettings",
    "PlatformError",
    "PreparedData",
    "ReptileError",
    "TrainSettings",
    "VerificationError",
    "VerifySettings",
    "from_arrays",
    "from_torch",
    "load",
    "load_prepared",
    "train",
]

_HOMES = {
    "reptile.api": ("Initialisation", "load", "train"),
    "reptile.data.arrays": ("from_arrays", "from_torch"),
    "reptile.data.dataset": ("PreparedData", "load_prepared"),
    "reptile.errors": tuple(name for name in __all__ if name.endswith("Error")),
    "reptile.runtime": ("FewShotModel", "FewShotRegressor"),
    "reptile.settings": tuple(name for name in __all__ if name.endswith("Settings")),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'reptile' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
