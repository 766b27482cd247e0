"""Running inner loops: one interface, three engines.

`eager` is the readable one and the oracle, `native` the compiled one for the CPU, `batched` the one
for CUDA; `select` takes the one that the settings name.
"""

from reptile.learn.engines.base import Adapted, Engine
from reptile.learn.engines.eager import EagerEngine
from reptile.learn.engines.select import choose_device, make_engine

__all__ = ["Adapted", "EagerEngine", "Engine", "choose_device", "make_engine"]
