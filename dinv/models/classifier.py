"""The classifier: a network and the normalisation that belongs to it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    """A network that takes images in [0, 1] and owns their normalisation.

    Everything in `dinv` hands a classifier float32 NCHW images in [0, 1]; what the weights were
    trained with (mean, standard deviation, size) is the classifier's own business.

    Args:
        net: any module from normalised NCHW images to logits of shape (N, K).
        mean, std: per-channel normalisation, in units of [0, 1] images.
        size: side of the square images that the network was made for, in pixels.
        classes: the K class names.
        name: how the network is called in tables.
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
        self.size = size
        self.classes = tuple(classes)
        self.name = name or type(net).__name__

    @property
    def channels(self) -> int:
        return self.mean.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W) in [0, 1]."""
        return self.net((images - self.mean) / self.std)

    def freeze(self) -> Classifier:
        """Eval mode and no gradient for any parameter: what a teacher is. Returns itself."""
        self.eval().requires_grad_(False)
        return self

    def check(self, images: Tensor) -> None:
        """Raise a ValueError unless `images` has the shape this network was made for."""
        wanted = (self.channels, self.size, self.size)
        if images.dim() != 4 or tuple(images.shape[1:]) != wanted:
            raise ValueError(
                f"{self.name} takes images of shape (N, {', '.join(map(str, wanted))}), "
                f"got {tuple(images.shape)}: resize or choose another network"
            )
        if images.shape[0] == 0:
            raise ValueError(f"{self.name} was given an empty batch: at least one image is needed")


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """Images as a classifier takes them, on `device`: bytes become float32 in [0, 1]."""
    images = images.to(device)
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def resized(images: Tensor, size: int) -> Tensor:
    """Square images at another size, bilinear and antialiased; kind, range and, where equal, bytes stay."""
    if images.shape[-1] == size:
        return images
    made = F.interpolate(images.float(), (size, size), mode="bilinear", align_corners=False, antialias=True)
    return made.round().clamp(0, 255).to(torch.uint8) if images.dtype == torch.uint8 else made


@contextmanager
def inputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """While open, what `layer` is given, one entry a call."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 where it pays, that is on CUDA; elsewhere float32 as it is."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode while open; afterwards every module has its own mode back, a frozen BatchNorm too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def structure(network: Classifier) -> tuple:
    """What decides a network's answers in eval mode besides its tensors' values: equal for two that differ
    by weights alone.

    Types and attributes of all modules, shapes of all tensors. An attribute that cannot be compared, and a
    module with a hook, are equal to themselves alone.
    """
    modules = []
    for name, module in network.net.named_modules():
        own = [(key, value) for key, value in vars(module).items() if key not in _OF_EVERY_MODULE]
        values = tuple((key, _comparable(value)) for key, value in own)
        hooked = module._forward_hooks or module._forward_pre_hooks
        modules.append((name, type(module), values, id(module) if hooked else None))
    shapes = tuple((name, tensor.shape) for name, tensor in network.state_dict().items())
    return (network.size, tuple(modules), shapes)


def _comparable(value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


def parameter_count(module: nn.Module) -> int:
    """Number of scalar parameters."""
    return sum(p.numel() for p in module.parameters())
