"""Networks by name: the project's own, torchvision's and timm's, in one call."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import dinv.models.cifar as cifar
from dinv.checks import near
from dinv.files import sha256_file
from dinv.models.checkpoints import CorruptCheckpoint, load_weights
from dinv.models.classifier import Classifier
from dinv.models.pretrained import library_names, load_pretrained
from dinv.precision import settled

WEIGHTS = Path(__file__).parent.parent / "weights"


@dataclass(frozen=True)
class Domain:
    """What a network is trained on: its images' normalisation and side in pixels, its class names."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    classes: tuple[str, ...]


_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
DOMAINS = {
    "cifar10": Domain((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 32, tuple(_CIFAR10.split())),
    "mnist": Domain((0.1307,), (0.3081,), 28, tuple("0123456789")),
    "digits": Domain((0.305,), (0.376,), 8, tuple("0123456789")),
}

# name -> (classes, channels) -> network
NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "cifar_resnet18": lambda k, c: cifar.resnet([2, 2, 2, 2], k, c),
    "cifar_resnet34": lambda k, c: cifar.resnet([3, 4, 6, 3], k, c),
    "cifar_vgg11": lambda k, c: cifar.vgg(cifar.VGG11, k, c),
    "resnet_small": lambda k, c: cifar.resnet_small(cifar.RESNET_SMALL, k, c),
    "resnet_tiny": lambda k, c: cifar.resnet_small(cifar.RESNET_TINY, k, c),
    "vgg_small": lambda k, c: cifar.vgg(cifar.VGG_SMALL, k, c),
    "resnet_digits": lambda k, c: cifar.resnet_small(cifar.RESNET_DIGITS, k, c),
    "vgg_digits": lambda k, c: cifar.vgg(cifar.VGG_DIGITS, k, c),
}


@settled
def create_model(
    name: str, domain: str = "cifar10", seed: int = 0, classes: Sequence[str] | None = None
) -> Classifier:
    """A network with fresh weights drawn from `seed`, in channels-last layout.

    Args:
        name: one of `NETWORKS`, made for the images of `domain`; or a network of torchvision or timm, as they
            make it for ImageNet.
        classes: names of other classes than the domain's or ImageNet's; the head has one output for each.

    Raises:
        ValueError: unknown name or domain; the message lists what there is.
    """
    if domain not in DOMAINS:
        raise ValueError(f"unknown domain {domain!r}{near(domain, DOMAINS)} Known: {', '.join(DOMAINS)}")
    spec = DOMAINS[domain]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach CUDA's as well
        if name not in NETWORKS:
            model = _from_library(name, pretrained=False, classes=classes)
            return model.to(memory_format=torch.channels_last)
        classes = spec.classes if classes is None else tuple(classes)
        net = NETWORKS[name](len(classes), len(spec.mean))
    model = Classifier(net, spec.mean, spec.std, spec.size, classes, name)
    return model.to(memory_format=torch.channels_last)


@settled
def load_model(
    name: str, checkpoint: str | Path | None = None, classes: Sequence[str] | None = None
) -> Classifier:
    """A trained network, frozen, by name.

    Args:
        name: a network shipped with the package (`shipped_models()`), else one of torchvision or timm with
            its own weights; "torchvision:resnet50" and "timm:resnet50.a1_in1k" name the source.
        checkpoint: weights to load instead: a safetensors file, or a state dictionary written by
            `torch.save` (read with `weights_only=True`), as `load_weights` takes them.
        classes: what a checkpoint with another head tells apart, in the order of its outputs.

    Raises:
        ValueError: no such network; the message says what is near and what exists. `classes` without a
            checkpoint.
        CorruptCheckpoint: the file is damaged or does not fit the network.
        WeightsUnavailable: the weights are neither cached nor in reach.
    """
    shipped = shipped_models()
    if classes is not None and checkpoint is None:
        raise ValueError(f"{name} comes with classes of its own: classes= goes with checkpoint=")
    if name in shipped:
        entry = shipped[name]
        model = create_model(entry["network"], entry["domain"], classes=classes or entry["classes"])
        if checkpoint is None:
            checkpoint = WEIGHTS / entry["file"]
            _verify(checkpoint, entry["sha256"])
        return load_weights(model, checkpoint).freeze()
    if checkpoint is not None:
        return load_weights(create_model(name, classes=classes), checkpoint).freeze()
    if name in NETWORKS:
        advice = f"train it (notebook 00_teacher), name a checkpoint, or take one of {', '.join(shipped)}"
        raise ValueError(f"{name} is not shipped with weights: {advice}")
    with torch.random.fork_rng(devices=[]):  # the libraries draw weights before they load others
        return _from_library(name, pretrained=True).freeze()


def _from_library(name: str, pretrained: bool, classes: Sequence[str] | None = None) -> Classifier:
    model = load_pretrained(name, pretrained, classes)
    if model is None:
        libraries = library_names()
        known = [*NETWORKS, *(other for names in libraries.values() for other in names)]
        timm = "timm" if libraries["timm"] else "timm (which is not installed)"
        there = f"those of dinv.models.NETWORKS, torchvision and {timm}"
        raise ValueError(f"unknown network {name!r}{near(name.rpartition(':')[2], known)} There are {there}")
    return model


def shipped_models() -> dict[str, dict]:
    """The shipped networks: name -> network, domain, classes, file, sha256, accuracy (percent), history.

    The accuracy is that on the domain's whole test set, or on the part of it that shows these classes.
    """
    path = WEIGHTS / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _verify(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise CorruptCheckpoint(f"{path} is missing: install the package again")
    if (checksum := sha256_file(path)) != sha256:
        raise CorruptCheckpoint(
            f"{path} is corrupt (SHA-256 {checksum[:12]}..., expected {sha256[:12]}...): restore it from the "
            "repository or install the package again"
        )
