"""Eager PyTorch on the graphs' inputs: the reference for golden tensors and verification.

Runs the training code's inner loop, in any precision; float64 shows how much of a difference is
rounding. Independent of ONNX.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from reptile.export import fold
from reptile.learn.checkpoint import Checkpoint
from reptile.learn.inner_loop import inner_loop
from reptile.learn.optimizer import OptimizerState
from reptile.learn.prototypes import one_hot, with_prototypes
from reptile.minibatches import IntArray
from reptile.models import mask_absent_outputs, unflatten
from reptile.objectives import CLASSIFICATION

Array = npt.NDArray[Any]  # of images: pixels, uint8, or a regressor's inputs, float32
Tensors = dict[str, Array]
CPU = torch.device("cpu")


class SupportSet(NamedTuple):
    """A task to adapt to, with its mini-batches: the inputs of the graph `adapt`."""

    images: Array  # [S, C, H, W], pixels 0..255; or a regressor's inputs
    labels: Array  # [S]; or its values [S, outputs]
    batches: IntArray  # [K, B], positions in the support set

    def first(self, steps: int) -> "SupportSet":
        """Return the same task with its first mini-batches only."""
        return self._replace(batches=self.batches[:steps])

    def feeds(self, checkpoint: Checkpoint) -> Tensors:
        """Return the inputs of the graph `adapt`."""
        rate = checkpoint.info.settings.optimizer.learning_rate
        return {
            "support_images": self.images.astype(np.float32),
            "support_labels": self.labels,
            "batches": self.batches,
            "learning_rate": np.array(rate, dtype=np.float32),
        }


def adapt(
    checkpoint: Checkpoint, task: SupportSet, dtype: torch.dtype, *, noise: int | None = None
) -> Tensors:
    """Return the losses [K] and the task's tensors, by the names of the graph's outputs.

    Args:
        checkpoint: where adaptation starts.
        task: the support set and its mini-batches.
        dtype: precision of all arithmetic.
        noise: seed of errors as large as float32's rounding, one in each weight before each step.
    """
    checkpoint = fold.exportable(checkpoint)
    model, (weights, state), info = checkpoint.model, checkpoint.meta, checkpoint.info
    inputs = info.network_input(torch.from_numpy(task.images)).to(dtype)
    labels = torch.from_numpy(task.labels)
    if info.objective is CLASSIFICATION:
        present = torch.isin(torch.arange(model.outputs), labels)
        weights = mask_absent_outputs(model, weights, present)
    weights, state = weights.to(dtype), OptimizerState(state.second_moment.to(dtype), state.step)
    if info.settings.algorithm == "proto-maml":
        with torch.no_grad():
            features = model.features(unflatten(model, weights), inputs)
            weights = with_prototypes(model, weights, features, one_hot(model, labels).to(dtype))
    generator = torch.Generator().manual_seed(noise or 0)
    losses = [weights.new_empty(0)]
    for batch in task.batches:
        if noise is not None:
            errors = torch.randn(weights.shape, generator=generator, dtype=dtype)
            weights = weights * (1 + torch.finfo(torch.float32).eps * errors)
        weights, state, loss = inner_loop(
            model,
            weights,
            state,
            inputs,
            labels,
            [torch.from_numpy(batch)],
            info.settings.optimizer,
        )
        losses.append(loss)
    with torch.no_grad():
        tensors = fold.adapted_tensors(model, unflatten(model, weights), inputs)
    return {
        name: value.numpy() for name, value in ({"losses": torch.cat(losses)} | tensors).items()
    }


@torch.no_grad()
def predict(checkpoint: Checkpoint, images: Array, dtype: torch.dtype) -> Array:
    """Return the logits [N, ways] of the meta-initialised model, batch norm on these images."""
    params = unflatten(checkpoint.model, checkpoint.meta.weights.to(dtype))
    inputs = checkpoint.info.network_input(torch.from_numpy(images)).to(dtype)
    return np.asarray(checkpoint.model.forward(params, inputs).numpy())


@torch.no_grad()
def predict_adapted(
    checkpoint: Checkpoint, tensors: Tensors, images: Array, dtype: torch.dtype
) -> Array:
    """Return the logits [N, ways] under a task's tensors; others among them are ignored."""
    checkpoint = fold.exportable(checkpoint)
    given = {name: torch.from_numpy(value).to(dtype) for name, value in tensors.items()}
    inputs = checkpoint.info.network_input(torch.from_numpy(images)).to(dtype)
    return np.asarray(fold.predict_adapted(checkpoint.model, given, inputs).numpy())
