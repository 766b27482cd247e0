"""From pixels to what a network was trained on: its channels, size, mean and deviation.

Part of the network, so that data, bundles and their consumers hold pixels in 0..1.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reptile.errors import InputError

GREY, RGB = 1, 3
LUMA = (0.299, 0.587, 0.114)  # of RGB in grey, as Pillow prepares grey images (ITU-R BT.601)


class Preprocess(nn.Module):
    """Grey to RGB or back, then a bilinear resize, then (x - mean) / deviation.

    The resize is two matrix products, with the weights of torch's antialiased one: they run in any
    ONNX runtime, and their gradient is two more.

    Args:
        image_shape: (C, H, W) of the data.
        channels: of the network, 0 for those of the data; grey images are repeated to RGB, and RGB
            ones are weighed to grey.
        size: height and width of the network's input; 0 keeps the data's.
        mean: a number a channel, or one for all; empty for 0.
        deviation: likewise; empty for 1.

    Raises:
        InputError: the data is not images, or has more or fewer channels than the network.
    """

    luma: Tensor | None
    rows: Tensor | None
    columns: Tensor | None
    mean: Tensor | None
    deviation: Tensor | None

    def __init__(
        self,
        image_shape: tuple[int, ...],
        *,
        channels: int = 0,
        size: int = 0,
        mean: Sequence[float] = (),
        deviation: Sequence[float] = (),
    ) -> None:
        super().__init__()
        if len(image_shape) != 3:
            raise InputError(f"inputs of shape {image_shape} are not images [C, H, W]")
        have, height, width = image_shape
        self.channels = channels or have
        if self.channels != have and {have, self.channels} != {GREY, RGB}:
            raise InputError(
                f"images of {have} channels: the network needs {self.channels}; "
                f"set prepare.channels = {'grey' if self.channels == 1 else 'rgb'}"
            )
        luma = torch.tensor(LUMA).reshape(-1, 1, 1) if have > self.channels else None
        self.register_buffer("luma", luma, persistent=False)
        for name, values in (("mean", mean), ("deviation", deviation)):
            if len(values) not in {0, 1, self.channels}:
                raise InputError(
                    f"train.model.{name} has {len(values)} numbers: give one, or one for each of "
                    f"the {self.channels} channels"
                )
            tensor = torch.tensor(values).reshape(-1, 1, 1) if values else None
            self.register_buffer(name, tensor, persistent=False)
        same = (size or height, size or width) == (height, width)
        for name, length in (("rows", height), ("columns", width)):
            matrix = None if same else resize_matrix(length, size)
            self.register_buffer(name, matrix, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map pixels [B, C, H, W] to the network's input."""
        if self.luma is not None:
            x = (x * self.luma.to(x)).sum(-3, keepdim=True)
        elif x.shape[-3] != self.channels:
            x = x.expand(*x.shape[:-3], self.channels, *x.shape[-2:])
        if self.rows is not None and self.columns is not None:
            x = self.rows.to(x) @ x @ self.columns.to(x).T
        if self.mean is not None:
            x = x - self.mean.to(x)
        return x if self.deviation is None else x / self.deviation.to(x)


def resize_matrix(length: int, size: int) -> Tensor:
    """Return the antialiased linear interpolation of `length` values to `size`, [size, length]."""
    columns = torch.eye(length)[None, None]
    resized = F.interpolate(columns, (size, length), mode="bilinear", antialias=True)
    return resized[0, 0]
