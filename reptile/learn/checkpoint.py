"""Checkpoints: the learnt initialisation with the inner optimiser's state, and where it came from.

A checkpoint is a folder of weights.safetensors and checkpoint.json, and never a pickle. It appears
whole or not at all.
"""

import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reptile.errors import InputError
from reptile.files import atomic_directory, write_json
from reptile.learn.optimizer import OptimizerState
from reptile.learn.reptile import MetaState
from reptile.models import Model, build_model, flatten, unflatten
from reptile.objectives import Objective, objective_of
from reptile.settings import TrainSettings, describe

WEIGHTS_FILE = "weights.safetensors"
INFO_FILE = "checkpoint.json"


class CurvePoint(BaseModel):
    """One point of the learning curve."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    iteration: int
    loss: float
    """Mean loss of the last inner step over the tasks since the point before."""
    score: float
    """On tasks of the validation split: 1-shot transductive accuracy, or mean squared error."""


class CheckpointInfo(BaseModel):
    """What checkpoint.json says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    iteration: int
    settings: TrainSettings
    image_shape: tuple[int, int, int]
    values: Annotated[int, Field(ge=0)] = 0
    """Values that a regressor predicts; 0 for a classifier."""
    dataset: str
    data_sha256: str
    splits_sha256: str
    code_sha256: str
    versions: dict[str, str]
    curve: tuple[CurvePoint, ...] = ()

    @property
    def objective(self) -> Objective:
        """The kind of task that it was trained for."""
        return objective_of(self.values)

    def model(self) -> Model:
        """Build the network."""
        outputs = self.values or self.settings.ways
        return build_model(self.settings.model, outputs, self.image_shape, self.objective)


class Checkpoint(NamedTuple):
    """A checkpoint in memory."""

    model: Model
    state: MetaState
    info: CheckpointInfo


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; a crash leaves what was at `folder` before."""
    model, (weights, inner), info = checkpoint
    tensors = {
        f"{kind}/{name}": part.contiguous().cpu()
        for kind, flat in (("weights", weights), ("second_moment", inner.second_moment))
        for name, part in unflatten(model, flat).items()
    }
    tensors["step"] = torch.tensor(inner.step)
    with atomic_directory(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS_FILE)
        write_json(temporary / INFO_FILE, info.model_dump(mode="json"))


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Raises:
        InputError: it is missing, damaged, or its weights are not those of its model.
    """
    try:
        values: Any = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
        info = CheckpointInfo.model_validate(values)
        tensors = load_file(folder / WEIGHTS_FILE)
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: no such file; run `reptile train` first") from None
    except ValidationError as error:
        raise InputError(f"{folder / INFO_FILE}: {'; '.join(describe(error))}") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: damaged checkpoint ({error}); train again") from None
    model = info.model()
    expected = {f"{kind}/{name}" for kind in ("weights", "second_moment") for name in model.shapes}
    if set(tensors) != expected | {"step"} or any(
        tensors[f"{kind}/{name}"].shape != shape
        for kind in ("weights", "second_moment")
        for name, shape in model.shapes.items()
    ):
        raise InputError(f"{folder / WEIGHTS_FILE}: not the weights of the model in {INFO_FILE}")
    inner = OptimizerState(_flat(model, tensors, "second_moment"), int(tensors["step"]))
    return Checkpoint(model, MetaState(_flat(model, tensors, "weights"), inner), info)


def _flat(model: Model, tensors: dict[str, Tensor], kind: str) -> Tensor:
    return flatten(model, {name: tensors[f"{kind}/{name}"] for name in model.shapes})
