"""The native engine: whole inner loops, and predictions, in one call of a compiled kernel.

The kernel handles weight layout and threads; arguments are checked here before it runs. The eager
engine is its reference. CPU only.
"""

import ctypes
import math
import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reptile.cpus import available_cpus, warn_of_spinning_threads
from reptile.data.dataset import Inputs
from reptile.errors import InputError
from reptile.learn.engines.base import Adapted, gather
from reptile.learn.engines.native.build import BuildError, load_kernel
from reptile.learn.optimizer import BETA2, EPSILON, OptimizerState
from reptile.minibatches import IntArray
from reptile.models import CONV_LAYERS, MLP, Conv4, Model, Network, Statistics, size, unflatten
from reptile.objectives import CLASSIFICATION, REGRESSION
from reptile.settings import BatchNormMode, OptimizerSettings
from reptile.tasks import Targets, Task

__all__ = ["NETWORKS", "BuildError", "NativeEngine"]

NETWORKS = (Conv4, MLP)  # what the kernel computes; a subclass may compute something else
MAX_LAYERS = 4  # as in shape.h


class _Settings(ctypes.Structure):
    _fields_ = (
        ("network", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("channels", ctypes.c_int32),
        ("height", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("layers", ctypes.c_int32),
        ("units", ctypes.c_int32 * MAX_LAYERS),
        ("tanh", ctypes.c_int32),
        ("squared_error", ctypes.c_int32),
        ("values", ctypes.c_int32),
        ("adam", ctypes.c_int32),
        ("learning_rate", ctypes.c_float),
        ("weight_decay", ctypes.c_float),
        ("epsilon", ctypes.c_float),
        ("beta2", ctypes.c_double),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        ("inputs", ctypes.c_void_p),
        ("tasks", ctypes.c_int64),
        ("steps", ctypes.c_int64),
        ("starts", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("labels", ctypes.c_void_p),
        ("targets", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("moment", ctypes.c_void_p),
        ("start_step", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("updates", ctypes.c_int64),
        ("in_turn", ctypes.c_int32),
        ("out_weights", ctypes.c_void_p),
        ("out_moment", ctypes.c_void_p),
        ("losses", ctypes.c_void_p),
    )


class _Prediction(ctypes.Structure):
    _fields_ = (
        ("inputs", ctypes.c_void_p),
        ("tasks", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("images", ctypes.c_int64),
        ("measured", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
    )


class _Features(ctypes.Structure):
    _fields_ = (
        ("inputs", ctypes.c_void_p),
        ("images", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("features", ctypes.c_void_p),
    )


class _Gradient(ctypes.Structure):
    _fields_ = (
        ("images", ctypes.c_int64),
        ("features", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
    )


_NETWORKS = {("conv4", "stride"): 0, ("conv4", "pool"): 1, ("mlp", ""): 2}


@cache
def _kernel() -> ctypes.CDLL:
    kernel = load_kernel()
    engine, threads = ctypes.c_void_p, ctypes.c_int
    kernel.reptile_create.argtypes = [ctypes.POINTER(_Settings)]
    kernel.reptile_create.restype = engine
    kernel.reptile_destroy.argtypes = [engine]
    kernel.reptile_destroy.restype = None
    kernel.reptile_adapt.argtypes = [engine, threads, ctypes.POINTER(_Call)]
    kernel.reptile_adapt.restype = ctypes.c_int
    kernel.reptile_predict.argtypes = [engine, threads, ctypes.POINTER(_Prediction)]
    kernel.reptile_predict.restype = ctypes.c_int
    kernel.reptile_features.argtypes = [engine, threads, ctypes.POINTER(_Features)]
    kernel.reptile_features.restype = ctypes.c_int
    kernel.reptile_gradient.argtypes = [engine, threads, ctypes.POINTER(_Gradient)]
    kernel.reptile_gradient.restype = None
    return kernel


class NativeEngine:
    """Runs inner loops in the compiled kernel; a drop-in for `EagerEngine` on the CPU.

    The results do not depend on the number of threads, and equal calls give equal bits.

    Args:
        model: the network.
        optimizer: of the inner loop.
        inputs: prepared images, uint8 [N, C, H, W], or values, float32 [N, C, H, W]; read in
            place, a memory map stays one.
        threads: at most this many; by default torch's number, within what the system grants.

    Raises:
        BuildError: the kernel cannot be built or loaded here.
        InputError: another network than conv4 and mlp, or images that do not fit it.
    """

    def __init__(
        self,
        model: Model,
        optimizer: OptimizerSettings,
        inputs: Inputs,
        threads: int | None = None,
    ) -> None:
        if not isinstance(model, Conv4 | MLP) or type(model) not in NETWORKS:
            raise InputError(
                f"train.engine = native: supports conv4 and mlp, not {model.name}; use auto, "
                "eager or batched"
            )
        if inputs.dtype not in (np.uint8, np.float32) or inputs.shape[1:] != model.image_shape:
            raise InputError(
                f"inputs are {inputs.dtype} {list(inputs.shape)}; this model takes uint8 or "
                f"float32 [N, {', '.join(map(str, model.image_shape))}]"
            )
        warn_of_spinning_threads()
        self.model = model
        self.optimizer = optimizer
        self.threads = threads or min(torch.get_num_threads(), available_cpus())
        self.name = f"native on cpu, {self.threads} thread{'s' if self.threads > 1 else ''}"
        self._inputs: npt.NDArray[Any] = np.ascontiguousarray(
            inputs
        )  # no copy of a contiguous array
        self._size = size(model)
        self._calls = 0  # those that use the kernel's memory of activations
        self._kernel = _kernel()
        self._handle = self._kernel.reptile_create(_settings(model, optimizer, inputs))
        if not self._handle:
            raise MemoryError("no memory for the native engine")
        weakref.finalize(self, self._kernel.reptile_destroy, self._handle)

    def images(self, rows: IntArray) -> Tensor:
        """Gather prepared images [B] as network input [B, C, H, W]; pixels in 0..1."""
        return gather(self._inputs, rows, torch.device("cpu"))

    def adapt(self, weights: Tensor, state: OptimizerState, tasks: Sequence[Task]) -> Adapted:
        """Adapt to T tasks in the compiled kernel, from weights [P] or [T, P].

        Raises:
            InputError: weights that are not float32 [P] or [T, P] on the CPU, tasks with unequal
                numbers of mini-batches, rows, labels or positions out of range, or targets that
                do not fit the model.
        """
        weights, stride = self._checked(weights, len(tasks), "weights")
        moment, moment_stride = self._checked(state.second_moment, len(tasks), "second_moment")
        if stride != moment_stride:  # one shared, one a task
            shape = (len(tasks), self._size)
            weights, moment = weights.expand(shape).contiguous(), moment.expand(shape).contiguous()
            stride = self._size
        moved = torch.empty(len(tasks), self._size)
        adapted, losses = self._adapt(weights, moment, state.step, tasks, stride, moved)
        return Adapted(adapted, OptimizerState(moved, state.step + losses.shape[1]), losses)

    def adapt_sequential(
        self, weights: Tensor, state: OptimizerState, tasks: Sequence[Task]
    ) -> Adapted:
        """Adapt to each task from weights [P], and the optimiser's state after the task before.

        Raises:
            InputError: as `adapt`; weights or a second moment that are not [P].
        """
        weights, _ = self._checked(weights, None, "weights")
        moment, _ = self._checked(state.second_moment, None, "second_moment")
        moved = torch.empty(self._size)
        adapted, losses = self._adapt(weights, moment, state.step, tasks, 0, moved)
        return Adapted(adapted, OptimizerState(moved, state.step + losses.numel()), losses)

    def _adapt(
        self,
        weights: Tensor,
        moment: Tensor,
        step: int,
        tasks: Sequence[Task],
        stride: int,
        moved: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Fill in `moved`, for each task [T, P] or, run sequentially, for the last [P].

        Returns:
            weights [T, P], losses [T, K].
        """
        work = _work(tasks, len(self._inputs), self.model)
        adapted = torch.empty(len(tasks), self._size)
        losses = torch.empty(len(tasks), work.steps)
        regression = self.model.objective is REGRESSION
        call = _Call(
            self._inputs.ctypes.data,
            len(tasks),
            work.steps,
            work.starts.ctypes.data,
            work.rows.ctypes.data,
            None if regression else work.targets.ctypes.data,
            work.targets.ctypes.data if regression else None,
            weights.data_ptr(),
            moment.data_ptr(),
            stride,
            self._size,
            step,
            moved.dim() == 1,
            adapted.data_ptr(),
            moved.data_ptr(),
            losses.data_ptr(),
        )
        self._calls += 1
        if self._kernel.reptile_adapt(self._handle, self.threads, call):
            raise MemoryError("no memory for the native engine's activations")
        return adapted, losses

    def predict(self, weights: Tensor, tasks: Sequence[Task], mode: BatchNormMode) -> Tensor:
        """Return the logits [T, Q, ways] of each task's queries under its weights [T, P].

        Raises:
            InputError: weights that are not float32 [T, P] on the CPU, tasks with unequal numbers
                of images or none, or rows out of range.
        """
        weights, stride = self._checked(weights, len(tasks), "weights")
        if not stride:
            weights = weights.expand(len(tasks), self._size).contiguous()
        groups = _groups(tasks, mode if self.model.has_batch_norm else "transductive")
        _check_range(groups.rows, len(self._inputs), "row of the images")
        logits = torch.empty(*groups.rows.shape, self.model.outputs)
        call = _Prediction(
            self._inputs.ctypes.data,
            *groups.rows.shape,
            groups.measured,
            groups.rows.ctypes.data,
            weights.data_ptr(),
            self._size,
            logits.data_ptr(),
        )
        self._calls += 1
        if self._kernel.reptile_predict(self._handle, self.threads, call):
            raise MemoryError("no memory for the native engine's activations")
        return logits[:, :, groups.queries :].flatten(1, 2)

    def features(
        self, weights: Tensor, rows: IntArray, statistics: Statistics | None = None
    ) -> Tensor:
        """Return the features [N, D] of rows [N]; take their gradient before the next call.

        Raises:
            InputError: weights that are not float32 [P] on the CPU, or rows that are none or out
                of range.
        """
        if not rows.size:
            raise InputError("no rows to compute features of: give at least one")
        _check_range(rows, len(self._inputs), "row of the images")
        if statistics:  # which the kernel does not take
            images = self.images(rows).to(weights.dtype)
            return self.model.features(unflatten(self.model, weights), images, statistics)
        features: Tensor = _NativeFeatures.apply(weights, rows.astype(np.int64), self)
        return features

    def statistics(self, weights: Tensor, rows: IntArray) -> Statistics:
        """Return each batch norm's statistics on rows [N], by torch; empty without batch norm."""
        images = self.images(rows).to(weights.dtype)
        return self.model.statistics(unflatten(self.model, weights), images)

    def _features(self, weights: Tensor, rows: IntArray) -> Tensor:
        weights, _ = self._checked(weights, None, "weights")
        features = torch.empty(len(rows), self.model.feature_size)
        call = _Features(
            self._inputs.ctypes.data,
            len(rows),
            rows.ctypes.data,
            weights.data_ptr(),
            features.data_ptr(),
        )
        self._calls += 1
        if self._kernel.reptile_features(self._handle, self.threads, call):
            raise MemoryError("no memory for the native engine's activations")
        return features

    def _gradient(self, features: Tensor) -> Tensor:
        features = features.contiguous()
        gradient = torch.empty(self._size)
        call = _Gradient(len(features), features.data_ptr(), gradient.data_ptr())
        self._calls += 1
        self._kernel.reptile_gradient(self._handle, self.threads, call)
        return gradient

    def _checked(self, vector: Tensor, tasks: int | None, name: str) -> tuple[Tensor, int]:
        """Return a vector [P] or [T, P] ready for the kernel, and the floats from task to task."""
        shapes = [(self._size,)] if tasks is None else [(self._size,), (tasks, self._size)]
        if vector.shape not in shapes or vector.dtype != torch.float32 or vector.is_cuda:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise InputError(
                f"{name}: the native engine takes float32 {wanted} on the cpu, not {vector.dtype} "
                f"{list(vector.shape)} on {vector.device}; use `engine: eager` for others"
            )
        return vector.detach().contiguous(), self._size * (vector.dim() - 1)


class _NativeFeatures(torch.autograd.Function):
    """`NativeEngine.features` with its gradient; the activations wait in the kernel's memory."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, rows: IntArray, engine: NativeEngine) -> Tensor:
        features = engine._features(weights, rows)
        ctx.engine, ctx.calls = engine, engine._calls
        return features

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.calls != ctx.engine._calls:
            raise RuntimeError("another call of the engine has overwritten these activations")
        return ctx.engine._gradient(gradient), None, None


class _Work(NamedTuple):
    """The mini-batches of all tasks, one after another."""

    steps: int  # K
    starts: IntArray  # [T·K + 1] where each begins in the arrays below
    rows: IntArray
    targets: Targets  # labels, int64; or values, float32 [rows, outputs]


def _work(tasks: Sequence[Task], images: int, model: Model) -> _Work:
    if not tasks:
        raise InputError("no tasks to adapt to: give at least one")
    steps = len(tasks[0].batches)
    if any(len(task.batches) != steps for task in tasks):
        raise InputError("tasks of one call need equally many mini-batches")
    no_rows = np.empty(0, dtype=np.int64)
    rows, targets = [no_rows], []
    for task in tasks:
        positions = np.concatenate([no_rows, *task.batches])
        _check_range(positions, len(task.support), "position in the support set")
        rows.append(task.support[positions])
        targets.append(_targets(task, model)[positions])
    sizes = np.array([len(batch) for task in tasks for batch in task.batches], dtype=np.int64)
    if (sizes < 1).any():
        raise InputError("a mini-batch is empty: each needs at least one image")
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    joined = np.concatenate(targets)
    if model.objective is CLASSIFICATION:
        _check_range(joined, model.outputs, "label")
        joined = joined.astype(np.int64)
    else:
        joined = joined.astype(np.float32)
    work = _Work(steps, starts, np.concatenate(rows).astype(np.int64), joined)
    _check_range(work.rows, images, "row of the images")
    return work


def _targets(task: Task, model: Model) -> Targets:
    """Return a classifier's labels [S] or a regressor's values [S, outputs]."""
    targets, size, outputs = task.support_targets, len(task.support), model.outputs
    if model.objective is CLASSIFICATION:
        fits = targets.dtype.kind in "iu" and targets.shape == (size,)
        wanted = f"classifier takes integers [{size}]"
    else:
        if outputs == 1 and targets.ndim == 1:
            targets = targets[:, None]
        fits = targets.dtype.kind == "f" and targets.shape == (size, outputs)
        wanted = f"regressor takes floating point [{size}, {outputs}]"
    if not fits:
        raise InputError(
            f"support targets are {targets.dtype} {list(targets.shape)}; this {wanted}, "
            "one row for each support input"
        )
    return targets


class _Groups(NamedTuple):
    """The forward passes of all tasks; batch norm uses the statistics of the first rows of each."""

    rows: IntArray  # [T, groups, images]
    measured: int
    queries: int  # where the queries begin among the images of a group


def _groups(tasks: Sequence[Task], mode: BatchNormMode) -> _Groups:
    sizes = {(len(task.support), len(task.query)) for task in tasks}
    if len(sizes) != 1 or 0 in next(iter(sizes)):
        raise InputError("tasks of one call need equally many support and query images, not none")
    support = np.stack([task.support for task in tasks]).astype(np.int64)
    query = np.stack([task.query for task in tasks]).astype(np.int64)
    if mode == "transductive":
        return _Groups(query[:, None], query.shape[1], 0)
    seen = support.shape[1]
    if mode == "frozen":
        return _Groups(np.concatenate([support, query], axis=1)[:, None], seen, seen)
    each = np.repeat(support[:, None], query.shape[1], axis=1)
    return _Groups(np.concatenate([each, query[:, :, None]], axis=2), seen + 1, seen)


def _check_range(values: IntArray, end: int, what: str) -> None:
    if values.size and (values.min() < 0 or values.max() >= end):
        bad = values[(values < 0) | (values >= end)][0]
        raise InputError(f"{what} {bad}: must be in 0..{end - 1}")


def _settings(model: Network, optimizer: OptimizerSettings, inputs: Inputs) -> _Settings:
    settings = model.settings
    mlp = settings.name == "mlp"
    units = settings.hidden if mlp else (settings.filters,) * CONV_LAYERS
    shape = (
        model.image_shape if len(model.image_shape) == 3 else (math.prod(model.image_shape), 1, 1)
    )
    return _Settings(
        _NETWORKS[settings.name, "" if mlp else settings.downsampling],
        model.outputs,
        *shape,
        len(units),
        (ctypes.c_int32 * MAX_LAYERS)(*units),
        mlp and settings.activation == "tanh",
        model.objective is REGRESSION,
        inputs.dtype == np.float32,
        optimizer.name == "adam",
        optimizer.learning_rate,
        optimizer.weight_decay,
        EPSILON,
        BETA2,
    )
