"""A convolutional network for signals: conv4's blocks along one axis, time."""

from torch import Tensor, nn

WIDTH = 5  # samples that a convolution sees
BLOCKS = 3


class Conv1d(nn.Module):
    """Three convolutions of stride 2, an average over time, and a linear head.

    Batch norm comes before the first convolution too, so channels may have any scale.

    Args:
        filters: channels of each convolution.
        channels: of a signal.
        outputs: of the head.
    """

    def __init__(self, filters: int, channels: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        self.blocks = nn.Sequential()
        for _ in range(BLOCKS):
            self.blocks.append(
                nn.Sequential(
                    nn.Conv1d(channels, filters, WIDTH, stride=2, padding=WIDTH // 2),
                    nn.BatchNorm1d(filters),
                    nn.ReLU(),
                )
            )
            channels = filters
        self.head = nn.Linear(filters, outputs)

    def forward(self, signals: Tensor) -> Tensor:
        """Map signals [B, channels, time], of any length, to [B, outputs]."""
        outputs: Tensor = self.head(self.blocks(self.norm(signals)).mean(2))
        return outputs
