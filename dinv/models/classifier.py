"""The classifier: a network and the normalisation that belongs to it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = int | tuple[int, int]  # side of a square in pixels, or height and width


class Unfit(ValueError):
    """A network that cannot be used as it is: the message says what was found and what to do."""


class Classifier(nn.Module):
    """A network that takes images in [0, 1] and owns their normalisation.

    Its logits may be a tensor, `.logits`, `["logits"]` or the first of a tuple. A single logit z counts as
    two classes with logits -z/2 and z/2.

    Args:
        net: any module from normalised NCHW images to logits of shape (N, K).
        mean, std: one number per channel, in units of [0, 1] images. Noise and learning rate of an inversion
            are in units of `std`: a network of inputs from 0 to 255 is better given them by a layer of its
            own in front, `nn.Sequential(Times255(), net)`, than by `std=1 / 255`.
        size: side of the square images that the network expects, in pixels, or (height, width).
        classes, name: the K class names, or K; what tables call the network (by default its class's name).
    """

    _layout = "channels_last"  # the trial pass finds who needs another

    def __init__(
        self,
        net: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        size: Size,
        classes: Sequence[str] | int,
        name: str = "",
    ) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean {mean} and std {std} must have one positive std per channel")
        if max(*mean, *std) > 1:
            raise ValueError(f"mean {mean} and std {std} are of images in [0, 1]: divide them by 255")
        weight = next(net.parameters(), torch.empty(0, dtype=torch.float32, device="cpu"))
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.net = net
        for key, values in {"mean": mean, "std": std}.items():
            values = torch.tensor(values, dtype=dtype, device=weight.device)
            self.register_buffer(key, values.view(1, -1, 1, 1))
        self.size = size if isinstance(size, int) else sides(size)
        self.classes = tuple(map(str, range(classes)) if isinstance(classes, int) else classes)
        self.name = name or type(net).__name__

    @classmethod
    def wrap(cls, net: nn.Module, *, weights: Any = None, name: str = "", **given: Any) -> Classifier:
        """`net` as a classifier, by what is known of it.

        Args:
            weights: torchvision's, such as ResNet50_Weights.DEFAULT, which know `mean`, `std`, `size` and
                `classes`; a network of timm knows them by itself.
            given: any of the four, instead of what is known.

        Raises:
            ValueError: one of them is neither known nor given.
        """
        config, known = getattr(net, "pretrained_cfg", None), {}
        if weights is not None:
            preset = weights.transforms()
            known = {"mean": preset.mean, "std": preset.std, "size": preset.crop_size[0]}
            known["classes"] = weights.meta["categories"]
        elif config:
            known, (_, height, width) = {name: config[name] for name in ("mean", "std")}, config["input_size"]
            known["size"] = height if height == width else (height, width)
            known["classes"] = config.get("label_names") or _names(net.num_classes, config["num_classes"])
        known = known | {name: value for name, value in given.items() if value is not None}
        missing = [name for name in ("mean", "std", "size", "classes") if name not in known]
        if missing:
            example = "mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26), size=32, classes=10"
            advice = f"name them, as in wrap(net, {example})"
            raise ValueError(f"{type(net).__name__} does not say its {', '.join(missing)}: {advice}")
        return cls(net, **known, name=name)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.mean.shape[1], *sides(self.size)

    @property
    def layout(self) -> torch.memory_format:
        """Of weights and images."""
        return getattr(torch, self._layout)

    @property
    def channels(self) -> int:
        return self.mean.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.net.parameters(), self.mean).dtype

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W) in [0, 1]."""
        return self.logits((images - self.mean) / self.std)

    def logits(self, pixels: Tensor) -> Tensor:
        """Logits (N, K) of normalised images (N, C, H, W)."""
        if self.layout == torch.contiguous_format:
            pixels = pixels.contiguous()
        return _logits_in(self.net(pixels.to(self.dtype)), self)

    def digest_parts(self) -> tuple:
        """For `files.digest`: all that decides its answers, but the source of its modules."""
        return self.name, self.size, self.classes, repr(self), dict(self.state_dict())

    def freeze(self) -> Classifier:
        """Eval mode and no gradient for any parameter, as a teacher needs it. Returns itself."""
        return self.eval().requires_grad_(False)

    def check(self, images: Tensor) -> None:
        """Raise a ValueError unless `images` are in the shape and range this network was made for."""
        if images.dim() != 4 or images.shape[1:] != self.shape:
            raise ValueError(
                f"{self.name} takes images of shape (N, {', '.join(map(str, self.shape))}), "
                f"got {tuple(images.shape)}: resize or choose another network"
            )
        if images.shape[0] == 0:
            raise ValueError(f"{self.name} was given an empty batch: at least one image is needed")
        check_range(images)


def _names(outputs: int, trained: int) -> Sequence[str] | int:
    """The class names of a network of timm: those of ImageNet where it still has its outputs."""
    if not outputs == trained == 1000:
        return outputs
    from torchvision.models import ResNet50_Weights  # takes seconds

    return ResNet50_Weights.DEFAULT.meta["categories"]


def _logits_in(output: Any, network: Classifier) -> Tensor:
    """The logits (N, K) in what a network gives; Unfit if there are none, or another number of them."""
    found, count = output, len(network.classes)
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", output[0] if isinstance(output, tuple | list) and output else None)
    if not isinstance(found, Tensor) or not found.is_floating_point():
        kind = f"{type(output).__name__}" + (
            f" of {', '.join(output)}" if isinstance(output, Mapping) else ""
        )
        raise Unfit(f"{network.name} gives a {kind}, no logits (N, K): wrap it in a module that returns them")
    if found.dim() == 1:
        found = found[:, None]
    elif found.dim() > 2 and found[0, 0].numel() == 1:
        found = found.flatten(1)
    if found.dim() == 2 and found.shape[1] == 1:
        if count == 2:
            return torch.cat([-found / 2, found / 2], dim=1)
        advice = "it is of two classes, such as ('healthy', 'tumour')"
        raise Unfit(f"{network.name} has 1 output, a single logit, and {count} class names: {advice}")
    if found.dim() != 2 or found.shape[1] != count:
        what = f"{found.shape[1]} outputs" if found.dim() == 2 else f"outputs of shape {tuple(found.shape)}"
        raise Unfit(f"{network.name} has {what} and {count} class names: it needs a name for every output")
    return found


def places(one: Classifier, other: Classifier) -> list[int] | None:
    """Where the classes of `one` stand among the outputs of `other`; None: in the same order.

    By name, unless one of them only numbers its classes: then both must have the same order.

    Raises:
        ValueError: another number of classes, or names that the other does not have.
    """
    if len(one.classes) != len(other.classes):
        pair = [f"{net.name} has {len(net.classes)}" for net in (one, other)]
        raise ValueError(f"two networks need the same classes: {', '.join(pair)}")
    numbers = tuple(map(str, range(len(one.classes))))
    if one.classes == other.classes or numbers in (one.classes, other.classes):
        return None
    missing = [name for name in one.classes if name not in other.classes]
    if missing:
        advice = f"if only the names differ, {other.name}.classes = {one.name}.classes"
        raise ValueError(f"{other.name} knows no class {missing[0]!r}, which {one.name} has: {advice}")
    return [other.classes.index(name) for name in one.classes]


def sides(size: Size) -> tuple[int, int]:
    """Height and width."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def held_tensors(network: nn.Module) -> Iterator[Tensor]:
    """Tensors that modules hold besides weights and buffers, by themselves or in a list or dictionary."""
    for module in network.modules():
        for key, held in vars(module).items():
            if key not in ("_parameters", "_buffers"):
                held = list(held.values()) if isinstance(held, dict) else held
                among = held if isinstance(held, list | tuple) else [held]
                yield from (value for value in among if isinstance(value, Tensor))


def duplicate(network: Classifier, hooks: bool = True) -> Classifier:
    """A deep copy. Tensors that a forward pass left behind, which PyTorch does not copy, come detached.

    Args:
        hooks: False leaves forward and backward hooks behind.

    Raises:
        Unfit: it cannot be copied.
    """
    memo = {id(x): x.detach().clone() for x in held_tensors(network) if not x.is_leaf}
    try:
        with torch.no_grad():  # or TorchScript's weights would be results of a computation
            copied = copy.deepcopy(network, memo)
    except Exception as error:  # of whatever the network holds
        reason = " ".join(str(error).split())[:150]
        advice = "let it hold layers and weights only"
        raise Unfit(f"{network.name} cannot be copied ({reason}): {advice}") from error
    for module in copied.modules() if not hooks else ():
        for kind in ("_forward_hooks", "_backward_hooks"):
            getattr(module, kind).clear()
    return copied


def check_range(images: Tensor) -> None:
    """Raise a ValueError if these images are floats that cannot be in [0, 1], apart from rounding."""
    if images.is_floating_point() and images.numel():
        low, high = torch.stack(images.detach().aminmax()).tolist()
        if not -0.01 <= low <= high <= 1.01:
            hint = "divide by 255" if low >= 0 and high > 2 else "hand them over before Normalize"
            raise ValueError(f"images must lie in [0, 1], found {low:.3g} to {high:.3g}: {hint}")


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """Images on `device`, as a classifier takes them: uint8 becomes float32 in [0, 1]."""
    images = images.to(device)
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def resized(images: Tensor, size: Size) -> Tensor:
    """Images (N, C, H, W) of another size and the same type, bilinear and antialiased."""
    if images.shape[2:] == sides(size):
        return images
    result = F.interpolate(images.float(), sides(size), mode="bilinear", align_corners=False, antialias=True)
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
