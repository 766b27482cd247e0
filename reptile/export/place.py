"""Which part of a module an operator comes from, in its forward pass or the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode


class Place(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the parts of a module as they run, and every operator.

    A backward operator belongs to the part during whose forward pass autograd counted the node that
    it computes.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: dict[OpOverload, str] = {}
        """The part in which each operator ran first."""
        self.last = ""
        """The part in which the last operator ran."""
        self._names = {
            part: f"{name} ({type(part).__name__})" if name else ""
            for name, part in module.named_modules()
        }
        self._running: list[tuple[str, int]] = []
        self._ran: list[tuple[int, int, str]] = []  # autograd's counts before and after a part

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Follow what runs; operators only where `self` is entered as a mode too."""
        enter: Callable[..., Any] = hooks.register_module_forward_pre_hook
        leave: Callable[..., Any] = hooks.register_module_forward_hook
        handles = enter(self._enter), leave(self._leave)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Note the operator and run it."""
        self.last = self._now()
        if self.last:
            self.operators.setdefault(operator, self.last)
        return operator(*args, **(kwargs or {}))

    def _enter(self, part: nn.Module, _: Any) -> None:
        if part in self._names:
            self.last = self._names[part]
            self._running.append((self.last, _count()))

    def _leave(self, part: nn.Module, *_: Any) -> None:
        if part in self._names:
            name, start = self._running.pop()
            self._ran.append((start, _count(), name))

    def _now(self) -> str:
        node = torch._C._current_autograd_node()
        if node is None:
            return self._running[-1][0] if self._running else ""
        number = node._sequence_nr()
        around = [(end - start, name) for start, end, name in self._ran if start <= number < end]
        return min(around)[1] if around else ""


def _count() -> int:
    return torch._C._autograd._get_sequence_nr()
