"""From settings to a network."""

from reptile.errors import InputError
from reptile.models.base import Model
from reptile.models.conv4 import Conv4
from reptile.models.mlp import MLP
from reptile.objectives import CLASSIFICATION, Objective
from reptile.settings import ModelSettings


def build_model(
    settings: ModelSettings,
    outputs: int,
    image_shape: tuple[int, ...],
    objective: Objective = CLASSIFICATION,
) -> Model:
    """Build the network that `settings` names.

    Args:
        settings: its name and sizes.
        outputs: a classifier's ways, or the number of values that a regressor predicts.
        image_shape: (C, H, W) of an input; a point of n coordinates is (n, 1, 1).
        objective: what the outputs are for.
    """
    if settings.name == "mlp":
        return MLP(outputs, image_shape, settings, objective)
    if len(image_shape) != 3 or min(image_shape[1:]) < 2:
        raise InputError(f"conv4 needs images of at least 2x2 pixels, not inputs of {image_shape}")
    return Conv4(outputs, image_shape, settings, objective)
