"""Use a bundle: adapt it to a new task from a few labelled images, then predict.

Needs numpy and ONNX Runtime only. Not for training, exporting or serving over HTTP.

    from reptile.runtime import FewShotModel

    model = FewShotModel.load("artifacts/bundle")
    adapted = model.adapt(images, ["cat", "cat", "dog", "dog"])   # pixels 0..255, [N, C, H, W]
    labels, probabilities = adapted.predict(more_images)
    adapted.save("cats-and-dogs.safetensors")

A bundle of a regressor is opened by `FewShotRegressor` instead, adapted to points (x, y), and
predicts values, and intervals where the bundle learns in closed form.

An error that a caller can fix raises `reptile.errors.InputError`, which is a ValueError.
"""

from reptile.runtime.model import AdaptedModel, FewShotModel, Prediction
from reptile.runtime.regressor import AdaptedRegressor, FewShotRegressor, Interval

__all__ = [
    "AdaptedModel",
    "AdaptedRegressor",
    "FewShotModel",
    "FewShotRegressor",
    "Interval",
    "Prediction",
]
