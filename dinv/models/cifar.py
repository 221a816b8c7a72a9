"""Networks for small images: those of the paper's CIFAR-10 tables, and thin ones that train on a CPU.

Sources: ResNet (He et al. 2016) with the 3x3 stem used on CIFAR; VGG-11 with BatchNorm (Simonyan and
Zisserman 2015) with one linear layer.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


def _head(width: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN plus shortcut, then ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet(blocks: list[int], classes: int, channels: int = 3) -> nn.Sequential:
    """ResNet for 32x32 images: 3x3 stem, four stages of 64, 128, 256, 512 channels."""
    layers: list[nn.Module] = [conv3x3(channels, 64), nn.BatchNorm2d(64), nn.ReLU()]
    width = 64
    for stage, count in enumerate(blocks):
        for block in range(count):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(BasicBlock(width, 64 * 2**stage, stride))
            width = 64 * 2**stage
    return nn.Sequential(*layers, *_head(width, classes))


def vgg(plan: list[int | str], classes: int, channels: int = 3) -> nn.Sequential:
    """VGG with BatchNorm: an integer is a 3x3 convolution of that width, "M" a 2x2 max pool."""
    layers: list[nn.Module] = []
    for item in plan:
        if item == "M":
            layers.append(nn.MaxPool2d(2, ceil_mode=True))  # so that images below 32x32 go through
        else:
            layers += [conv3x3(channels, item), nn.BatchNorm2d(item), nn.ReLU()]
            channels = item
    return nn.Sequential(*layers, *_head(channels, classes))


class ConvUnit(nn.Module):
    """conv-BN-ReLU, with the input added where the shapes allow it."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv, self.bn = conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn(self.conv(x)))
        return x + y if self.residual else y


def resnet_small(stages: list[tuple[int, int]], classes: int, channels: int = 3) -> nn.Sequential:
    """A thin residual network: each stage is (width, units), and all but the first halve the resolution.

    Wide maps stand at low resolutions only: on a CPU, a step of inversion at 32x32 is limited by memory
    traffic, not by arithmetic.
    """
    layers: list[nn.Module] = []
    for stage, (width, units) in enumerate(stages):
        for unit in range(units):
            layers.append(ConvUnit(channels, width, 2 if stage > 0 and unit == 0 else 1))
            channels = width
    return nn.Sequential(*layers, *_head(channels, classes))


VGG11 = [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"]
RESNET_SMALL = [(24, 1), (48, 2), (96, 3), (192, 2)]  # 0.74 M parameters, 30 M multiply-adds
RESNET_TINY = [(16, 1), (32, 1), (64, 2), (128, 1)]  # 0.14 M parameters, 6 M multiply-adds: a student
RESNET_DIGITS = [(16, 1), (32, 2), (64, 1)]
VGG_SMALL = [32, "M", 64, 64, "M", 128, "M", 256]  # 0.43 M parameters, 24 M multiply-adds
VGG_DIGITS = [16, 32, "M", 32]
