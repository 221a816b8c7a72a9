"""The classifier: a network and the normalisation that belongs to it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    """A network that takes images in [0, 1] and owns their normalisation.

    Args:
        net: any module from normalised NCHW images to logits of shape (N, K).
        mean, std: one number per channel, in units of [0, 1] images.
        size: side of the square images that the network expects, in pixels.
        classes, name: the K class names; what tables call the network (by default its class's name).
    """

    def __init__(
        self,
        net: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        size: int,
        classes: Sequence[str],
        name: str = "",
    ) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean {mean} and std {std} must have one positive std per channel")
        self.net = net
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))
        self.size, self.classes, self.name = size, tuple(classes), name or type(net).__name__

    @property
    def channels(self) -> int:
        return self.mean.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W) in [0, 1]."""
        return self.net((images - self.mean) / self.std)

    def freeze(self) -> "Classifier":
        """Eval mode and no gradient for any parameter, as a teacher needs it. Returns itself."""
        return self.eval().requires_grad_(False)

    def check(self, images: Tensor) -> None:
        """Raise a ValueError unless `images` has the shape this network was made for."""
        if images.dim() != 4 or images.shape[1:] != (self.channels, self.size, self.size):
            raise ValueError(
                f"{self.name} takes images of shape (N, {self.channels}, {self.size}, {self.size}), "
                f"got {tuple(images.shape)}: resize or choose another network"
            )
        if images.shape[0] == 0:
            raise ValueError(f"{self.name} was given an empty batch: at least one image is needed")


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """Images on `device`, as a classifier takes them: uint8 becomes float32 in [0, 1]."""
    images = images.to(device)
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def resized(images: Tensor, size: int) -> Tensor:
    """Square images (N, C, H, H) of the same type as (N, C, size, size), bilinear and antialiased."""
    if images.shape[-1] == size:
        return images
    result = F.interpolate(images.float(), (size, size), mode="bilinear", align_corners=False, antialias=True)
    return result.round().clamp(0, 255).to(torch.uint8) if images.dtype == torch.uint8 else result


@contextmanager
def inputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """While open, the list grows by the input of `layer` at each call."""
    calls: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0]))
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode while open; afterwards each module has its own mode back, frozen BatchNorm layers too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def parameter_count(module: nn.Module) -> int:
    """Number of scalar parameters."""
    return sum(p.numel() for p in module.parameters())
