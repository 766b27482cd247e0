"""Settings of every stage, typed and checked, read from params.yaml.

One model a stage, named as the stage is. A bad value is an InputError that names the setting, the
value and the limit. No data or models are read here.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from reptile.errors import InputError

log = logging.getLogger(__name__)

Positive = Annotated[int, Field(ge=1, le=10**9)]
Repeated = Annotated[int, Field(ge=1, le=100_000)]
"""What is held in memory so many times."""
Tasks = Annotated[int, Field(ge=2, le=10**6)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Rate = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
NonZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Ways = Annotated[int, Field(ge=1, le=1000)]
Width = Annotated[int, Field(ge=1, le=65536)]

Precision = Literal["float32", "bf16"]
BatchNormMode = Literal["transductive", "non_transductive", "frozen"]
NETWORKS = ("conv4", "mlp", "resnet12", "conv1d")
TOWERS = "towers"
PREPROCESSING = ("input_size", "mean", "deviation")
PUBLISHED_SPLITS = ("cifar-fs", "fc100", "omniglot-vinyals")
RENAMED = {"verify": {"episodes": "tasks"}}
"""Old names of settings by stage; they still work."""
OF_UNIONS = ("bool", "float", "int", "str")
"""What pydantic puts behind the name of a setting of several types."""
BATCH_NORM_MODES: tuple[BatchNormMode, ...] = ("transductive", "non_transductive", "frozen")


class Section(BaseModel):
    """Base of all settings: immutable, and unknown names are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        if bool not in (annotation, *get_args(annotation)):
            for each in value if isinstance(value, list | tuple) else (value,):
                if isinstance(each, bool):
                    raise ValueError(
                        f"{str(each).lower()}: YAML reads true, yes and on, or false, no and off, "
                        "as a truth value, which this setting is not; put a text in quotes"
                    )
        return value

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, values: Any) -> Any:
        stage = cls.__name__.removesuffix("Settings").lower()
        for old, new in RENAMED.get(stage, {}).items():
            if isinstance(values, dict) and old in values:
                if new in values:
                    raise ValueError(f"{old} is the old name of {new}: give one of them")
                values = {new if key == old else key: value for key, value in values.items()}
                log.warning("%s.%s is called %s.%s now", stage, old, stage, new)
        return values


AnySection = TypeVar("AnySection", bound=Section)


class TableSettings(Section):
    """The columns of a table, by their names in its header."""

    task: str = ""
    """The column that tells tasks apart: patient, device, user. With classes: their group, or
    empty."""
    inputs: tuple[str, ...] = ()
    """Columns of numbers, categories (any text) or dates (ISO 8601)."""
    targets: tuple[str, ...] = ()
    """What is to be predicted: columns of numbers, or the column of the class."""
    kind: Literal["values", "classes"] = "values"
    categories: tuple[str, ...] = ()
    """Those inputs whose numbers are codes of categories."""
    decimal: Literal[".", ","] = "."
    """The decimal mark of a text file."""
    missing: Literal["refuse", "fill"] = "refuse"
    """A missing input is an error, or becomes the training split's mean (a category: `other`). Rows
    without a task, target or place in the order are an error, or left out."""

    @model_validator(mode="after")
    def _each_once(self) -> "TableSettings":
        named = [each for each in (self.task, *self.inputs, *self.targets) if each]
        for each in named:
            if named.count(each) > 1:
                if each in self.inputs and each in self.targets:
                    raise ValueError(f"the target {each!r} is among the inputs; remove it there")
                raise ValueError(
                    f"column {each!r} is named twice in task, inputs and targets; keep one"
                )
        if unknown := set(self.categories) - set(self.inputs):
            raise ValueError(f"categories: {min(unknown)!r} is none of the inputs")
        if self.kind == "classes" and len(self.targets) > 1:
            raise ValueError("targets: kind = classes takes one column, the class")
        return self


class WindowSettings(Section):
    """Cut recordings [..., time] into windows, each an example of its own."""

    length: Positive
    """Of a window, in samples."""
    step: Positive
    """Samples from the start of a window to that of the next."""


class PrepareSettings(Section):
    """From a source to one prepared dataset with fixed splits."""

    source: str = "data/glyphs.zip"
    """A folder or zip of class folders, a downloaded dataset, or `glyphs`, `digits`, `photographs`,
    `sinusoid`; a table (.csv, .tsv, .parquet); or arrays (.npz, .safetensors, or a folder with
    inputs.npy)."""
    table: TableSettings = TableSettings()
    windows: WindowSettings | None = None
    """Arrays: cut each example along its last axis."""
    order: bool | str = False
    """Whether the rows of each task have an order, so that a support set is always older than its
    queries. A table: the column to sort by (a number or date). `true`: the order of the rows."""
    cross_domain: tuple[str, ...] = ("digits",)
    """Further sources, prepared to the same image shape and used for testing only."""
    image_size: Annotated[int, Field(ge=1, le=512)] = 28
    channels: Literal["auto", "grey", "rgb"] = "auto"
    held_out: str = "groups"
    """What validation and test hold out: whole `groups` (alphabets), single `classes`, or the
    classes of a list: `published` for the one among the source's files, one of
    PUBLISHED_SPLITS by its name, or a JSON file by its path
    (`{"validation": [names], "test": [names]}`)."""
    validation: int | float = 0.1
    """A fraction, or a whole number of groups or classes; 0 holds out none for validation."""
    test: int | float = 0.2
    split_seed: Seed = 0
    rotations: bool = True
    """Turn each training class by 90, 180 and 270 degrees into three more classes."""
    images_per_class: Positive = 20
    """The minimum number of images of a class (shots + queries, or the train-shots); or of rows of
    a table's task, where those with fewer are left out."""

    @field_validator("held_out")
    @classmethod
    def _known_split(cls, value: str) -> str:
        names = ("groups", "classes", "published", *PUBLISHED_SPLITS)
        if value not in names and not value.endswith(".json"):
            raise ValueError(f"{value!r} must be {', '.join(names)}, or the path of a .json file")
        return value

    @field_validator("validation", "test")
    @classmethod
    def _share(cls, value: int | float) -> int | float:
        if not (0 <= value <= 10**9 if isinstance(value, int) else 0 < value < 1):
            raise ValueError(f"{value} must be between 0 and 1, or a whole number from 0 on")
        return value

    @model_validator(mode="after")
    def _training_classes_remain(self) -> "PrepareSettings":
        if self.test == 0:
            raise ValueError("test = 0: evaluation needs classes that training has not seen")
        shares = [share for share in (self.validation, self.test) if isinstance(share, float)]
        if sum(shares) >= 1:
            raise ValueError(
                f"validation + test = {self.validation + self.test:g}: must be below 1, "
                "or nothing is left to train on"
            )
        return self


class LastBlocks(Section):
    """The head and the last blocks below it, in the order of the forward pass."""

    last: Positive


Adapt = Literal["all", "none", "head", "norms"] | LastBlocks | tuple[str, ...]


def _one_of_the_forms(value: Any) -> Any:
    names = isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
    last = value.get("last") if isinstance(value, dict) and len(value) == 1 else None
    if (
        value in ("all", "none", "head", "norms")
        or (names and value)
        or (type(last) is int and last >= 1)
        or isinstance(value, LastBlocks)
    ):
        return value
    raise ValueError(
        f"{value!r} must be all, none, head, norms, {{last: n}} with n of at least 1, or a list of "
        "patterns of parameter names"
    )


AdaptSetting = Annotated[Adapt, BeforeValidator(_one_of_the_forms)]


class ModelSettings(Section):
    """The network whose initialisation is learnt."""

    name: str = "conv4"
    """`conv4`, `mlp`, `resnet12`, `conv1d` (for signals), `torchvision:NAME` (a classifier of
    torchvision), or `module:package.function` (a function that returns a torch module; it gets
    `outputs` and `image_shape` by keyword if it takes them). `towers` where these are given."""
    towers: tuple["TowerSettings", ...] = ()
    """Networks side by side, for a closed-form head: their features are standardised and joined,
    and how much each counts is chosen on validation tasks."""
    weights: str = ""
    """Where training starts: torchvision's weights by name (`DEFAULT`), a .safetensors file, or a
    .pth file of tensors. Empty: drawn from `train.seed`. conv4, mlp: as towers alone, from a file;
    that of a checkpoint is its weights.safetensors."""
    channels: Literal["auto", "grey", "rgb"] = "auto"
    """What the network sees of images. auto: RGB for torchvision's networks, else what the data
    is."""
    input_size: Annotated[int, Field(ge=0, le=1024)] = 0
    """Images are resized to this height and width; 0: to what torchvision's weights were trained
    on, or not at all."""
    mean: tuple[float, ...] = ()
    """Subtracted from pixels in 0..1, a number a channel or one for all; with `deviation` any range
    of values. Empty: that of torchvision's weights, or 0."""
    deviation: tuple[NonZero, ...] = ()
    """What pixels are then divided by (0.5, after a mean of 0.5, gives -1..1; 1/255 gives 0..255).
    Empty: that of torchvision's weights, or 1."""
    filters: Annotated[int, Field(ge=1, le=1024)] = 64
    """conv4, conv1d: channels of each convolution (the paper: 64 on Omniglot, 32 on mini-ImageNet).
    resnet12: channels of the first block; the next have 2.5, 5 and 10 times as many."""
    downsampling: Literal["stride", "pool"] = "stride"
    """conv4: stride-2 convolutions (Omniglot), or max-pooling (mini-ImageNet)."""
    hidden: Annotated[tuple[Width, ...], Field(min_length=1, max_length=4)] = (64,)
    """mlp: width of each hidden layer; one to four."""
    activation: Literal["relu", "tanh"] = "relu"
    """mlp: what follows each hidden layer."""

    @model_validator(mode="before")
    @classmethod
    def _name_of_towers(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("towers"):
            return {"name": TOWERS, **values}
        return values

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in (*NETWORKS, TOWERS) and not re.fullmatch(
            r"torchvision:\w+|module:[^\W\d]\w*(\.[^\W\d]\w*)+", value
        ):
            raise ValueError(
                f"{value!r} must be {', '.join(NETWORKS)}, torchvision:NAME or "
                "module:package.function"
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "ModelSettings":
        if (self.name == TOWERS) != bool(self.towers):
            raise ValueError(
                f"name = {self.name}: towers are networks of their own; leave the name out"
                if self.towers
                else "name = towers: list the networks in train.model.towers"
            )
        if any(tower.towers for tower in self.towers):
            raise ValueError("towers: a tower has none of its own; list all in one row")
        any_start = self.is_module or isinstance(self, TowerSettings)
        for name in () if any_start else ("weights", "channels", *PREPROCESSING):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} = {getattr(self, name)!r}: {self.name} has none")
        return self

    @property
    def is_module(self) -> bool:
        """Whether the network is a torch module, not one of this library's functions."""
        return self.name not in {"conv4", "mlp", TOWERS}


class TowerSettings(ModelSettings):
    """One of several networks side by side."""

    adapt: AdaptSetting = "all"
    """What is trained of it, as in `train.adapt`; `none` for a frozen backbone."""

    @model_validator(mode="after")
    def _adapted_as_a_whole(self) -> "TowerSettings":
        if self.adapt not in ("all", "none") and not self.is_module:
            raise ValueError(f"adapt: {self.name} is trained as a whole; use all or none")
        return self


class OptimizerSettings(Section):
    """The optimiser of the inner loop, in training and at test time alike."""

    name: Literal["adam", "sgd", "scaled_sgd"] = "adam"
    """scaled_sgd: the step of each parameter is multiplied by a number of its own; it is what
    `sgd` means for the algorithms anil and meta-sgd, and with `episode.layer_step_sizes`."""
    learning_rate: Rate = 1e-3
    weight_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Every weight is multiplied by this before each inner step; 1 is off."""
    state: Literal["sequential", "parallel", "reset"] = "sequential"
    """How Adam's second moment and step count pass from task to task in training."""


class EpisodeSettings(Section):
    """Training on the loss of queries: in closed form, and maml and its variants."""

    shots: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 5)
    """Support images per class; each meta-iteration draws one of these numbers. maml and its
    variants: train_shots instead."""
    queries: Positive = 5
    """Query images per class."""
    fit_prior: bool = False
    """bayes: start from the prior and noise of greatest likelihood on the training tasks, given the
    features before training; for few tasks. Where features are not trained, that is the
    mixed-effects model."""
    learning_rate: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 1e-3
    """Of Adam at the start; it falls linearly to `learning_rate_final`. bayes with `fit_prior`: 0,
    with `learning_rate_final` 0 and `meta_iterations` 1, leaves all as the fit found it."""
    learning_rate_final: Annotated[float, Field(ge=0, le=100)] = 2e-5
    multi_step_loss: bool = False
    """maml and its variants: the queries' loss after every inner step counts (MAML++, Antoniou et
    al., 2019), all alike at the start, the last alone at the end of training."""
    layer_step_sizes: bool = False
    """maml and proto-maml: learn a step size for each layer's weight or bias and each inner step
    (MAML++)."""


Algorithm = Literal[
    "reptile",
    "fomaml",
    "maml",
    "proto-maml",
    "anil",
    "meta-sgd",
    "protonet",
    "ridge",
    "bayes",
    "pretrain",
]
SCALED = ("anil", "meta-sgd")
"""Algorithms whose inner step has a size of its own for each parameter."""


class TrainSettings(Section):
    """Meta-training: by gradient steps, or through a closed-form head."""

    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    engine: Literal["auto", "eager", "native", "batched"] = "auto"
    precision: Precision = "float32"
    """bf16: the network's products and convolutions in bfloat16 (mixed precision, for CUDA);
    weights, optimiser, losses and heads stay in float32. Evaluation and export are in float32."""
    model: ModelSettings = ModelSettings()
    adapt: AdaptSetting = "all"
    """What is adapted to a task, and meta-trained; everything else is fixed: `all`, the `head`, the
    `norms` and the head, `{last: n}` (the last n blocks and the head), or a list of patterns of
    parameter names (`["layer4.*", "fc.*"]`); `none` for a closed-form head on frozen features.
    Towers have a setting each."""
    algorithm: Algorithm = "reptile"
    """Adapt by gradient steps: reptile, fomaml, maml, proto-maml (maml from a head of prototypes),
    anil (maml that adapts the head alone) or meta-sgd (maml that learns a step size for each
    parameter). Or in closed form on the network's
    features, which the network is then trained through: by the nearest prototype (protonet), by
    ridge regression on labels (ridge), or, for values, by Bayesian linear regression (bayes).
    pretrain: a classifier of all training classes; then the nearest prototype of its features."""
    tail_shots: Annotated[int, Field(ge=0, le=10**9)] = 0
    """fomaml: images of each class reserved for the last inner step; 0 reserves none."""
    ways: Ways = 5
    """Classes of a task, and outputs of the network; 1 for regression."""
    train_shots: Positive = 10
    episode: EpisodeSettings = EpisodeSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    inner_steps: Repeated = 5
    inner_batch: Repeated = 10
    replacement: bool = False
    meta_batch: Repeated = 5
    meta_iterations: Positive = 2000
    meta_step: Rate = 1.0
    meta_step_final: Annotated[float, Field(ge=0, le=100)] = 0.0
    checkpoint_every: Positive = 200
    """Meta-iterations between checkpoints; each is validated and is a point of the curve."""
    validation_tasks: Annotated[int, Field(ge=1, le=10**6)] = 50

    @property
    def closed_form(self) -> bool:
        """Whether a task is learnt in closed form, without gradient steps."""
        return self.algorithm in ("protonet", "ridge", "bayes", "pretrain")

    @property
    def head(self) -> str:
        """The closed-form head, by the name of the algorithm that trains through it."""
        return "protonet" if self.algorithm == "pretrain" else self.algorithm

    @property
    def second_order(self) -> bool:
        """Whether it is MAML or one of its variants, which differentiate the inner loop."""
        return self.algorithm in ("maml", "proto-maml", *SCALED)

    @property
    def scales_steps(self) -> bool:
        """Whether an inner step has a size of its own for each parameter."""
        return self.algorithm in SCALED or self.episode.layer_step_sizes

    @property
    def interpolates(self) -> bool:
        """Whether a meta-step moves towards adapted weights; otherwise Adam follows a gradient."""
        return self.algorithm in ("reptile", "fomaml")

    @property
    def images_per_class(self) -> int:
        """Images of each class that a training task takes."""
        if self.second_order:
            return self.train_shots + self.episode.queries
        if self.algorithm == "pretrain":
            return 1
        if self.closed_form:
            return max(self.episode.shots) + self.episode.queries
        return self.train_shots

    @model_validator(mode="before")
    @classmethod
    def _sgd_of_scaled_steps(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        episode = values.get("episode", {})
        of_layers = isinstance(episode, dict) and episode.get("layer_step_sizes")
        if values.get("algorithm") in SCALED or of_layers:
            optimizer = values.get("optimizer", {})
            if isinstance(optimizer, dict) and optimizer.get("name") == "sgd":
                values = values | {"optimizer": optimizer | {"name": "scaled_sgd"}}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> "TrainSettings":
        if self.adapt != "all" and not self.model.is_module:
            raise ValueError(
                "adapt: towers have a setting each; set train.model.towers' adapt"
                if self.model.towers
                else f"adapt: {self.model.name} is adapted as a whole; use all, or another "
                "train.model"
            )
        if self.adapt == "none" and not self.closed_form:
            raise ValueError(
                f"adapt = none: {self.algorithm} adapts by gradient steps; use head, or a "
                "closed-form algorithm (protonet, ridge)"
            )
        if self.model.towers and not self.closed_form:
            raise ValueError(
                f"model.towers: are for a closed-form head, not for {self.algorithm}; set "
                "algorithm to protonet or ridge"
            )
        if self.precision == "bf16" and (self.engine == "native" or self.second_order):
            what = "engine = native" if self.engine == "native" else f"algorithm = {self.algorithm}"
            raise ValueError(f"precision = bf16: {what} computes in float32; leave precision out")
        size = self.ways * self.train_shots
        if self.replacement and self.inner_batch > size:
            raise ValueError(
                f"inner_batch = {self.inner_batch} with replacement: a task has only "
                f"ways x train_shots = {size} images"
            )
        if self.second_order and self.optimizer.name == "adam":
            raise ValueError(
                f"algorithm = {self.algorithm}: its inner loop is plain SGD; set optimizer.name to "
                "sgd"
            )
        if self.second_order and self.optimizer.weight_decay != 1:
            raise ValueError(
                f"optimizer.weight_decay = {self.optimizer.weight_decay:g}: {self.algorithm} has "
                "none; set it to 1"
            )
        if self.episode.layer_step_sizes and self.algorithm not in ("maml", "proto-maml"):
            raise ValueError(
                f"episode.layer_step_sizes: is for maml and proto-maml, not for {self.algorithm}; "
                "leave it out"
            )
        if (self.optimizer.name == "scaled_sgd") != self.scales_steps:
            raise ValueError(
                f"optimizer.name = {self.optimizer.name}: steps of {self.algorithm} here "
                + (
                    "have sizes of their own; use scaled_sgd"
                    if self.scales_steps
                    else "all have the same size; use sgd"
                )
            )
        if self.optimizer.name == "scaled_sgd" and self.engine == "native":
            raise ValueError(
                f"engine = native: has one step size for all parameters, {self.algorithm} here "
                "more; use auto"
            )
        if self.episode.multi_step_loss and not self.second_order:
            raise ValueError(
                f"episode.multi_step_loss: is for maml and its variants, not for {self.algorithm}; "
                "leave it out"
            )
        fits = self.algorithm == "bayes" and self.episode.fit_prior
        if self.episode.learning_rate == 0 and (
            not fits or self.episode.learning_rate_final or self.meta_iterations > 1
        ):
            raise ValueError(
                "episode.learning_rate = 0: is for bayes with episode.fit_prior, which alone then "
                "learns; set learning_rate_final to 0 and meta_iterations to 1 too, or give a rate"
            )
        if self.tail_shots and self.algorithm != "fomaml":
            raise ValueError(f"tail_shots = {self.tail_shots}: only `algorithm: fomaml` has a tail")
        if self.tail_shots >= self.train_shots:
            raise ValueError(
                f"tail_shots = {self.tail_shots}: must be below train_shots = {self.train_shots}"
            )
        if self.tail_shots and self.inner_steps < 2:
            raise ValueError("inner_steps = 1: a tail needs at least one step before it")
        return self


class BesideSettings(TrainSettings):
    """A second learner, trained on the same data and measured on the same tasks."""

    algorithm: Literal["none"] | Algorithm = "none"  # type: ignore[assignment]
    """As in `train`; `none` trains no second learner."""

    @property
    def training(self) -> TrainSettings | None:
        """The settings of its training; None if there is no second learner."""
        return None if self.algorithm == "none" else TrainSettings(**self.model_dump())


def second_learner(algorithm: str) -> str:
    """Return what an evaluation calls the second learner, of this algorithm."""
    return f"{algorithm}-trained"


class EvaluateSettings(Section):
    """Few-shot evaluation on held-out classes and on cross-domain sources."""

    seed: Seed = 1
    tasks: Tasks = 600
    shots: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 5)
    queries: Positive = 1
    """Query images per class; the reference uses one. Of a sinusoid: other points."""
    steps: Annotated[int, Field(ge=0, le=1000)] = 50
    batch: Positive = 5
    ways: Ways | None = None
    """Classes of a task. None: as many as in training, or 5 for a closed-form learner; at most the
    classes there are. Learners that take gradient steps have at most as many as in training."""
    learner: Literal["trained", "prototypes", "ridge", "auto"] = "trained"
    """What a bundle is to learn tasks with: the learner as it was trained, or its features without
    adaptation and a closed-form head. Every row is compared with it. `auto`: what validation tasks
    choose of these, by the one-standard-error rule."""
    folds: Annotated[int, Field(ge=0, le=100)] = 0
    """Choose the learner, and the scale of intervals, by cross-validation: train all learners again
    on all but one of so many parts of the training and validation classes, and measure them on that
    part. 0: on the validation split, without training. For few classes and short trainings."""

    @field_validator("folds")
    @classmethod
    def _at_least_two(cls, folds: int) -> int:
        if folds == 1:
            raise ValueError("folds = 1: at least 2, or 0 for the validation split")
        return folds

    def task_ways(self, training: TrainSettings, classes: int) -> int:
        """Return the classes of a task, for a learner trained so and a split of so many classes."""
        any_number = training.closed_form and training.algorithm != "bayes"
        return self.ways or (min(5, classes) if any_number else training.ways)


class GateSettings(Section):
    """What a checkpoint must reach in its evaluation before it may be exported."""

    shots: Positive = 1
    mode: BatchNormMode = "transductive"
    accuracy: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Minimum mean accuracy on the held-out split."""
    mean_squared_error: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """For a regressor: maximum mean squared error on the held-out split; none by default."""
    above_random: Annotated[float, Field(ge=-1, le=1)] = 0.0
    """Minimum gain over the random initialisation adapted in the same way."""
    insist: bool = False
    """Export also what a simpler method beats on the same tasks: no adaptation, a linear probe, the
    network before training, or the raw input."""


class ExportSettings(Section):
    """From a checkpoint to the ONNX bundle."""

    name: Annotated[str, Field(min_length=1, max_length=100)] = "reptile"
    gate: GateSettings = GateSettings()
    max_steps: Annotated[int, Field(ge=1, le=100_000)] = 1000
    max_support: Annotated[int, Field(ge=1, le=100_000)] = 1000


class VerifySettings(Section):
    """Parity and conformance of a bundle against eager PyTorch."""

    seed: Seed = 2
    tasks: Tasks = 600
    shots: Positive = 1
    steps: Annotated[int, Field(ge=1, le=1000)] = 10


class Settings(Section):
    """All stages, as params.yaml and presets hold them."""

    prepare: PrepareSettings = PrepareSettings()
    train: TrainSettings = TrainSettings()
    beside: BesideSettings = BesideSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    export: ExportSettings = ExportSettings()
    verify: VerifySettings = VerifySettings()


class _Loader(yaml.SafeLoader):
    """YAML in which no key is given twice, where PyYAML would take the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                mark = node.value[place][0].start_mark
                raise yaml.MarkedYAMLError(problem=f"{key} is given twice", problem_mark=mark)
        return super().construct_mapping(node, deep)


def load_settings(path: Path, overrides: Sequence[str] = ()) -> Settings:
    """Read params.yaml or a preset and apply overrides such as `train.meta_iterations=500`.

    Raises:
        InputError: no such file, no valid YAML, or a setting that is unknown or out of range.
    """
    try:
        values = _Loader(path.read_text(encoding="utf-8")).get_single_data() or {}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; name one with --params") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold one mapping with the stages' names as keys")
    values.pop("paper", None)  # what a preset reproduces; no stage reads it
    for override in overrides:
        apply_change(values, override)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise InputError("\n".join(f"{path}: {line}" for line in describe(error))) from None


def parse_settings(section: type[AnySection], text: str) -> AnySection:
    """Read one stage's settings from JSON text, as Kubeflow passes them.

    Raises:
        InputError: not JSON, or a setting that is unknown or out of range.
    """
    try:
        return section.model_validate_json(text)
    except ValidationError as error:
        name = section.__name__
        raise InputError("\n".join(f"{name}: {line}" for line in describe(error))) from None


def describe(error: ValidationError) -> list[str]:
    """One line per problem: the setting, the value, and what is wrong with it."""
    lines: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"] if part not in OF_UNIONS)
        message = problem["msg"].removeprefix("Value error, ")
        message = message.replace("a valid tuple", "a list such as [a, b]").replace("Tuple", "List")
        if problem["type"] == "too_short" and problem["input"]:  # its items have errors already
            continue
        if where in lines:  # another type that it might have had
            lines[where] += message.replace("Input should be", " or")
        elif problem["type"] == "extra_forbidden":
            lines[where] = f"{where}: no such setting"
        elif problem["type"] in ("value_error", "missing"):  # of which the input is all around
            lines[where] = f"{where}: {message}"
        else:
            setting = f"{where} = " if where else ""
            lines[where] = f"{setting}{problem['input']!r}: {message}"
    return list(lines.values())


def apply_change(values: dict[str, Any], override: str) -> None:
    """Put one `--set` change, such as `train.ways=5`, into nested values.

    Raises:
        InputError: it is not written so, or its value is not YAML.
    """
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise InputError(f"--set {override}: write it as stage.setting=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--set {override}: {text!r} is not a YAML value") from None
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise InputError(f"--set {override}: {key} has no settings below it")
    values[keys[-1]] = value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
