"""A convolutional network for signals."""

from torch import Tensor, nn

WIDTH = 5  # samples that a convolution sees
BLOCKS = 3


class Conv1d(nn.Module):
    """Three convolutions of stride 2 along time, and a linear head on all they give.

    The head sees when something happens, so signals should begin at the same event. The only batch
    norm comes first, so channels may have any scale.

    Args:
        filters: channels of each convolution.
        channels: of a signal.
        samples: of a signal.
        outputs: of the head.
    """

    def __init__(self, filters: int, channels: int, samples: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        self.blocks = nn.Sequential()
        for _ in range(BLOCKS):
            convolution = nn.Conv1d(channels, filters, WIDTH, stride=2, padding=WIDTH // 2)
            self.blocks.append(nn.Sequential(convolution, nn.ReLU()))
            channels, samples = filters, (samples + 1) // 2
        self.head = nn.Linear(filters * samples, outputs)

    def forward(self, signals: Tensor) -> Tensor:
        """Map signals [B, channels, samples] to [B, outputs]."""
        outputs: Tensor = self.head(self.blocks(self.norm(signals)).flatten(1))
        return outputs
