"""A trial pass when a network is first used: it settles what can be settled, and refuses what cannot work.

Two random images go through the network and through a private copy, forward and back. From then on it is
known in which memory format the copy answers as the original does, which layers are called, where the logits
come from, and whether a gradient reaches the pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from dinv.models.classifier import Classifier, Unfit, duplicate, evaluating, held_tensors
from dinv.precision import own_defaults

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Trial:
    """What two images told of a network.

    Attributes:
        layout: the memory format that it takes: "channels_last", or "contiguous_format" where it uses `view`.
        hooks: whether it answers only through forward hooks of its own, which a private copy then keeps.
        calls: how often each layer is called in eval mode, by name; layers that are not are missing.
        head: the layer that gives the logits, linear or a 1x1 convolution; "": neither.
        pixels: whether a gradient reaches the pixels.
    """

    layout: str  # which every pickler takes
    hooks: bool
    calls: dict[str, int]
    head: str
    pixels: bool


def preflight(network: Classifier, pixels: bool = False) -> Trial:
    """The trial of `network`, made once for its structure, device and type.

    Args:
        pixels: the pixels will be optimised: a gradient has to reach them.

    Raises:
        TypeError: a bare module.
        Unfit: a ValueError that names what was found and what to do.
    """
    if not isinstance(network, Classifier):
        advice = "Classifier.wrap(net, mean=..., std=..., size=..., classes=...)"
        raise TypeError(f"expected a Classifier, got a {type(network).__name__}: {advice} makes one")
    known, mark = vars(network).get("_trial"), _fingerprint(network)
    if known is None or known[0] != mark:
        network.mean, network.std = (x.to(_device(network)) for x in (network.mean, network.std))
        known = network._trial = (_fingerprint(network), _try(network))
        network._layout = known[1].layout
    if pixels and not known[1].pixels:
        advice = "it must not detach them, round them or work under no_grad"
        raise Unfit(f"no gradient of {network.name} reaches its pixels: {advice}")
    return known[1]


def private(network: Classifier) -> Classifier:
    """A copy to work with, in float32 or float64 and in the layout that the trial found."""
    trial = preflight(network)
    return _prepared(duplicate(network, trial.hooks), trial.layout)


def _prepared(own: Classifier, layout: str) -> Classifier:
    own._layout = layout
    return (own.float() if own.dtype in HALVES else own).to(memory_format=own.layout)


def _fingerprint(network: Classifier) -> tuple:
    state = chain(network.named_parameters(), network.named_buffers())
    tensors = tuple((name, x.shape, x.dtype, x.device) for name, x in state)
    hooks = sum(len(module._forward_hooks) for module in network.modules())
    return network.size, len(network.classes), hooks, tensors


def _device(network: Classifier) -> torch.device:
    devices = {x.device for x in chain(network.net.parameters(), network.net.buffers())}
    if len(devices) > 1:
        raise Unfit(f"{network.name} lies on {', '.join(sorted(map(str, devices)))}: move it to one device")
    (device,) = devices or {network.mean.device}
    if device.type == "meta":
        raise Unfit(f"{network.name} has no weights yet, they are on the meta device: load them first")
    return device


def _try(network: Classifier) -> Trial:
    device, generator = network.mean.device, torch.Generator("cpu").manual_seed(0)
    shape = (2, *network.shape)
    images = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu").to(device)
    own_draws = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with evaluating(network), own_draws, own_defaults(network.dtype):
        expected = _answer(network, images)
        kept, trial = any(module._forward_hooks for module in network.modules()), None
        for hooks in (False, True) if kept else (False,):
            for layout in ("channels_last", "contiguous_format"):
                if kept or any(True for _ in held_tensors(network)):
                    _answer(network, torch.zeros_like(images))  # a copy must not answer by what lies about
                copied = _prepared(duplicate(network, hooks), layout).freeze()
                try:
                    trial, logits = _watched(copied, images, hooks)
                except Exception as error:  # of the user's own forward
                    reason = f"fails ({_first_line(error)})"
                    continue
                if _same(logits, expected, network.dtype):
                    return trial
                reason = "answers otherwise than the network itself"
        if trial is not None and not _same(_answer(network, images), expected, network.dtype):
            return trial  # it draws random numbers in eval mode as well: nothing to compare
    advice = "hooks or tensors outside its layers, which a copy cannot share, must go"
    raise Unfit(f"a private copy of {network.name} {reason}: {advice}")


@torch.no_grad()
def _answer(network: Classifier, images: Tensor) -> Tensor:
    try:
        return network(images)
    except Unfit:
        raise
    except Exception as error:  # of the user's own forward
        asked = f"as size={network.size} and {network.channels} channels ask for"
        shape = tuple(images.shape)
        raise Unfit(f"{network.name} fails on images {shape}, {asked}: {_first_line(error)}") from error


def _watched(network: Classifier, images: Tensor, hooks: bool) -> tuple[Trial, Tensor]:
    """What the layers of this copy do with the images, and its logits."""
    calls: dict[str, int] = {}
    outputs: dict[str, Tensor] = {}  # of layers that may give the logits

    def count(name: str, module: nn.Module, inputs: Any) -> None:
        calls[name] = calls.get(name, 0) + 1

    def keep(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        outputs.pop(name, None)
        outputs[name] = output

    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # takes no hooks
        module.register_forward_pre_hook(partial(count, name))
        if _outputs(module) == len(network.classes):
            module.register_forward_hook(partial(keep, name))
    with torch.enable_grad():
        pixels = images.detach().clone().requires_grad_(True)
        logits = network(pixels)
        weights = torch.linspace(1, 2, logits.numel(), device=logits.device).view_as(logits)
        names = [name for name, output in outputs.items() if output.requires_grad]
        gradients: list[Tensor | None] = [None] * (1 + len(names))
        if logits.requires_grad:
            among = [pixels, *(outputs[name] for name in names)]
            gradients = torch.autograd.grad((logits * weights).sum(), among, allow_unused=True)
    heads = [name for name, gradient in zip(names, gradients[1:], strict=True) if gradient is not None]
    reached, apart = gradients[0] is not None, (logits[0] != logits[1]).any()
    if reached and not gradients[0].any() and apart:  # answers that differ without a slope between them
        reached = False
    return Trial(network._layout, hooks, calls, heads[-1] if heads else "", reached), logits.detach()


def _outputs(module: nn.Module) -> int:
    """Outputs of a layer that may give the logits, else 0."""
    if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1:
        return module.out_channels
    return module.out_features if isinstance(module, nn.Linear) else 0


def _same(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    if one.shape != other.shape:
        return False
    one, other = one.cpu().double(), other.cpu().double()
    bound = 0.03 if dtype in HALVES else 1e-3
    return bool((one - other).norm() <= bound * other.norm() + 1e-6)


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0] or "no message"
    return f"{type(error).__name__}: {text[:200]}"
