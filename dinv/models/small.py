"""Small networks: made to be trained, inverted and distilled on a CPU."""

from __future__ import annotations

from torch import Tensor, nn

from dinv.models.cifar import conv3x3, vgg


class ConvUnit(nn.Module):
    """conv-BN-ReLU, with the input added where the shapes allow it."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = (
            conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs), nn.ReLU(),
        )  # fmt: skip
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn(self.conv(x)))
        return x + y if self.residual else y


def resnet_small(stages: list[tuple[int, int]], classes: int, channels: int = 3) -> nn.Sequential:
    """A thin residual network; each stage is (width, units) and halves the resolution but the first.

    Wide maps are kept for low resolutions: at 32x32 a step of inversion on a CPU is ruled by memory
    traffic, not by arithmetic.
    """
    layers: list[nn.Module] = []
    for stage, (width, units) in enumerate(stages):
        for unit in range(units):
            layers.append(ConvUnit(channels, width, 2 if stage > 0 and unit == 0 else 1))
            channels = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
    )


RESNET_SMALL = [(24, 1), (48, 2), (96, 3), (192, 2)]  # 0.74 M parameters, 30 M multiply-adds
RESNET_TINY = [(16, 1), (32, 1), (64, 2), (128, 1)]  # 0.14 M parameters, 6 M multiply-adds: a student
RESNET_DIGITS = [(16, 1), (32, 2), (64, 1)]
VGG_SMALL = [32, "M", 64, 64, "M", 128, "M", 256]  # 0.43 M parameters, 24 M multiply-adds
VGG_DIGITS = [16, 32, "M", 32]

__all__ = [
    "RESNET_DIGITS", "RESNET_SMALL", "RESNET_TINY", "VGG_DIGITS", "VGG_SMALL", "ConvUnit", "resnet_small",
    "vgg",
]  # fmt: skip
