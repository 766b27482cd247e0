"""One training in several processes, as torchrun starts them: their ranks, and sharing of tasks.

Every process holds the same state and does the same arithmetic; only the tasks of a call are
divided, and their results gathered in order. So the result is that of one process.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from reptile.errors import PlatformError
from reptile.learn.engines.base import Adapted, Engine, adapt_each
from reptile.learn.optimizer import OptimizerState
from reptile.minibatches import IntArray
from reptile.models import Statistics
from reptile.settings import BatchNormMode
from reptile.tasks import Task

COLLECTIVE_TIMEOUT = timedelta(minutes=5)  # wait for an unresponsive process


class Processes(NamedTuple):
    """This process's place among those of one run."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the run's files and talks to people."""
        return self.rank == 0

    def share(self, engine: Engine) -> Engine:
        """Return an engine that shares the tasks of each call among all processes."""
        return engine if self.size == 1 else SharedEngine(engine, self)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Return the tensor of one process; all hold one of the same shape.

        Raises:
            PlatformError: another process was lost.
        """
        if self.size > 1:
            self._collective(lambda: dist.broadcast(tensor, source))
        return tensor

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return whether any process says so.

        Raises:
            PlatformError: another process was lost.
        """
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag), device=device)
        self._collective(lambda: dist.all_reduce(flags, dist.ReduceOp.MAX))
        return bool(flags)

    def tell(self, text: str, device: torch.device) -> str:
        """Return the first process's text."""
        data = text.encode()
        size = self.broadcast(torch.tensor(len(data), device=device))
        buffer = torch.zeros(int(size), dtype=torch.uint8, device=device)
        if self.first:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return self.broadcast(buffer).cpu().numpy().tobytes().decode()

    @staticmethod
    def _collective(operation: Callable[[], object]) -> None:
        try:
            operation()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0][:200]
            raise PlatformError(
                f"another process of this run has gone ({reason}); the latest checkpoint is "
                "whole: start again with --resume"
            ) from None


@contextmanager
def join(device: torch.device) -> Iterator[Processes]:
    """Join the other processes that torchrun started; a single process without torchrun."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes()
        return
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise PlatformError(
            f"WORLD_SIZE = {size}, but the processes do not meet ({reason}); "
            "start them with torchrun, or unset WORLD_SIZE"
        ) from None
    try:
        yield Processes(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


class SharedEngine:
    """Runs each process's share of the tasks, and gives every process all the results."""

    def __init__(self, engine: Engine, processes: Processes) -> None:
        self.model = engine.model
        self.name = f"{engine.name}, {processes.size} processes"
        self._engine, self._processes = engine, processes

    def images(self, rows: IntArray) -> Tensor:
        """Gather prepared images [B] as network input [B, C, H, W]; pixels in 0..1."""
        return self._engine.images(rows)

    def adapt(self, weights: Tensor, state: OptimizerState, tasks: Sequence[Task]) -> Adapted:
        """Adapt to T tasks, a share in each process, from weights [P] or [T, P]."""
        size, steps = weights.shape[-1], len(tasks[0].batches)
        shape = (len(tasks), size)
        starts, moments = weights.expand(shape), state.second_moment.expand(shape)
        results = weights.new_empty(len(tasks), 2 * size + steps)
        share = self._part(len(tasks), self._processes.rank)
        if tasks[share]:
            part = self._engine.adapt(
                starts[share], OptimizerState(moments[share], state.step), tasks[share]
            )
            results[share] = torch.cat([part.weights, part.state.second_moment, part.losses], dim=1)
        adapted, moved, losses = torch.split(self._gather(results), [size, size, steps], dim=1)
        return Adapted(adapted, OptimizerState(moved, state.step + steps), losses)

    def adapt_sequential(
        self, weights: Tensor, state: OptimizerState, tasks: Sequence[Task]
    ) -> Adapted:
        """Adapt to each task from weights [P], and the optimiser's state after the task before."""
        return adapt_each(self.adapt, weights, state, tasks)

    def predict(self, weights: Tensor, tasks: Sequence[Task], mode: BatchNormMode) -> Tensor:
        """Return the logits [T, Q, ways] of each task's queries, a share from each process."""
        results = weights.new_empty(len(tasks), len(tasks[0].query), self.model.outputs)
        share = self._part(len(tasks), self._processes.rank)
        if tasks[share]:
            results[share] = self._engine.predict(weights[share], tasks[share], mode)
        return self._gather(results)

    def features(
        self, weights: Tensor, rows: IntArray, statistics: Statistics | None = None
    ) -> Tensor:
        """Return the features [N, D] of rows [N]: one batch, so each process computes its own."""
        return self._engine.features(weights, rows, statistics)

    def statistics(self, weights: Tensor, rows: IntArray) -> Statistics:
        """Return each batch norm's statistics on rows [N], computed in each process."""
        return self._engine.statistics(weights, rows)

    def _part(self, tasks: int, rank: int) -> slice:
        """Return the tasks of one process: neighbours, as evenly as they can be shared."""
        size = self._processes.size
        return slice(tasks * rank // size, tasks * (rank + 1) // size)

    def _gather(self, results: Tensor) -> Tensor:
        for rank in range(self._processes.size):
            part = results[self._part(len(results), rank)]
            if len(part):
                self._processes.broadcast(part, rank)
        return results
