"""Checkpoints: the learnt initialisation with the inner optimiser's state, and its provenance.

A checkpoint is a folder of weights.safetensors and checkpoint.json, and never a pickle. It is
written completely or not at all.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from reptile.data.dataset import PreparedData
from reptile.errors import InputError
from reptile.files import atomic_directory, sha256_file, write_json
from reptile.learn.episodic import ClosedForm, EpisodicState
from reptile.learn.heads import Head, head_of
from reptile.learn.optimizer import OptimizerState
from reptile.learn.pretrain import classifier_shapes
from reptile.learn.reptile import MetaState
from reptile.learn.step_sizes import start_of
from reptile.models import (
    LayerStatistics,
    Model,
    ModuleNetwork,
    Towers,
    build_model,
    initialise,
    named_parts,
    unflatten,
)
from reptile.objectives import Objective, as_they_are, objective_of, to_unit
from reptile.settings import TrainSettings, describe

WEIGHTS_FILE = "weights.safetensors"
INFO_FILE = "checkpoint.json"
FORMAT = 1
_STATISTICS = LayerStatistics._fields


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

    format: int = FORMAT
    iteration: int
    settings: TrainSettings
    image_shape: tuple[int, ...]
    values: Annotated[int, Field(ge=0)] = 0
    """Values that a regressor predicts; 0 for a classifier."""
    classes: Annotated[int, Field(ge=0)] = 0
    """Training classes that the classifier of `pretrain` tells apart."""
    pixels: bool = True
    """Whether a classifier's inputs are pixels 0..255, or any numbers."""
    module: str = ""
    """Class of the user's network; empty for the one that `settings.model` names."""
    weights_sha256: str = ""
    """Hash of the weights that `settings.model` starts from, and of the user's code that makes it;
    empty if all is drawn from the seed."""
    dataset: str
    data_sha256: str
    splits_sha256: str
    code_sha256: str
    versions: dict[str, str]
    shares: tuple[float, ...] = ()
    """Of towers, as chosen on validation tasks."""
    curve: tuple[CurvePoint, ...] = ()
    losses: tuple[float, ...] = ()
    """Of the meta-iterations since the curve's last point; none in a finished checkpoint."""

    def check_data(self, data: PreparedData) -> None:
        """Refuse other data: classes that it holds out may be among those trained on.

        Raises:
            InputError: other data, or the same data split in another way.
        """
        here = data.content_sha256, data.splits_sha256
        if here != (self.data_sha256, self.splits_sha256):
            raise InputError(
                f"the checkpoint was trained on {self.dataset}: data {self.data_sha256[:12]}, "
                f"splits {self.splits_sha256[:12]}, the prepared data has {here[0][:12]} and "
                f"{here[1][:12]}; run `reptile train` again"
            )

    @property
    def objective(self) -> Objective:
        """Classification or regression."""
        return objective_of(self.values)

    @property
    def network_input(self) -> Callable[[Tensor], Tensor]:
        """From what callers give to what the network sees: pixels are scaled to 0..1."""
        return to_unit if self.pixels and not self.values else as_they_are


class Checkpoint(NamedTuple):
    """A checkpoint in memory."""

    model: Model
    state: MetaState | EpisodicState
    info: CheckpointInfo

    @property
    def meta(self) -> MetaState:
        """The initialisation that gradient steps start from.

        Raises:
            InputError: tasks are learnt in closed form.
        """
        if isinstance(self.state, MetaState):
            return self.state
        if self.info.settings.closed_form:
            raise InputError(
                f"a checkpoint of {self.info.settings.algorithm} learns tasks in closed form; it "
                "has no start for gradient steps"
            )
        return start_of(self.info.settings, self.model, self.state.weights)

    @property
    def closed_form(self) -> ClosedForm:
        """The learner of a checkpoint that was trained through a head.

        Raises:
            InputError: tasks are learnt by gradient steps.
        """
        if not (isinstance(self.state, EpisodicState) and self.info.settings.closed_form):
            raise InputError(
                f"a checkpoint of {self.info.settings.algorithm} learns tasks by gradient steps, "
                "not in closed form"
            )
        learner = ClosedForm.of(self.model, _head(self.model, self.info), self.state)
        return learner._replace(network_input=self.info.network_input)


def build_network(
    info: CheckpointInfo, module: nn.Module | None = None, *, load: bool = True
) -> Model:
    """Build the network that the settings name, or wrap the user's module.

    Args:
        info: names it.
        module: the user's.
        load: whether to read the weights that the settings name; a checkpoint has them already.

    Raises:
        InputError: the module does not fit the data, or the weights not the network.
        PlatformError: the weights cannot be downloaded.
    """
    settings = info.settings
    outputs = 0 if settings.closed_form else info.values or settings.ways
    if module is not None:
        return ModuleNetwork(
            module, info.image_shape, outputs, info.objective, adapt=settings.adapt
        )
    return build_model(
        settings.model,
        outputs,
        info.image_shape,
        info.objective,
        adapt=settings.adapt,
        seed=settings.seed,
        load=load,
    )


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; a crash leaves what was at `folder` before."""
    with atomic_directory(folder) as temporary:
        write_checkpoint(temporary, checkpoint)


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint's files into a folder."""
    model, state, info = checkpoint
    vectors = {"weights": state.weights}
    if isinstance(state, MetaState):
        vectors["second_moment"] = state.inner.second_moment
    else:
        vectors |= {"first_moment": state.first_moment, "second_moment": state.second_moment}
    tensors = {
        f"{vector}/{name}": part.contiguous().cpu()
        for vector, flat in vectors.items()
        for name, part in named_parts(_shapes(model, info), flat).items()
    }
    if isinstance(model, ModuleNetwork | Towers):  # others draw their start again from the seed
        initial = unflatten(model, initialise(model, info.settings.seed))
        tensors |= {f"initial/{name}": part.contiguous() for name, part in initial.items()}
        tensors |= {f"fixed/{name}": part.contiguous() for name, part in model.fixed.items()}
    if isinstance(state, EpisodicState):
        for layer, statistics in enumerate(state.statistics):
            for name, value in statistics._asdict().items():
                tensors[f"statistics/{layer}/{name}"] = value.contiguous().cpu()
    tensors["step"] = torch.tensor(state.step)
    (folder / WEIGHTS_FILE).write_bytes(save(tensors))  # a failure here is an OSError
    write_json(folder / INFO_FILE, info.model_dump(mode="json"))


def checkpoint_sha256(folder: Path) -> str:
    """Return the hash of what `save_checkpoint` wrote."""
    files = "".join(sha256_file(folder / name) for name in (INFO_FILE, WEIGHTS_FILE))
    return hashlib.sha256(files.encode()).hexdigest()


def load_checkpoint(folder: Path, module: nn.Module | None = None) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Args:
        folder: what `save_checkpoint` wrote.
        module: the network, if it was trained as a user's module; only its structure
            counts. Code is never loaded from a checkpoint.

    Raises:
        InputError: it is missing or damaged, its weights are not those of its network, or it needs
            a module that is not given.
    """
    try:
        values: Any = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
        if isinstance(values, dict) and (given := values.get("format", FORMAT)) != FORMAT:
            raise InputError(
                f"{folder / INFO_FILE}: is of format {given}, and this version of reptile reads "
                f"{FORMAT}; install the version that wrote it"
            )
        info = CheckpointInfo.model_validate(values)
        # Not load_file: its errors name no file, and call one without permission missing.
        tensors = load((folder / WEIGHTS_FILE).read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: no such file; run `reptile train` first") from None
    except ValidationError as error:
        raise InputError(f"{folder / INFO_FILE}: {'; '.join(describe(error))}") from None
    except InputError:
        raise
    except PermissionError as error:
        raise InputError(f"{error.filename}: no permission to read it; ask its owner") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: damaged checkpoint ({error}); train again") from None
    if info.module and module is None:
        raise InputError(
            f"{folder}: holds the weights of {info.module}; give such a module, as in "
            "reptile.load(folder, module)"
        )
    if module is not None and not info.module:
        raise InputError(f"{folder}: holds the weights of {info.settings.model.name}, not a module")
    model = build_network(info, module, load=False)
    episodic = not info.settings.interpolates
    shapes = _shapes(model, info)
    vectors = ("weights", *(("first_moment",) if episodic else ()), "second_moment")
    expected = {f"{vector}/{name}": shape for vector in vectors for name, shape in shapes.items()}
    if isinstance(model, ModuleNetwork | Towers):
        expected |= {f"initial/{name}": shape for name, shape in model.shapes.items()}
        if not info.module or any(name.startswith("fixed/") for name in tensors):
            expected |= {f"fixed/{name}": value.shape for name, value in model.fixed.items()}
    layers = len({name.split("/")[1] for name in tensors if name.startswith("statistics/")})
    statistics = [f"statistics/{layer}/{name}" for layer in range(layers) for name in _STATISTICS]
    if set(tensors) != {*expected, *statistics, "step"} or any(
        tensors[name].shape != shape for name, shape in expected.items()
    ):
        raise InputError(
            f"{folder / WEIGHTS_FILE}: not the weights of {model.name}, which {INFO_FILE} describes"
        )
    learnt = [tensors[f"{vector}/{name}"] for vector in vectors for name in shapes]
    measured_values = [tensors[name] for name in statistics]
    if tensors["step"].ndim or any(
        each.dtype != torch.float32 or not each.isfinite().all()
        for each in (*learnt, *measured_values)
    ):
        raise InputError(
            f"{folder / WEIGHTS_FILE}: damaged checkpoint (its numbers are not finite float32); "
            "train again"
        )
    if isinstance(model, ModuleNetwork | Towers):
        # A user's module of an earlier version has what is fixed in itself alone.
        fixed = {name: tensors.get(f"fixed/{name}", value) for name, value in model.fixed.items()}
        model.start_from(_flat(model.shapes, tensors, "initial"), fixed)
    flat = [_flat(shapes, tensors, vector) for vector in vectors]
    step = int(tensors["step"])
    if not episodic:
        return Checkpoint(model, MetaState(flat[0], OptimizerState(flat[1], step)), info)
    measured = tuple(
        LayerStatistics(*(tensors[f"statistics/{layer}/{name}"] for name in _STATISTICS))
        for layer in range(layers)
    )
    state = EpisodicState(flat[0], flat[1], flat[2], step, measured, info.shares)
    return Checkpoint(model, state, info)


def _shapes(model: Model, info: CheckpointInfo) -> dict[str, torch.Size]:
    """Return the names and shapes of all that is learnt: the network's weights, then others."""
    if info.settings.algorithm == "meta-sgd":
        return model.shapes | {f"step_size.{name}": each for name, each in model.shapes.items()}
    if info.settings.episode.layer_step_sizes:
        steps = torch.Size([info.settings.inner_steps])
        return model.shapes | {f"step_size.{name}": steps for name in model.shapes}
    if not info.settings.closed_form:
        return model.shapes
    shapes = model.shapes | _head(model, info).shapes
    if info.settings.algorithm == "pretrain":
        shapes |= classifier_shapes(model.feature_size, info.classes)
    return shapes


def _head(model: Model, info: CheckpointInfo) -> Head:
    return head_of(info.settings.head, model.feature_size, info.values)


def _flat(shapes: Mapping[str, torch.Size], tensors: dict[str, Tensor], vector: str) -> Tensor:
    parts = [tensors[f"{vector}/{name}"].reshape(-1) for name in shapes]
    return torch.cat([torch.empty(0), *parts])
