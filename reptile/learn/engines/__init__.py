"""Running inner loops: one interface, three engines.

`eager` is the readable reference, `native` the compiled one for the CPU, `batched` the one for
CUDA; `select` chooses by the settings.
"""

from reptile.learn.engines.base import Adapted, Engine
from reptile.learn.engines.eager import EagerEngine
from reptile.learn.engines.select import choose_device, make_engine

__all__ = ["Adapted", "EagerEngine", "Engine", "choose_device", "make_engine"]
