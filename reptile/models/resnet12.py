"""ResNet-12, the usual network of few-shot learning beside conv4 (as in arXiv 1904.03758)."""

from torch import Tensor, nn


class ResNet12(nn.Module):
    """Four residual blocks, an average over the image, and a linear head.

    Args:
        filters: channels of the first block; the others have 2.5, 5 and 10 times as many
            (64, 160, 320, 640).
        channels: of an image.
        outputs: of the head.
    """

    def __init__(self, filters: int, channels: int, outputs: int) -> None:
        super().__init__()
        widths = (filters, filters * 5 // 2, filters * 5, filters * 10)
        self.blocks = nn.Sequential()
        for width in widths:
            self.blocks.append(ResidualBlock(channels, width))
            channels = width
        self.head = nn.Linear(channels, outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] of at least 16x16 pixels to [B, outputs]."""
        outputs: Tensor = self.head(self.blocks(images).mean((2, 3)))
        return outputs


class ResidualBlock(nn.Module):
    """Three 3x3 convolutions with batch norm, a projected shortcut, and 2x2 max-pooling."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(channels, width, 1, bias=False)
        self.shortcut_norm = nn.BatchNorm2d(width)
        self.activate = nn.LeakyReLU(0.1)
        self.pool = nn.MaxPool2d(2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(
                    module.weight, 0.1, mode="fan_out", nonlinearity="leaky_relu"
                )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels, H, W] to [B, width, H / 2, W / 2]."""
        y = self.activate(self.norm1(self.conv1(x)))
        y = self.activate(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y)) + self.shortcut_norm(self.shortcut(x))
        pooled: Tensor = self.pool(self.activate(y))
        return pooled
